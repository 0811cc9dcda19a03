"""Times the routed matmul and the routed MLP against peers on this machine."""

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from nemocascade.kernels.routed_matmul import routed_matmul, routed_mlp

REPEATS = 3  # Timed runs, in turns; the best of each is compared.
D, F, E, X = 2688, 1856, 128, 6  # Nano's hidden size, expert width, experts, experts per token.
TOKENS = (4096, 32768, 262144)
# Name -> exponent of Zipf's law, by which tokens choose experts; 0 gives equal loads.
LOADS = {"balanced": 0.0, "skewed": 1.0}
DENSE = 8192  # Side of the square matmul that measures the card's dense rate.


def cases() -> Iterator[dict]:
  """GPU: Nano's shapes in bf16, with gradients. Elsewhere: small forward products in fp32."""
  return gpu_cases() if jax.default_backend() == "gpu" else cpu_cases()


def cpu_cases(D: int = 256, F: int = 192, rows: int = 4096) -> Iterator[dict]:
  """The routed matmul in this platform's form against jax.lax.ragged_dot, with random group sizes."""
  for experts in (16, 128):
    keys = jax.random.split(jax.random.key(experts), 3)
    x_ND = jax.random.normal(keys[0], (rows, D))
    w_EDF = jax.random.normal(keys[1], (experts, D, F))
    sizes_E = jnp.bincount(jax.random.randint(keys[2], (rows,), 0, experts), length=experts)
    args = x_ND, w_EDF, sizes_E.astype(jnp.int32)
    rates = _rates({"ours": routed_matmul, "peer": jax.lax.ragged_dot}, args, 2 * rows * D * F / 1e9)
    yield _line(f"forward_{experts}_experts", rates["ours"], rates["peer"], "jax.lax.ragged_dot", "GFLOP/s")


def gpu_cases(
  D: int = D, F: int = F, E: int = E, X: int = X, tokens: tuple[int, ...] = TOKENS, dense: int = DENSE
) -> Iterator[dict]:
  """The forward product, its dx and dw, and the routed MLP, against each peer that runs here."""
  bf16 = jnp.bfloat16
  square = jax.random.normal(jax.random.key(0), (dense, dense), bf16)
  rate = _rates({"dense": jnp.matmul}, (square, square), 2 * dense**3 / 1e12)["dense"]
  for T in tokens:
    for load, exponent in LOADS.items():
      N = T * X
      keys = jax.random.split(jax.random.key(T), 5)
      up_EDF, down_EFD = (
        jax.random.normal(k, s, bf16) / s[1] ** 0.5 for k, s in zip(keys, [(E, D, F), (E, F, D)], strict=False)
      )
      x_TD = jax.random.normal(keys[2], (T, D), bf16)
      expert_TX, weight_TX = choices(keys[3], T, E, X, exponent)
      sizes_E = jnp.bincount(expert_TX.reshape(N), length=E).astype(jnp.int32)
      x_ND, dy_NF = jnp.tile(x_TD, (X, 1)), jax.random.normal(keys[4], (N, F), bf16)
      products = {"ours": routed_matmul} | peers()
      mlps = {"ours": lambda *a: routed_mlp(*a)[0]} | {n: functools.partial(chain, p) for n, p in peers().items()}
      flops = 2 * N * D * F / 1e12
      for what, forms, part, args, work in (
        ("forward", products, _value, (x_ND, up_EDF, sizes_E), flops),
        ("dx", products, _dx, (x_ND, up_EDF, sizes_E, dy_NF), flops),
        ("dw", products, _dw, (x_ND, up_EDF, sizes_E, dy_NF), flops),
        ("mlp_forward", mlps, _value, (x_TD, up_EDF, down_EFD, expert_TX, weight_TX), 2 * flops),
        ("mlp_forward_backward", mlps, _mlp_gradients, (x_TD, up_EDF, down_EFD, expert_TX, weight_TX), 6 * flops),
      ):  # fmt: skip
        rates = _rates({name: part(form) for name, form in forms.items()}, args, work)
        if "ours" not in rates:
          continue
        ours = rates.pop("ours")
        if what == "forward":
          rates["a dense matmul"] = rate
        for name, theirs in rates.items():
          yield _line(f"{what}_{T}_tokens_{load}", ours, theirs, name, "TFLOP/s")


