"""Checks the GPU kernels on one card, and times kernels, a training step and decoding.

  python -m experiments.bench gpu --table=TABLE.md

Lines of correctness compare an error with its tolerance: a ratio above 1 passes. The model is a hybrid
with Nano's proportions at half its width. Without a GPU the same cases run at tiny sizes, with the kernels in
Pallas' interpreter. That tests the benchmark itself; its times mean nothing.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import kernels
from nemocascade.config import ModelConfig
from nemocascade.kernels.routed_matmul import routed_matmul, routed_mlp
from nemocascade.model.decode_state import row_axes
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.size import count_params
from nemocascade.rollout.engine import Engine
from nemocascade.runtime.work import needed_flops
from nemocascade.step.optimizer import make_optimizer, new_state
from nemocascade.step.sft import sft_step
from nemocascade.types import Batch

PEAK = {"H100": 989.0, "H200": 989.0}  # Dense bf16 TFLOP/s of the SXM cards; NVIDIA's data sheets.
# dtype -> nats between log-probabilities, 1 - cosine between gradients.
MODEL_TOLERANCES = {"float32": (1e-4, 1e-6), "bfloat16": (0.1, 0.01)}
REPEATS = 5  # Timed steps after the one that compiles. Their median is reported.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases; the defaults are for a card with 80 GB."""

  width: int = 1344  # Half of Nano's.
  experts: int = 64  # Half of Nano's; 6 per token, as in Nano.
  unit: str = "MEMEM*E"  # The repeated part of the layer pattern.
  repeats: int = 3  # How often `unit` is repeated.
  vocab_size: int = 65_536
  rows: int = 4
  row_tokens: int = 8_192
  documents: int = 4  # Per row, of equal length.
  decode_rows: tuple[int, ...] = (64, 256)
  decode_context: int = 2_048  # Capacity of the caches, in tokens.
  decode_tokens: int = 64
  # (dtype, rows, columns in, columns out, experts). fp32 has small shapes only: no matrix unit multiplies
  # fp32, and Triton compiles a large fp32 tile for minutes.
  kernel_shapes: tuple = (
    ("float32", 1_000, 136, 200, 5),
    ("bfloat16", 1_000, 136, 200, 5),
    ("bfloat16", 4_096, 2_688, 1_856, 8),
  )
  kernel_tokens: tuple[int, ...] = (4_096, 32_768)
  interpret: bool = False  # Whether kernels run in Pallas' interpreter.


TINY = Sizes(
  width=32, experts=8, unit="M*E", vocab_size=64, rows=2, row_tokens=32, documents=2, decode_rows=(2,),
  decode_context=16, decode_tokens=4, kernel_shapes=(("float32", 40, 16, 24, 3), ("bfloat16", 40, 16, 24, 3)), kernel_tokens=(64,), interpret=True,
)  # fmt: skip


def cases() -> Iterator[dict]:
  sizes = Sizes() if jax.default_backend() == "gpu" else TINY
  side, copied = (8_192, 1 << 30) if not sizes.interpret else (64, 1 << 12)
  yield from train(sizes, dense_rate(side))
  yield from decode(sizes, copy_rate(copied))
  yield from model_correct()
  yield from correct(sizes)
  if not sizes.interpret:
    yield from kernels.gpu_cases(tokens=sizes.kernel_tokens)


# Correctness.


def correct(sizes: Sizes) -> Iterator[dict]:
  """Errors of the GPU form of the routed product and MLP against the blocked form in fp32.

  Values and gradients of the product, gradients of the MLP.
  """
  how = dict(form="gpu", interpret=sizes.interpret)
  with jax.default_matmul_precision("highest"):  # Otherwise the fp32 reference would use TF32.
    for name, *shape in sizes.kernel_shapes:
      dtype, (N, D, F, E) = jnp.dtype(name), shape
      tolerance = 1e-5 if name == "float32" else 2**-6
      for load, error in _product_errors(how, shape, dtype).items():
        yield _error_line(f"product_{N}x{D}x{F}_{E}_experts_{load}_{name}", error, tolerance)
      yield _error_line(f"mlp_{N}x{D}x{F}_{E}_experts_{name}", _mlp_error(how, shape, dtype), 4 * tolerance)


def _loads(N: int, E: int) -> dict[str, list[int]]:
  return {"even": [N // E] * E, "one_has_all": [N - 3] + [0] * (E - 2) + [1], "few": [7] * E}


def _product_errors(how: dict, shape: list[int], dtype) -> dict[str, float]:
  """Name of a load (rows of each expert) -> relative error. One compiled program serves all loads."""
  N, D, F, E = shape
  keys = jax.random.split(jax.random.key(0), 3)
  args = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, [(N, D), (E, D, F), (N, F)], strict=True)]

  def both(sizes_E, x, w, dy, **how):
    y, back = jax.vjp(lambda x, w: routed_matmul(x, w, sizes_E, **how), x, w)
    return y, back(dy)

  reference = jax.jit(functools.partial(both, form="blocked"))
  ours = jax.jit(functools.partial(both, **how))
  errors = {}
  for load, sizes in _loads(N, E).items():
    sizes_E = jnp.array(sizes, jnp.int32)
    expected = reference(sizes_E, *(a.astype(jnp.float32) for a in args))
    errors[load] = _relative_error(ours(sizes_E, *args), expected)
  return errors


