"""The routed MLP for CPUs: a batched product with equal rows per expert, and a loop over the excess rows.

The batched product copies no matrix. The number of excess rows is known only at run time: the loop has one
iteration per block of them, so that no row is dropped.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp

from nemocascade.kernels import product as products
from nemocascade.kernels import routed_mlp_sorted
from nemocascade.kernels.groups import group_tiles, row_experts
from nemocascade.kernels.routed_mlp_sorted import relu2


def capacity(N: int, E: int) -> int:
  """Rows per expert in the batched product, a multiple of 8.

  It is two standard deviations above the mean; random loads seldom exceed it.
  """
  mean = N / E
  return -8 * (-math.ceil(mean + 2 * math.sqrt(mean)) // 8)


def product(x_SD, w, bounds, *, transpose=False, finish=None, extras=(), tile=None, interpret=False):
  """x[s] @ w[e] with e = s // (S / E): groups of equal size; `bounds` is ignored."""
  del bounds, tile, interpret
  x_ECD = x_SD.reshape(w.shape[0], -1, x_SD.shape[1])
  form = "ECD,EFD->ECF" if transpose else "ECD,EDF->ECF"
  y_ECF = products.einsum_fp32(form, x_ECD, w)
  y_SF = y_ECF.reshape(x_SD.shape[0], -1)
  return (finish(y_SF, *extras) if finish else y_SF).astype(x_SD.dtype)


def weight_product(x_SD, dy_SF, bounds, *, dtype, tile=None, interpret=False):
  """dw[e] = x[rows]^T @ dy[rows] over the rows of each expert, S / E each: [E, D, F] of `dtype`."""
  del tile, interpret
  x_ECD, dy_ECF = (a.reshape(bounds.shape[0] - 1, -1, a.shape[1]) for a in (x_SD, dy_SF))
  return jax.vmap(lambda x, dy: products.weight_product(x, dy, dtype))(x_ECD, dy_ECF)