def choices(key, T: int, E: int, X: int, exponent: float):
  """Random routing: (expert_TX int, weight_TX bf16 in [0, 1)).

  Each token draws X different experts; expert e has probability weight (e + 1) ** -exponent.
  """
  keys = jax.random.split(key)
  popularity_1E = -exponent * jnp.log1p(jnp.arange(E, dtype=jnp.float32))[None]
  expert_TX = jax.lax.top_k(popularity_1E + jax.random.gumbel(keys[0], (T, E)), X)[1]
  return expert_TX, jax.random.uniform(keys[1], (T, X), jnp.bfloat16)


def peers() -> dict[str, Callable]:
  """Name -> function (x_ND, w_EDF, group_sizes_E) -> y_NF: XLA's, and tokamax's if installed."""
  found: dict[str, Callable] = {"jax.lax.ragged_dot": jax.lax.ragged_dot}
  if importlib.util.find_spec("tokamax"):
    import tokamax

    for name in ("xla", "triton", "mosaic"):
      found[f"tokamax {name}"] = functools.partial(tokamax.ragged_dot, implementation=name)
  return found


def chain(product: Callable, x_TD, up_EDF, down_EFD, expert_TX, weight_TX):
  """The usual routed MLP: sort, gather, product, relu², product, weights, scatter-add. Returns [T, D]."""
  (T, X), E = expert_TX.shape, up_EDF.shape[0]
  order_N = jnp.argsort(expert_TX.reshape(T * X), stable=True)
  sizes_E = jnp.bincount(expert_TX.reshape(T * X), length=E).astype(jnp.int32)
  h_NF = jnp.square(jax.nn.relu(product(x_TD[order_N // X], up_EDF, sizes_E)))
  y_ND = product(h_NF, down_EFD, sizes_E) * weight_TX.reshape(T * X)[order_N][:, None]
  return jnp.zeros_like(x_TD).at[order_N // X].add(y_ND)


def _value(product: Callable) -> Callable:
  return product


def _dx(product: Callable) -> Callable:
  return lambda x, w, sizes, dy: jax.vjp(lambda x: product(x, w, sizes), x)[1](dy)[0]


def _dw(product: Callable) -> Callable:
  return lambda x, w, sizes, dy: jax.vjp(lambda w: product(x, w, sizes), w)[1](dy)[0]


def _mlp_gradients(mlp: Callable) -> Callable:
  """The gradients of x, both matrices and the weights, with the result itself as the cotangent."""

  def gradients(x_TD, up_EDF, down_EFD, expert_TX, weight_TX):
    y, back = jax.vjp(lambda x, u, d, w: mlp(x, u, d, expert_TX, w), x_TD, up_EDF, down_EFD, weight_TX)
    return back(y)

  return gradients


def _rates(forms: dict[str, Callable], args: tuple, work: float) -> dict[str, float]:
  """Name -> `work` per second of the best run. A peer that fails is left out and reported on stderr."""
  compiled, best = {}, {}
  for name, form in forms.items():
    try:
      compiled[name] = jax.jit(form).lower(*args).compile()
      jax.block_until_ready(compiled[name](*args))  # Warm-up.
    except Exception as error:  # Any failure of a peer: the others are still compared.
      if name == "ours":
        raise
      print(f"{name} does not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
      compiled.pop(name, None)
  for _ in range(REPEATS):
    for name, act in compiled.items():
      best[name] = min(best.get(name, float("inf")), seconds_of(lambda act=act: act(*args)))
  return {name: work / seconds for name, seconds in best.items()}


def seconds_of(act: Callable[[], object]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(act())
  return time.perf_counter() - began


def _line(case: str, ours: float, theirs: float, peer_name: str, unit: str) -> dict:
  return dict(case=case, ours=ours, peer=theirs, peer_name=peer_name, unit=unit, ratio=ours / theirs)
