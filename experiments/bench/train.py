"""Times an SFT step beside transformers' NemotronHForCausalLM, by the length of rows, and by part.

  python -m experiments.bench train --table=TABLE.md

Both sides have equal weights, rows and products' dtype, fp32 weights and AdamW, and take turns in one process; the
best step of each counts. The losses of their first steps must agree. With --table, where the time goes is also drawn,
in a file with the ending .png.
"""

import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import convert
from experiments.bench import gpu, rl
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.kernels.token_logprob import token_logprob
from nemocascade.model.hybrid import Block
from nemocascade.runtime.work import needed_flops
from nemocascade.state_files import whole
from nemocascade.step.optimizer import make_optimizer, new_state
from nemocascade.step.sft import sft_step
from nemocascade.step.update import apply_gradients
from nemocascade.types import Batch, Params

OPTIMIZER = dict(peak_lr=1e-4, warmup_steps=0, weight_decay=0.1)
PARTS = {"M": "mamba", "E": "experts", "*": "attention", "-": "mlp"}
DTYPES = {"bfloat16": 0.05, "float32": 1e-3}  # Product dtype -> allowed difference of the first losses, nats.


@dataclasses.dataclass(frozen=True)
class Sizes:
  rows: int = 4  # Of one document each, beside transformers.
  row_tokens: int = 512
  lengths: tuple[int, ...] = (1024, 4096, 16_384)  # Of rows, at equal tokens a step.
  tokens: int = 16_384
  document: int = 512
  square: int = 2048  # Side of the matmul that measures the machine's rate.
  copied: int = 1 << 28  # Bytes of the array that measures the machine's memory rate.
  repeats: int = 5


SIZES = Sizes()


def cases() -> Iterator[dict]:
  """Yields lines for steps beside the peer, for shares of the machine's rates, and for lengths of rows."""
  try:
    from experiments.bench import torch_sft
  except ImportError as error:
    raise UserError(
      f"bench train compares with transformers, which is not installed ({error}): pip install -e '.[bench]'"
    ) from error
  for dtype in DTYPES:
    c = rl.config(dtype=dtype)
    p = rl.make_parts(c)
    params = p.programs.fresh_params(jax.random.key(c.seed))
    second, line = beside_peer(c, p, params, torch_sft)
    yield line
    yield from shares(p.programs.config, params, second)
  yield from by_length(dataclasses.replace(p.programs.config, dtype="bfloat16"), params)


def seconds_in_turns(sides: dict[str, Callable], repeats: int) -> dict[str, float]:
  """Name -> seconds of the best of `repeats` calls, after one that warms up; the sides take turns."""
  found: dict[str, list] = {name: [] for name in sides}
  for _ in range(repeats + 1):
    for name, act in sides.items():
      began, used = time.perf_counter(), time.process_time()
      jax.block_until_ready(act())
      found[name].append((time.perf_counter() - began, time.process_time() - used))
  for name, times in found.items():
    said = ", ".join(f"{wall:.3f} ({cpu:.3f})" for wall, cpu in times)
    print(f"{name}: seconds of the clock (of all cores): {said}", file=sys.stderr)
  return {name: min(wall for wall, _ in times[1:]) for name, times in found.items()}


# A whole step.


