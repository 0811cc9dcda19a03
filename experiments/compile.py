"""Compiles every program of a stage for a TPU slice, on a machine without TPUs.

  python -m experiments.compile --config=configs/nano_30b/sft.py --topology=v5p:4x4x4

Prints a JSON line per program: {"program", "topology", "chips", "tokens", "peak_gib", "argument_gib",
"temp_gib", "flops", "compile_s"}. Memory is the compiler's count for one device (a chip; on tpu7x one of its
two cores). flops cover all devices: 2 per parameter and token forward, 6 with the backward pass. Nothing is
allocated. If programs do not fit, an error at the end names them and what to change.
"""

import functools
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from experiments import rl, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import kind_of
from nemocascade.fields import text
from nemocascade.mesh import by_rows, first_rows, make_mesh, placed
from nemocascade.model.size import matmul_params
from nemocascade.runtime import objective, signals
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.scoring import scored_rows
from nemocascade.types import Batch, Prompts, Rollout

GIB = 1 << 30
# Kind of chip -> (GiB per device, devices per chip).
CHIPS = {"v5e": (16, 1), "v5p": (95, 1), "v6e": (32, 1), "tpu7x": (96, 2)}

# (name, function that traces it, tokens that it processes, what to change if it does not fit).
Program = tuple[str, Callable, Spent, str]
MORE = "more chips, or mesh.expert and mesh.data that cut the parameters finer"


