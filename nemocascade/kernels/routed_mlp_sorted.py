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
  return _forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels, tile, interpret)[0]


def gathered_sum(*parts):
  """Sums the rows of each token in the order of its choices, in fp32.

  A gather is cheaper than a scatter-add, which also reads what it updates.

  Args:
    parts: pairs (y_ND, place_TX): the row of each choice, or N if it is in another part.
  """
  found = [y_ND.at[place_TX].get(mode="fill", fill_value=0) for y_ND, place_TX in parts]
  return jnp.sum(functools.reduce(jnp.add, found), axis=1, dtype=jnp.float32).astype(found[0].dtype)


def forward_rows(x_ND, up_EDF, down_EFD, weight_N, bounds, kernels, tile, interpret):
  """(y_ND, activation_NF) of rows sorted by expert."""
  product = functools.partial(kernels.product, tile=tile, interpret=interpret)
  a_NF = product(x_ND, up_EDF, bounds, finish=relu2)
  weight_N1 = weight_N[:, None].astype(jnp.float32)
  return product(a_NF, down_EFD, bounds, finish=weigh, extras=(weight_N1,)), a_NF


def backward_rows(x_ND, up_EDF, down_EFD, weight_N, bounds, a_NF, dy_ND, kernels, tile, interpret):
  """The gradients (dx_ND, dup_EDF, ddown_EFD, dweight_N) of forward_rows' y.

  The activation is relu(h)^2, whose square root is relu(h), so that h is not needed.
  """
  product = functools.partial(kernels.product, tile=tile, interpret=interpret)
  weights = functools.partial(kernels.weight_product, bounds=bounds, tile=tile, interpret=interpret)
  weight_N1 = weight_N[:, None].astype(jnp.float32)
  da_NF = product(dy_ND, down_EFD, bounds, transpose=True).astype(jnp.float32)  # Not yet times the weight.
  a32_NF = a_NF.astype(jnp.float32)
  dweight_N = jnp.sum(a32_NF * da_NF, axis=-1)
  dh_NF = (weight_N1 * da_NF * 2.0 * jnp.sqrt(a32_NF)).astype(x_ND.dtype)
  ddown_EFD = weights((weight_N1 * a32_NF).astype(x_ND.dtype), dy_ND, dtype=down_EFD.dtype)
  dup_EDF = weights(x_ND, dh_NF, dtype=up_EDF.dtype)
  return product(dh_NF, up_EDF, bounds, transpose=True), dup_EDF, ddown_EFD, dweight_N.astype(weight_N.dtype)


def _forward(x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, kernels, tile, interpret):
  y_ND, a_NF = forward_rows(x_TD[token_N], up_EDF, down_EFD, weight_N, bounds, kernels, tile, interpret)
  return gathered_sum((y_ND, place_TX)), (x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF)


def _backward(kernels, tile, interpret, saved, dy_TD):
  """Only one saved array has width F."""
  x_TD, up_EDF, down_EFD, weight_N, token_N, place_TX, bounds, a_NF = saved
  rows = x_TD[token_N], up_EDF, down_EFD, weight_N, bounds, a_NF, dy_TD[token_N]
  dx_ND, *grads = backward_rows(*rows, kernels, tile, interpret)
  return gathered_sum((dx_ND, place_TX)), *grads, None, None, None


mlp.defvjp(_forward, _backward)
