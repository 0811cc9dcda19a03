"""The operations of a traced training step, beside those that its documents need.

Only products are counted, 2 operations for each multiply-add; they are nearly all of the work.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from nemocascade.config import ModelConfig
from nemocascade.kernels.attention_blocks import blocks_touched
from nemocascade.kernels.attention_tpu import choose_block, diagonal_share
from nemocascade.model.size import matmul_params

DOCUMENT = 14_336  # Mean tokens of a document in the counts: about that of the released SFT data.
# Kernel of attention -> its products for each pair of blocks; two are needed forward, and four backward.
ATTENTION = {"attention_forward": 2, "attention_dq": 3, "attention_dkv": 4}


def needed_flops(config: ModelConfig, length: int) -> float:
  """Operations per token of a forward pass over documents of one length: weights, attention and scan.

  A token attends to (length + 1) / 2 keys on average. The scan counts its recurrence: 3 multiplications and
  3 additions per number of the state.
  """
  c, pattern = config, config.hybrid_override_pattern
  attention = pattern.count("*") * 4 * c.num_attention_heads * c.head_dim * (length + 1) / 2
  scan = pattern.count("M") * 6 * c.mamba_inner_size * c.ssm_state_size
  return 2 * matmul_params(c) + attention + scan


def ratios(config: ModelConfig, rows: int, T: int, trace: Callable) -> dict[str, float]:
  """Operations of a training step over those that its documents need.

  Documents have DOCUMENT tokens, or a row's if it is shorter. Three times a forward pass is needed.

  Args:
    rows, T: the step's rows, and their tokens.
    trace: config -> the traced step of a model with this config.

  Returns:
    {"work_ratio": without what config.remat recomputes, "remat_ratio": what it recomputes}. The head and attention
    always recompute; that is in work_ratio.
  """
  document = min(T, DOCUMENT)
  needed = 3 * rows * T * needed_flops(config, document)
  whole, kept = (program_flops(trace(of).jaxpr, document) for of in (config, dataclasses.replace(config, remat="none")))
  return {"work_ratio": round(kept / needed, 3), "remat_ratio": round((whole - kept) / needed, 3)}


def program_flops(
  jaxpr: ClosedJaxpr | Jaxpr, document: int = DOCUMENT, platform: str = "tpu", arriving: dict[int, int] | None = None
) -> float:
  """Operations of a program on all its devices, in the forms that it has on `platform`.

  Of other branches the one with a Pallas kernel counts on TPUs, else the one with the most operations. A while loop
  counts once.

  Args:
    document: tokens of a document, which decide how many blocks the kernels of attention meet.
    arriving: rows of a buffer that receives rows for experts -> rows that arrive if all devices get as many. The
      kernels do not multiply the others.
  """
  arriving = arriving or {}
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  chosen, total = {}, 0.0  # Variable -> the branch that it selects.
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    known = arriving | (_arriving(eqn.params["jaxpr"]) if name == "shard_map" else {})
    inside = [program_flops(j, document, platform, known) for j in _jaxprs(eqn)]
    if name == "platform_index":
      named = [i for i, of in enumerate(eqn.params["platforms"]) if of and platform in of]
      chosen[eqn.outvars[0]] = (named or [len(eqn.params["platforms"]) - 1])[0]
    elif name == "dot_general":
      total += _product(eqn)
    elif name == "pallas_call":
      total += _kernel(eqn, document, arriving)
    elif name == "scan":
      total += eqn.params["length"] * sum(inside)
    elif name == "cond":
      branch = chosen.get(eqn.invars[0])
      if branch is None and platform == "tpu":  # In a gradient, the choice of a platform is an argument.
        branch = next((i for i, j in enumerate(_jaxprs(eqn)) if _has_kernel(j)), None)
      total += max(inside) if branch is None else inside[branch]
    elif name == "shard_map":
      mesh = eqn.params["mesh"]
      total += math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"]) * sum(inside)
    else:
      total += sum(inside)
  return total


def _jaxprs(eqn) -> list:
  """The programs inside an equation, but not those of kernels."""
  return [] if eqn.primitive.name == "pallas_call" else list(jaxprs_in_params(eqn.params))


def _has_kernel(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  return any(eqn.primitive.name == "pallas_call" or any(map(_has_kernel, _jaxprs(eqn))) for eqn in jaxpr.eqns)


def _arriving(jaxpr: ClosedJaxpr | Jaxpr) -> dict[int, int]:
  """Rows of each buffer that receives rows from all devices -> rows that a device sends, of which as many arrive."""
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  found = {}
  for eqn in jaxpr.eqns:
    for inside in _jaxprs(eqn):
      found |= _arriving(inside)
    if eqn.primitive.name == "ragged_all_to_all":
      sent, room = (v.aval.shape[0] for v in eqn.invars[:2])
      if sent < room:
        found[room] = sent
  return found


def _product(eqn) -> float:
  (over, _), (batch, _) = eqn.params["dimension_numbers"]
  a, b = (v.aval.shape for v in eqn.invars[:2])
  summed = math.prod(a[i] for i in over)
  shared = math.prod(a[i] for i in batch)
  return 2.0 * math.prod(a) * math.prod(b) / (summed * shared)


def _kernel(eqn, document: int, arriving: dict[int, int]) -> float:
  """Operations of a Pallas kernel: its estimate for rows that arrive, or those of the parts that attention meets."""
  name = str(eqn.params["name"])
  if name not in ATTENTION:
    rows = next((v.aval.shape[0] for v in eqn.invars if v.aval.ndim == 2), 1)
    return float(eqn.params["cost_estimate"].flops) * arriving.get(rows, rows) / rows
  # Of a row that lies over several devices, a device has T queries and the keys of all S tokens.
  (B, heads, T, H), (_, _, S, _), *_ = (v.aval.shape for v in eqn.invars if v.aval.ndim == 4)
  block = choose_block(T)
  ids_1S = np.arange(S, dtype=np.int32)[None] // document + 1
  met = int(blocks_touched(ids_1S, block)[0]) * T / S - -(-T // block) * (1 - diagonal_share(name, block))
  return 2.0 * ATTENTION[name] * B * met * block**2 * H * heads