def _mlp_error(how: dict, shape: list[int], dtype) -> float:
  N, D, F, E = shape
  keys = jax.random.split(jax.random.key(1), 5)
  x, up, down = (
    (jax.random.normal(k, s) / s[-2] ** 0.5).astype(dtype)
    for k, s in zip(keys, [(N, D), (E, D, F), (E, F, D)], strict=False)
  )
  expert_TX = jax.lax.top_k(jax.random.uniform(keys[3], (N, E)), 2)[1]
  weight_TX = jax.random.uniform(keys[4], (N, 2)).astype(dtype)

  def gradients(*args, **how):
    loss = lambda x, u, d, w: jnp.sum(jnp.sin(routed_mlp(x, u, d, expert_TX, w, **how)[0].astype(jnp.float32)))
    return jax.grad(loss, argnums=(0, 1, 2, 3))(*args)

  args = x, up, down, weight_TX
  expected = jax.jit(functools.partial(gradients, form="blocked"))(*(a.astype(jnp.float32) for a in args))
  return _relative_error(jax.jit(functools.partial(gradients, **how))(*args), expected)


def _relative_error(got, expected) -> float:
  """max over arrays of max|got - expected| / max|expected|; NaN if any number is NaN."""
  errors = []
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    errors.append(np.abs(a - b).max() / np.abs(b).max())
  return float(np.max(errors))