def rows_of(config: ModelConfig, rows: int, T: int, document: int) -> Batch:
  """Random tokens in documents of equal length. The first token of a document is not learned."""
  tokens_BT = np.random.default_rng(0).integers(16, config.vocab_size, (rows, T), np.int32)
  place_T = np.arange(T)
  ids_BT = np.broadcast_to((place_T // document + 1).astype(np.int32), (rows, T))
  return Batch(tokens_BT, ids_BT, np.broadcast_to(place_T % document > 0, (rows, T)))


def our_step(config: ModelConfig, params: Params, batch: Batch) -> Callable[[], jax.Array]:
  """A function that runs the next SFT step on the batch and returns its loss."""
  tx = make_optimizer(total_steps=100, **OPTIMIZER)
  step = jax.jit(sft_step(gpu.score_fn(config), tx), donate_argnums=0)
  state, batch = new_state(tx, jax.tree.map(jnp.array, params)), jax.device_put(batch)

  def act():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics["loss/sft"]

  return act


def beside_peer(c, p, params: Params, torch_sft) -> tuple[float, dict]:
  """(seconds of our step, the line that compares it with the peer's).

  Raises:
    RuntimeError: the losses of the first steps differ.
  """
  config = p.programs.config
  batch = rows_of(config, SIZES.rows, SIZES.row_tokens, SIZES.row_tokens)
  ours = our_step(config, params, batch)
  with tempfile.TemporaryDirectory() as place:
    start = rl.save(c, p.text.tokenizer, params, Path(place) / "start")
    convert.run(start, f"hf:{place}/hf")
    theirs = torch_sft.fastest(Path(place) / "hf", batch.tokens_BT, config.dtype, OPTIMIZER)
  mine, other = float(ours()), theirs.first_loss
  if not abs(mine - other) < DTYPES[config.dtype]:
    raise RuntimeError(f"the first losses are {mine:.4f} and {other:.4f} nats; they should be equal")
  took = seconds_in_turns({"ours": ours, torch_sft.NAME: theirs.step}, SIZES.repeats)
  tokens, peer = SIZES.rows * SIZES.row_tokens, took[torch_sft.NAME]
  line = dict(
    case=f"sft_step_{config.dtype}", ours=tokens / took["ours"], peer=tokens / peer,
    peer_name=f"{torch_sft.NAME}, experts by {theirs.experts}", unit="tokens/s", ratio=peer / took["ours"],
  )  # fmt: skip
  return took["ours"], line


def by_length(config: ModelConfig, params: Params) -> Iterator[dict]:
  """Tokens a second by the length of rows, beside the shortest; tokens a step and documents are equal."""
  sides = {T: our_step(config, params, rows_of(config, SIZES.tokens // T, T, SIZES.document)) for T in SIZES.lengths}
  took = seconds_in_turns(sides, SIZES.repeats)
  for T in SIZES.lengths[1:]:
    ours, peer = (SIZES.tokens / took[length] for length in (T, SIZES.lengths[0]))
    yield dict(
      case=f"rows_of_{T}_tokens", ours=ours, peer=peer, unit="tokens/s", ratio=ours / peer,
      peer_name=f"rows of {SIZES.lengths[0]} tokens, documents of {SIZES.document}",
    )  # fmt: skip


# Where the time goes.


def shares(config: ModelConfig, params: Params, second: float) -> Iterator[dict]:
  """Lines of the step and of its parts beside the time at the machine's rates, for the rows of `beside_peer`.

  Args:
    second: that our step takes.
  """
  tokens, T = SIZES.rows * SIZES.row_tokens, SIZES.row_tokens
  square = jax.random.normal(jax.random.key(0), (SIZES.square,) * 2, config.dtype)
  # With fp32 results, as in the model: XLA on CPUs multiplies bf16 as fp32 where the result is bf16.
  multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
  took = seconds_in_turns({"matmul": lambda: multiply(square, square)} | _parts(config, params), SIZES.repeats)
  rate = 2 * SIZES.square**3 / took.pop("matmul")  # Of operations.
  copy = gpu.copy_rate(SIZES.copied) * 1e9
  head = 2 * config.vocab_size * config.hidden_size
  of_kind = lambda letter: needed_flops(dataclasses.replace(config, hybrid_override_pattern=letter), T) - head
  flops = {PARTS[letter]: 3 * tokens * of_kind(letter) for letter in PARTS} | {"head": 3 * tokens * head}
  numbers = sum(a.size for a in jax.tree.leaves(params))
  limits = {part: work / rate for part, work in flops.items()} | {"update": 28 * numbers / copy}
  name = f"a matmul of {SIZES.square} in {config.dtype}, {rate / 1e9:.0f} GFLOP/s"
  whole = 3 * tokens * needed_flops(config, T) / rate
  yield dict(
    case=f"step_{config.dtype}", ours=second * 1e3, peer=whole * 1e3, peer_name=name, unit="ms", ratio=whole / second
  )
  count = {PARTS[letter]: config.hybrid_override_pattern.count(letter) for letter in PARTS}
  for part, seconds in took.items():
    n = count.get(part, 1)
    limit = f"7 numbers a parameter moved at {copy / 1e9:.1f} GB/s" if part == "update" else name
    yield dict(
      case=f"part_{part}_{config.dtype}", ours=n * seconds * 1e3, peer=n * limits[part] * 1e3, peer_name=limit,
      unit="ms", ratio=limits[part] / seconds,
    )  # fmt: skip


def _parts(config: ModelConfig, params: Params) -> dict[str, Callable]:
  """Name -> a function that runs a block of this kind, or the head or the update, forward and backward."""
  rows = rows_of(config, SIZES.rows, SIZES.row_tokens, SIZES.row_tokens)
  batch = jax.device_put(rows)
  x_BTD = jax.random.normal(jax.random.key(1), (*rows.tokens_BT.shape, config.hidden_size)).astype(config.dtype)
  acts = {}
  for letter in PARTS:
    if letter in config.hybrid_override_pattern:
      block = Block(config, letter)
      of = block.init(jax.random.key(2), x_BTD, batch.segment_ids_BT)
      acts[PARTS[letter]] = functools.partial(jax.jit(_both(block)), of, x_BTD, batch.segment_ids_BT)

  def loss(x_BTD, head_DV):
    logprobs_BT, *_ = token_logprob(x_BTD, head_DV.astype(x_BTD.dtype), batch.tokens_BT, batch.loss_mask_BT)
    return jnp.sum(logprobs_BT)

  acts["head"] = functools.partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), x_BTD, params["lm_head"])
  acts["update"] = _update(params)
  return acts


def _both(block: Block) -> Callable:
  def both(of, x_BTD, segment_ids_BT):
    y_BTD, back = jax.vjp(lambda of, x_BTD: block.apply(of, x_BTD, segment_ids_BT)[0], of, x_BTD)
    return y_BTD, back(y_BTD)

  return both


def _update(params: Params) -> Callable:
  tx = make_optimizer(total_steps=100, **OPTIMIZER)
  state, grads = new_state(tx, jax.tree.map(jnp.array, params)), jax.tree.map(jnp.ones_like, params)
  apply = jax.jit(lambda state, grads: apply_gradients(state, tx, grads, jnp.float32(1.0)), donate_argnums=0)

  def act():
    nonlocal state
    state, metrics = apply(state, grads)
    return metrics

  return act


def draw(lines: list[dict], path: Path) -> None:
  """A picture: for each dtype a bar of the parts' times beside the whole step's, and one at the machine's rates."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  found = {line["case"]: line for line in lines}
  dtypes = [dtype for dtype in DTYPES if f"step_{dtype}" in found]
  names = [name for name in (*PARTS.values(), "head", "update") if any(f"part_{name}_{d}" in found for d in dtypes)]
  if not names:  # No part is measured yet.
    return
  figure, axes = plt.subplots(figsize=(9, 1 + 1.2 * len(dtypes)), layout="constrained")
  labels = []
  for dtype in dtypes:
    for side, label in (("ours", dtype), ("peer", f"{dtype}, at the machine's rates")):
      left = 0.0
      for place, name in enumerate(names):
        ms = found[case][side] if (case := f"part_{name}_{dtype}") in found else 0.0
        bar = axes.barh(len(labels), ms, left=left, color=f"C{place}", label=None if labels else name)
        if ms > 0.04 * found[f"step_{dtypes[-1]}"]["ours"]:
          axes.bar_label(bar, [f"{ms:.0f}"], label_type="center")
        left += ms
      if side == "ours":
        axes.plot(found[f"step_{dtype}"]["ours"], len(labels), "k|", ms=24)
      labels.append(label)
  axes.set_yticks(range(len(labels)), labels)
  axes.invert_yaxis()
  axes.set_xlabel("ms of a step; | is the whole step")
  figure.legend(loc="outside upper center", ncols=len(names))
  with whole(path) as partial:
    figure.savefig(partial, format="png", dpi=150)
  plt.close(figure)
