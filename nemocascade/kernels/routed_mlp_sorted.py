"""The routed MLP of sorted rows on TPUs and GPUs: activation and weights are done where products end."""

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
  """y[t] = sum_x weight[n] * down[e]( relu(up[e] x[t])^2 ), n = place[t, x], e the expert of row n.

  Args:
    weight_N, token_N: the weight and the token of each sorted row; fp32, int32.
    place_TX: where a token's rows are among the sorted ones, the inverse of token_N.
    bounds: [E + 1], each expert's rows (groups.py); rows that are nobody's count as 0.
    kernels: routed_matmul_tpu or routed_matmul_gpu; tile: one of its tiles, by default chosen by it.

  Returns:
    [T, D] of x's dtype, summed in fp32.
  """
  return forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels, tile, interpret)[0]


def _gathered_sum(y_ND, place_TX):
  """Reading a token's rows is cheaper than adding to a token: nothing is read to be written."""
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
  """Of what is as wide as F only the activation is kept; its root is the relu."""
  x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF = saved
  product = functools.partial(kernels.product, tile=tile, interpret=interpret)
  weights = functools.partial(kernels.weight_product, bounds=bounds, tile=tile, interpret=interpret)
  dy_ND, weight_N1 = dy_TD[token_N], weight_N[:, None].astype(jnp.float32)
  da_NF = product(dy_ND, down_EFD, bounds, transpose=True).astype(jnp.float32)  # Without the weight.
  a32_NF = a_NF.astype(jnp.float32)
  dweight_N = jnp.sum(a32_NF * da_NF, axis=-1)
  dh_NF = (weight_N1 * da_NF * 2.0 * jnp.sqrt(a32_NF)).astype(x_TD.dtype)
  ddown_EFD = weights((weight_N1 * a32_NF).astype(x_TD.dtype), dy_ND, dtype=down_EFD.dtype)
  dup_EDF = weights(x_TD[token_N], dh_NF, dtype=up_EDF.dtype)
  dx_TD = _gathered_sum(product(dh_NF, up_EDF, bounds, transpose=True), place_TX)
  return dx_TD, dup_EDF, ddown_EFD, dweight_N.astype(weight_N.dtype), None, None, None


mlp.defvjp(forward, backward)