EQUAL = types.SimpleNamespace(product=product, weight_product=weight_product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def mlp(x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, C: int, block: int):
  """(y[t] = sum_x weight[t, x] * down[e]( relu(up[e] x[t])^2 ), the number of choices processed, int32).

  Args:
    order_N: int32, the choices t * X + x sorted by expert.
    bounds: int32 [E + 1], the range of each expert in order_N.
    C: rows per expert in the batched product.
    block: rows per iteration of the loop.
  """
  return _forward(x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, C, block)[0]


def _equal_groups(order_N, bounds, X: int, C: int):
  """The first C choices of each expert, in S = E * C slots.

  Returns:
    (choice_S: the choice in a slot, inside_S: whether the slot is used, place_TX: a choice's slot, or S).
  """
  E, N = bounds.shape[0] - 1, order_N.shape[0]
  rank_C = jnp.arange(C, dtype=jnp.int32)
  inside_S = (rank_C[None] < (bounds[1:] - bounds[:-1])[:, None]).reshape(-1)
  choice_S = order_N[jnp.minimum(bounds[:-1, None] + rank_C[None], N - 1).reshape(-1)]
  expert_N, has_N = row_experts(bounds, N)
  rank_N = jnp.arange(N, dtype=jnp.int32) - bounds[expert_N]
  place_N = jnp.where(has_N & (rank_N < C), expert_N * C + rank_N, E * C)
  place_TX = jnp.zeros_like(order_N).at[order_N].set(place_N, unique_indices=True).reshape(-1, X)
  return choice_S, inside_S, place_TX


def _beyond(order_N, bounds, C: int, block: int):
  """Choices after each expert's first C: (number of blocks, v -> (expert, choice_B, inside_B) of block v)."""
  N, last_E = order_N.shape[0], bounds[1:]
  group_V, start_V, end_V = group_tiles(jnp.minimum(bounds[:-1] + C, last_E), last_E, N, block)

  def of(v):
    n_B = start_V[v] + jnp.arange(block, dtype=jnp.int32)
    return group_V[v], order_N[jnp.minimum(n_B, N - 1)], n_B < end_V[v]

  return jnp.sum(start_V < end_V, dtype=jnp.int32), of


def _weighted(x_BD, up_DF, down_FD, weight_B):
  h_BF = relu2(products.einsum_fp32("BD,DF->BF", x_BD, up_DF)).astype(x_BD.dtype)
  y_BD = products.einsum_fp32("BF,FD->BD", h_BF, down_FD)
  return (y_BD * weight_B[:, None].astype(jnp.float32)).astype(x_BD.dtype)


def _loop(count, body, start):
  """Runs carry = body(v, carry) for v = 0 .. count - 1."""
  tick = lambda carry: (carry[0] + 1, body(*carry))
  # count * 0 has the type of count, which varies over devices inside shard_map.
  return jax.lax.while_loop(lambda carry: carry[0] < count, tick, (count * 0, start))[1]


def _forward(x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, C, block):
  (T, X), flat_N = weight_TX.shape, weight_TX.reshape(-1)
  choice_S, inside_S, place_TX = _equal_groups(order_N, bounds, X, C)
  y_TD, saved = routed_mlp_sorted.forward(
    x_TD, up_EDF, down_EFD, jnp.where(inside_S, flat_N[choice_S], 0), choice_S // X, place_TX, bounds,
    EQUAL, None, False,
  )  # fmt: skip
  count, of = _beyond(order_N, bounds, C, block)

  def add(v, carry):
    y_TD, rows = carry
    e, choice_B, inside_B = of(v)
    token_B = choice_B // X
    found_BD = _weighted(x_TD[token_B], up_EDF[e], down_EFD[e], flat_N[choice_B])
    y_TD = y_TD.at[jnp.where(inside_B, token_B, T)].add(found_BD, mode="drop")
    return y_TD, rows + jnp.sum(inside_B, dtype=jnp.int32)

  out = _loop(count, add, (y_TD, jnp.sum(inside_S, dtype=jnp.int32)))
  return out, (saved, weight_TX, order_N)


def _backward(C, block, saved, cotangents):
  dy_TD, _ = cotangents
  of_equal, weight_TX, order_N = saved
  x_TD, up_EDF, down_EFD, _, _, place_TX, bounds, _ = of_equal
  (T, X), flat_N = weight_TX.shape, weight_TX.reshape(-1)
  *grads, dweight_S, _, _, _ = routed_mlp_sorted.backward(EQUAL, None, False, of_equal, dy_TD)
  dweight_N = dweight_S.at[place_TX.reshape(-1)].get(mode="fill", fill_value=0)
  count, of = _beyond(order_N, bounds, C, block)

  def add(v, carry):
    dx_TD, dup_EDF, ddown_EFD, dweight_N = carry
    e, choice_B, inside_B = of(v)
    token_B = choice_B // X
    _, pull = jax.vjp(_weighted, x_TD[token_B], up_EDF[e], down_EFD[e], flat_N[choice_B])
    dx_BD, dup_DF, ddown_FD, dweight_B = pull(jnp.where(inside_B[:, None], dy_TD[token_B], 0))
    return (
      dx_TD.at[jnp.where(inside_B, token_B, T)].add(dx_BD, mode="drop"),
      dup_EDF.at[e].add(dup_DF), ddown_EFD.at[e].add(ddown_FD),
      dweight_N.at[jnp.where(inside_B, choice_B, T * X)].add(dweight_B, mode="drop"),
    )  # fmt: skip

  dx_TD, dup_EDF, ddown_EFD, dweight_N = _loop(count, add, (*grads, dweight_N))
  return dx_TD, dup_EDF, ddown_EFD, dweight_N.reshape(T, X), None, None


mlp.defvjp(_forward, _backward)
