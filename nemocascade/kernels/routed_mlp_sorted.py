"""The routed MLP for TPUs and GPUs, on sorted rows; activation and weights are fused into the products."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp


def relu2(h):
  return jnp.square(jnp.maximum(h, 0.0))


def weigh(y, weight):
  return y * weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def mlp(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels: ModuleType, tile, interpret: bool):
  """y[t] = sum_x weight[n] * down[e]( relu(up[e] x[t])^2 ) with n = place[t, x] and e the expert of row n.

  Args:
    weight_N, token_N: the weight and the token of each sorted row; fp32, int32.
    place_TX: int32, the place of each choice among the sorted rows.
    bounds: int32 [E + 1], the row range of each expert (groups.py); unassigned rows contribute 0.
    kernels: routed_matmul_tpu or routed_matmul_gpu.
    tile: a Tile of `kernels`, or None to choose one from the shapes.
    interpret: whether to run in the Pallas interpreter.

  Returns:
    [T, D] of x's dtype, summed in fp32.
  """
  return forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels, tile, interpret)[0]


def _gathered_sum(y_ND, place_TX):
  """Sums the rows of each token. A gather is cheaper than a scatter-add, which also reads what it updates."""
  y_TXD = y_ND.at[place_TX].get(mode="fill", fill_value=0)
  return jnp.sum(y_TXD, axis=1, dtype=jnp.float32).astype(y_ND.dtype)


def forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels, tile, interpret):
  product = functools.partial(kernels.product, tile=tile, interpret=interpret)
  a_NF = product(x_TD[token_N], up_EDF, bounds, finish=relu2)
  weight_N1 = weight_N[:, None].astype(jnp.float32)
  y_ND = product(a_NF, down_EFD, bounds, finish=weigh, extras=(weight_N1,))
  saved = x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF
  return _gathered_sum(y_ND, place_TX), saved


def backward(kernels, tile, interpret, saved, dy_TD):
  """Only one saved array has width F: the activation relu(h)^2, whose square root is relu(h)."""
  x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF = saved
  product = functools.partial(kernels.product, tile=tile, interpret=interpret)
  weights = functools.partial(kernels.weight_product, bounds=bounds, tile=tile, interpret=interpret)
  dy_ND, weight_N1 = dy_TD[token_N], weight_N[:, None].astype(jnp.float32)
  da_NF = product(dy_ND, down_EFD, bounds, transpose=True).astype(jnp.float32)  # Not yet times the weight.
  a32_NF = a_NF.astype(jnp.float32)
  dweight_N = jnp.sum(a32_NF * da_NF, axis=-1)
  dh_NF = (weight_N1 * da_NF * 2.0 * jnp.sqrt(a32_NF)).astype(x_TD.dtype)
  ddown_EFD = weights((weight_N1 * a32_NF).astype(x_TD.dtype), dy_ND, dtype=down_EFD.dtype)
  dup_EDF = weights(x_TD[token_N], dh_NF, dtype=up_EDF.dtype)
  dx_TD = _gathered_sum(product(dh_NF, up_EDF, bounds, transpose=True), place_TX)
  return dx_TD, dup_EDF, ddown_EFD, dweight_N.astype(weight_N.dtype), None, None, None


mlp.defvjp(forward, backward)