def model_correct() -> Iterator[dict]:
  """Errors of a small model's log-probabilities and gradients on this device against fp32 on the CPU."""
  config = model_config(dataclasses.replace(TINY, width=64, vocab_size=256), dtype="float32")
  params = jax.device_get(init_params(config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 256, (2, 64), np.int32)
  segment_ids_BT = np.repeat(np.array([[1] * 40 + [2] * 24]), 2, axis=0).astype(np.int32)

  def both(config):
    def loss(params):
      logprobs_BT = score_fn(config)(params, tokens_BT, segment_ids_BT).logprobs_BT
      return jnp.sum(jnp.sin(logprobs_BT)), logprobs_BT

    (_, logprobs_BT), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    flat = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
    return np.asarray(logprobs_BT), flat

  with jax.default_device(jax.devices("cpu")[0]):
    expected, grads = both(config)
  for dtype, (tolerance, angle) in MODEL_TOLERANCES.items():
    got, got_grads = both(dataclasses.replace(config, dtype=dtype))
    cosine = got_grads @ grads / (np.linalg.norm(got_grads) * np.linalg.norm(grads))
    yield _error_line(f"model_logprobs_{dtype}", float(np.abs(got - expected).max()), tolerance)
    yield _error_line(f"model_gradient_angle_{dtype}", max(float(1 - cosine), 1e-12), angle)


def _error_line(case: str, error: float, tolerance: float) -> dict:
  """A line whose `ours` is the error and `peer` the tolerance; a NaN or infinity gives ratio 0."""
  ratio = tolerance / max(error, 1e-12) if math.isfinite(error) else 0.0
  return dict(case=case, ours=error, peer=tolerance, peer_name="tolerance", unit="error", ratio=ratio)


# Rates of the card.


def dense_rate(side: int) -> float:
  """TFLOP/s of a square bf16 matmul with this side."""
  square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
  return 2 * side**3 / 1e12 / _median_seconds(jax.jit(jnp.matmul), square, square)


def copy_rate(nbytes: int) -> float:
  """GB/s, read plus written, of a program that reads one array and writes another."""
  array = jax.random.normal(jax.random.key(0), (nbytes // 4,))
  return 2 * nbytes / 1e9 / _median_seconds(jax.jit(lambda a: a * 1.5), array)


def _median_seconds(fn: Callable, *args) -> float:
  jax.block_until_ready(fn(*args))
  return float(np.median([kernels.seconds_of(lambda: fn(*args)) for _ in range(REPEATS)]))


# The model.


def model_config(sizes: Sizes, **how) -> ModelConfig:
  """A hybrid with Nano's proportions: heads of 128, experts of 0.69 width, a shared expert of 1.38 width."""
  D = sizes.width
  small = D < 256
  return ModelConfig(
    vocab_size=sizes.vocab_size, hidden_size=D, hybrid_override_pattern=sizes.unit * sizes.repeats,
    num_attention_heads=4 if small else 16, num_key_value_heads=2, head_dim=8 if small else 128,
    mamba_num_heads=4 if small else 32, mamba_head_dim=8 if small else 64, ssm_state_size=8 if small else 128,
    n_groups=2 if small else 8, chunk_size=16 if small else 128, n_routed_experts=sizes.experts,
    num_experts_per_tok=min(6, sizes.experts), moe_intermediate_size=16 if small else 928,
    moe_shared_expert_intermediate_size=32 if small else 1_856, routed_scaling_factor=2.5, **how,
  )  # fmt: skip


def score_fn(config: ModelConfig) -> Callable:
  model = Hybrid(config)
  return lambda params, *args: model.apply({"params": params}, *args, method="score")


# Training.


def train(sizes: Sizes, dense: float) -> Iterator[dict]:
  """TFLOP/s of an SFT step: bf16 products, fp32 weights, AdamW. Recomputed operations do not count.

  Args:
    dense: the card's rate for a dense matmul, in TFLOP/s, as a limit.
  """
  config = model_config(sizes, dtype="bfloat16", param_dtype="float32", remat="block")
  tx = make_optimizer(peak_lr=1e-4, warmup_steps=10, total_steps=100)
  state = jax.jit(lambda key: new_state(tx, init_params(config, key)))(jax.random.key(0))
  step = jax.jit(sft_step(score_fn(config), tx, accumulate=sizes.rows), donate_argnums=0)
  rng, length = np.random.default_rng(0), sizes.row_tokens // sizes.documents
  shape = sizes.rows, sizes.row_tokens
  ids_BT = np.broadcast_to(np.arange(sizes.row_tokens, dtype=np.int32) // length + 1, shape)
  tokens_BT = rng.integers(0, sizes.vocab_size, shape, np.int32)
  batch = jax.device_put(Batch(tokens_BT, ids_BT, np.ones(shape, bool)))
  began, seconds = time.perf_counter(), []
  for _ in range(REPEATS + 1):
    state, metrics = step(state, batch)
    loss = float(metrics["loss/sft"])  # Waits for the step.
    seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
  if not math.isfinite(loss):
    raise RuntimeError(f"the loss of the benchmark's SFT step is {loss}")
  second = float(np.median(seconds[1:]))
  flops = 3 * needed_flops(config, length) * math.prod(shape) / 1e12
  params = count_params(config) / 1e9
  print(
    f"SFT step: {params:.2f}B parameters, {math.prod(shape)} tokens in {second:.3f} s"
    f" ({math.prod(shape) / second:.0f} tokens a second), first {seconds[0]:.0f} s, loss {loss:.2f}",
    file=sys.stderr,
  )
  peak = next((rate for name, rate in PEAK.items() if name in jax.devices()[0].device_kind), None)
  limits = {"a dense matmul": dense} | ({"the data sheet's peak": peak} if peak else {})
  for name, limit in limits.items():
    rate = flops / second
    yield dict(
      case=f"sft_step_{params:.2f}B", ours=rate, peer=limit, peer_name=name, unit="TFLOP/s", ratio=rate / limit
    )


# Decoding.


def decode(sizes: Sizes, copy: float) -> Iterator[dict]:
  """Tokens/s of the rollout's decoding loop, against the time to read the weights and move the states.

  Args:
    copy: the card's memory rate, in GB/s.
  """
  config = model_config(sizes, dtype="bfloat16", param_dtype="bfloat16")
  params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
  model = Hybrid(config)
  apply = lambda method: lambda params, *args: model.apply({"params": params}, *args, method=method)
  engine = Engine(
    apply("prefill"), apply("step"), axes_fn=row_axes, prompt_tokens=sizes.decode_context // 2,
    total_tokens=sizes.decode_context, stop_ids=(-1,),
  )  # fmt: skip
  prompt = np.random.default_rng(0).integers(0, sizes.vocab_size, sizes.decode_context // 2).tolist()
  for B in sizes.decode_rows:
    for end in (1, sizes.decode_tokens):  # The run of one token compiles; the other is timed.
      d = engine.start(params, [prompt], B)
      d = d.replace(limit_B=jnp.full((B,), len(prompt) + end, jnp.int32))
      state_bytes = sum(a.nbytes for a in jax.tree.leaves(d.state.units))
      jax.block_until_ready(d)
      began = time.perf_counter()
      d = engine.decode(params, d, jax.random.key(0))
      jax.block_until_ready(d)
    tick = (time.perf_counter() - began) / sizes.decode_tokens
    weights = sum(a.nbytes for a in jax.tree.leaves(params)) - params["embedding"].nbytes
    limit = (weights + _moved(state_bytes, d, sizes)) / 1e9 / copy
    yield dict(
      case=f"decode_{B}_rows", ours=B / tick, peer=B / limit, peer_name="bytes over the copy rate",
      unit="tokens/s", ratio=limit / tick,
    )  # fmt: skip


def _moved(state_bytes: int, d, sizes: Sizes) -> float:
  """Bytes of states that a decoding step must move.

  Recurrent states are read and written. Caches are read as far as they are filled.
  """
  caches = sum(
    leaf.nbytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(d.state.units)
    if path[-1].key in ("k_BKSH", "v_BKSH")
  )
  full = (sizes.decode_context // 2 + sizes.decode_tokens / 2) / sizes.decode_context
  return 2 * (state_bytes - caches) + caches * full