def run(c: ConfigDict, topology: str) -> list[dict]:
  """Compiles the programs; prints and returns their lines.

  Raises:
    UserError: the topology is unknown, the compiler is not installed, dimensions do not divide over the mesh,
      or a program does not fit.
  """
  if (kind := kind_of(c.to_dict())) not in PROGRAMS:
    raise unknown("kind of stage to compile", kind, PROGRAMS)
  {"sft": sft, "rl": rl}[kind].check(c)
  if kind == "rl":
    if c.distillation_weight:
      raise UserError(
        f"distillation_weight={c.distillation_weight}: what teachers send for it is not compiled here; give 0"
      )
  kind, devices = slice_of(topology)
  gib, cores = CHIPS[kind]
  programs = Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(**c.mesh, of=devices))
  lines, too_large = [], []
  for name, trace, spent, advice in PROGRAMS[c.kind](c, programs):
    cost = spent.sampled + spent.prefilled + spent.scored + spent.trained
    line = {"program": name, "topology": topology, "chips": len(devices) // cores, "tokens": cost}
    began = time.time()
    line |= measure(trace) | {"flops": spent.flops(matmul_params(programs.config))}
    line["compile_s"] = round(time.time() - began, 1)
    print(json.dumps(line), flush=True)
    lines.append(line)
    if line["peak_gib"] > gib or line["temp_gib"] is None:
      too_large.append(f"{name} needs {line['peak_gib']:.1f} GiB: give {advice}, or {MORE}")
  if too_large:
    raise UserError(f"a device of {topology} has {gib} GiB; {'; '.join(too_large)}")
  return lines


def slice_of(topology: str) -> tuple[str, list[jax.Device]]:
  """(kind of chip, abstract devices to compile for) of a slice.

  Raises:
    UserError: the topology is unknown, or the compiler is not installed.
  """
  kind, _, shape = topology.partition(":")
  if kind not in CHIPS:
    raise unknown(f"kind of chip in --topology={topology!r}", kind, CHIPS)
  if not re.fullmatch(r"\d+(x\d+)*", shape):
    raise UserError(f"--topology={topology!r}: give KIND:CHIPSxCHIPS, such as v5p:4x4x4 or v6e:16x16")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("the TPU compiler (libtpu) is not installed: pip install 'nemocascade[tpu]'")
  # libtpu reads these when it loads: do not look for a slice, and allow other processes to load it.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # A program from the cache can report other memory.
  try:
    return kind, list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except Exception as error:  # Any error of the compiler.
    why = " ".join(str(error).split())[:200]
    raise UserError(f"--topology={topology!r}: not a slice that the TPU compiler knows ({why})") from error


def measure(trace: Callable) -> dict[str, float | None]:
  """GiB of one device: peak, arguments, and temporary buffers.

  The last two are None if the compiler refuses the program because it does not fit.
  """
  try:
    m = trace().lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm", str(error))
    if used is None:
      raise
    peak = float(used[1]) * {"M": 2**-10, "G": 1, "T": 2**10}[used[2]]
    return {"peak_gib": round(peak, 2), "argument_gib": None, "temp_gib": None}
  # A result that reuses the buffer of an argument is counted once.
  sizes = m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes
  gib = lambda size: round(size / GIB, 2)
  return {
    "peak_gib": gib(sum(sizes) + m.generated_code_size_in_bytes),
    "argument_gib": gib(sizes[0]),
    "temp_gib": gib(sizes[2]),
  }


def _rows(programs: Programs, tree):
  """Shapes and dtypes with the shardings that Programs.put gives rows."""
  return placed(tree, first_rows(tree, programs.mesh))


def _sft_programs(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  _, state, step_fn = sft.program(c, programs)
  of = functools.partial(jax.ShapeDtypeStruct, (c.rows, c.row_tokens))
  batch = _rows(programs, Batch(of(jnp.int32), of(jnp.int32), of(bool)))
  yield (
    "sft_step", lambda: step_fn.trace(state, batch), Spent(trained=c.rows * c.row_tokens),
    f"fewer rows or shorter ones than rows={c.rows} of row_tokens={c.row_tokens}, or model.remat=True",
  )  # fmt: skip


def _rl_programs(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  r, p, struct = c.rollout, c.packing, jax.ShapeDtypeStruct
  engine = programs.engine(r.prompt_tokens, r.total_tokens)
  Q, B, temperature = r.prompts, r.prompts * r.completions, np.float32(r.temperature)
  prompts = _rows(programs, (struct((Q, r.prompt_tokens), jnp.int32), struct((Q,), jnp.int32)))
  prefill = functools.cache(lambda: engine.start_fn.trace(programs.template, *prompts, r.completions, r.top_p < 1))
  yield (
    "prefill", prefill, Spent(prefilled=Q * r.prompt_tokens),
    f"fewer prompts than rollout.prompts={Q}, or shorter ones than rollout.prompt_tokens={r.prompt_tokens}",
  )  # fmt: skip

  def decode():
    d = prefill().out_info
    scalars = struct((), jax.eval_shape(lambda: jax.random.key(0)).dtype), *[struct((), jnp.float32)] * 2
    return engine.decode_fn.trace(programs.template, placed(d, by_rows(d, B, programs.mesh)), *scalars)

  fewer = f"fewer sequences than rollout.prompts={Q} x rollout.completions={r.completions}"
  shorter = f"shorter ones than rollout.total_tokens={r.total_tokens}"
  yield "decode_step", decode, Spent(sampled=B), f"{fewer}, or {shorter}"

  if any(signal.phase == "score" for signal in signals.wanted(c)):
    n = scored_rows(programs)
    scored = _rows(programs, tuple(struct((n, r.total_tokens), dtype) for dtype in (jnp.int32, jnp.int32, bool)))
    yield (
      "score",
      lambda: programs.logprobs.trace(programs.template, *scored, temperature),
      Spent(scored=n * r.total_tokens),
      shorter,
    )

  state, step_fn, proximal_fn = objective.step_program(c, programs)
  rows, count = _taught_rows(c, Q, r.completions, r.total_tokens)
  rows = {name: struct((p.rows, p.row_tokens), row.dtype) for name, row in rows.items()}
  rows, count = _rows(programs, (rows, count))
  pieces = f"more pieces than packing.pieces={p.pieces}, or shorter rows than packing.row_tokens={p.row_tokens}"
  prompts = Prompts(*prompts) if p.shared_prompts else None
  tokens = p.rows * p.row_tokens + (Q * r.prompt_tokens if p.shared_prompts else 0)
  if c.updates > 1:
    yield (
      "proximal_logprobs",
      lambda: proximal_fn.trace(programs.template, dict(rows), prompts, temperature),
      Spent(scored=tokens),
      pieces,
    )
    rows["proximal"] = rows["behaviour"]
  yield "rl_step", lambda: step_fn.trace(state, rows, count, None, prompts, temperature), Spent(trained=tokens), pieces


def _taught_rows(c: ConfigDict, Q: int, G: int, T: int):
  """(shapes of the training rows of a rollout, shape of the loss's count) of this stage."""
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  f32, QGT = jnp.float32, (Q, G, T)
  rollout = Rollout(
    tokens_QGT=of(jnp.int32, *QGT), segment_ids_QGT=of(jnp.int32, *QGT), loss_mask_QGT=of(bool, *QGT),
    behaviour_logprobs_QGT=of(f32, *QGT), rewards_QG=of(f32, Q, G), valid_QG=of(bool, Q, G),
    drawn_logprobs_QGT=of(f32, *QGT) if c.rollout.top_p < 1 else None,
    teacher_logprobs_QGT=of(f32, *QGT) if objective.needs(c).teachers else None,
    reference_logprobs_QGT=of(f32, *QGT) if c.kl_weight else None,
  )  # fmt: skip
  rows, count, _ = jax.eval_shape(objective.rows_program(objective.settings(c, "advantage", "aggregation")), rollout)
  return rows, count


PROGRAMS = {"sft": _sft_programs, "rl": _rl_programs}

if __name__ == "__main__":
  launch(run, workdir=False, topology=(text("KIND:CHIPSxCHIPS of the TPU slice.", empty=False), "v5p:4x4x4"))
