"""The routed MLP of sorted rows on TPUs: activation and weights are done where products end."""

import functools

import jax
import jax.numpy as jnp

from nemocascade.kernels.routed_matmul_tpu import Tile, choose_tile, product, weight_product


def _relu2(h):
  return jnp.square(jnp.maximum(h, 0.0))


def _weigh(y, weight):
  return y * weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def mlp(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, tile: Tile | None, interpret: bool):
  """y[t] = sum_x weight[n] * down[e]( relu(up[e] x[t])^2 ), n = place[t, x], e the expert of row n.

  Args:
    weight_N, token_N: the weight and the token of each sorted row; fp32, int32.
    place_TX: where a token's rows are among the sorted ones, the inverse of token_N.
    bounds: [E + 1], each expert's rows (groups.py); rows that are nobody's count as 0.

  Returns:
    [T, D] of x's dtype, summed in fp32.
  """
  return _forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, tile, interpret)[0]


def _gathered_sum(y_ND, place_TX):
  """Reading a token's rows is cheaper than adding to a token: nothing is read to be written."""
  return jnp.sum(y_ND[place_TX], axis=1, dtype=jnp.float32).astype(y_ND.dtype)


def _products(tile, interpret, up_EDF, N):
  E, D, F = up_EDF.shape
  into_F, into_D = (tile or choose_tile(N, E, *shape) for shape in ((D, F), (F, D)))
  return (
    functools.partial(product, tile=into_F, interpret=interpret),
    functools.partial(product, tile=into_D, interpret=interpret),
  )


def _forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, tile, interpret):
  into_F, into_D = _products(tile, interpret, up_EDF, token_N.shape[0])
  a_NF = into_F(x_TD[token_N], up_EDF, bounds, finish=_relu2)
  weight_N1 = weight_N[:, None].astype(jnp.float32)
  y_ND = into_D(a_NF, down_EFD, bounds, finish=_weigh, extras=(weight_N1,))
  saved = x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF
  return _gathered_sum(y_ND, place_TX), saved


def _backward(tile, interpret, saved, dy_TD):
  """Of what is as wide as F only the activation is kept; its root is the relu."""
  x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF = saved
  N = token_N.shape[0]
  into_F, into_D = _products(tile, interpret, up_EDF, N)
  weights = functools.partial(weight_product, bounds=bounds, interpret=interpret)
  wide, deep = (tile or choose_tile(N, up_EDF.shape[0], *shape) for shape in (down_EFD.shape[1:], up_EDF.shape[1:]))
  dy_ND, weight_N1 = dy_TD[token_N], weight_N[:, None].astype(jnp.float32)
  da_NF = into_F(dy_ND, down_EFD, bounds, transpose=True).astype(jnp.float32)  # Without the weight.
  a32_NF = a_NF.astype(jnp.float32)
  dweight_N = jnp.sum(a32_NF * da_NF, axis=-1)
  dh_NF = (weight_N1 * da_NF * 2.0 * jnp.sqrt(a32_NF)).astype(x_TD.dtype)
  ddown_EFD = weights((weight_N1 * a32_NF).astype(x_TD.dtype), dy_ND, tile=wide, dtype=down_EFD.dtype)
  dup_EDF = weights(x_TD[token_N], dh_NF, tile=deep, dtype=up_EDF.dtype)
  dx_TD = _gathered_sum(into_D(dh_NF, up_EDF, bounds, transpose=True), place_TX)
  return dx_TD, dup_EDF, ddown_EFD, dweight_N.astype(weight_N.dtype), None, None, None


mlp.defvjp(_forward, _backward)
