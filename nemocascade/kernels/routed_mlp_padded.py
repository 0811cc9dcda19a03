"""The routed MLP for CPUs: a batched product with equal rows per expert, and a loop over the excess rows.

The batched product copies no matrix. The number of excess rows is known only at run time: the loop has one
iteration per block of them, so that no row is dropped.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np

from nemocascade.kernels import product as products
from nemocascade.kernels.groups import group_tiles, row_experts
from nemocascade.kernels.routed_matmul_blocked import choose_block
from nemocascade.kernels.routed_mlp_sorted import backward_rows, forward_rows


def capacity(N: int, E: int) -> int:
  """Rows per expert in the batched product, a multiple of 8.

  It is two standard deviations above the mean; random loads seldom exceed it.
  """
  mean = N / E
  return -8 * (-math.ceil(mean + 2 * math.sqrt(mean)) // 8)


def excess_rows(C: int, N: int, E: int) -> int:
  """Rows per iteration of the loop over the excess rows.

  XLA on the CPU sums an fp32 product of 56 rows or more in another order than one of fewer rows. C and the result lie
  on the same side, so that a row has the same bits in a slot and beyond, whatever other rows choose.
  """
  return C if C < 64 else max(64, choose_block(N, E))


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
ONE = np.zeros(2, np.int32)  # Stands for the bounds of one group; they are ignored.


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
    (choice_S: the choice in a slot, inside_S: whether the slot is used, place_TX: a choice's slot, or S,
    beyond_TX: where a choice without a slot is in order_N, or at least N + S).
  """
  E, N = bounds.shape[0] - 1, order_N.shape[0]
  rank_C, n_N = jnp.arange(C, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)
  inside_S = (rank_C[None] < (bounds[1:] - bounds[:-1])[:, None]).reshape(-1)
  choice_S = order_N[jnp.minimum(bounds[:-1, None] + rank_C[None], N - 1).reshape(-1)]
  expert_N, has_N = row_experts(bounds, N)
  rank_N = n_N - bounds[expert_N]
  place_N = jnp.where(has_N & (rank_N < C), expert_N * C + rank_N, E * C)
  beyond_N = jnp.where(has_N & (rank_N >= C), n_N, N + E * C)
  of_choice = lambda a_N: jnp.zeros_like(order_N).at[order_N].set(a_N, unique_indices=True).reshape(-1, X)
  return choice_S, inside_S, of_choice(place_N), of_choice(beyond_N)


def _beyond(order_N, bounds, C: int, block: int):
  """Choices after each expert's first C: (number of blocks, v -> (expert, start, choice_B, inside_B) of block v).

  The block has the choices order_N[start + i] where inside_B.
  """
  N, last_E = order_N.shape[0], bounds[1:]
  group_V, start_V, end_V = group_tiles(jnp.minimum(bounds[:-1] + C, last_E), last_E, N, block)

  def of(v):
    n_B = start_V[v] + jnp.arange(block, dtype=jnp.int32)
    return group_V[v], start_V[v], order_N[jnp.minimum(n_B, N - 1)], n_B < end_V[v]

  return jnp.sum(start_V < end_V, dtype=jnp.int32), of


def _loop(count, body, start):
  """Runs carry = body(v, carry) for v = 0 .. count - 1."""
  tick = lambda carry: (carry[0] + 1, body(*carry))
  # count * 0 has the type of count, which varies over devices inside shard_map.
  return jax.lax.while_loop(lambda carry: carry[0] < count, tick, (count * 0, start))[1]


def _forward(x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, C, block):
  X, flat_N = weight_TX.shape[1], weight_TX.reshape(-1)
  choice_S, inside_S, place_TX, beyond_TX = _equal_groups(order_N, bounds, X, C)
  weight_S = jnp.where(inside_S, flat_N[choice_S], 0)
  y_SD, a_SF = forward_rows(x_TD[choice_S // X], up_EDF, down_EFD, weight_S, bounds, EQUAL, None, False)
  count, of = _beyond(order_N, bounds, C, block)

  def add(v, carry):
    beyond_ND, rows = carry
    e, start, choice_B, inside_B = of(v)
    one = x_TD[choice_B // X], up_EDF[e][None], down_EFD[e][None], flat_N[choice_B], ONE
    y_BD, _ = forward_rows(*one, EQUAL, None, False)
    return _put(beyond_ND, y_BD, start), rows + jnp.sum(inside_B, dtype=jnp.int32)

  beyond_ND, rows = _loop(count, add, (_room(x_TD, order_N, block), jnp.sum(inside_S, dtype=jnp.int32)))
  y_TD = _sum_of_choices((y_SD, place_TX), (beyond_ND, beyond_TX))
  return (y_TD, rows), (x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, a_SF)


def _sum_of_choices(*parts):
  """routed_mlp_sorted.gathered_sum, choice by choice: XLA on CPUs then writes no array with all choices' rows."""
  rows = lambda y_ND, place_T: y_ND.at[place_T].get(mode="fill", fill_value=0).astype(jnp.float32)
  X = parts[0][1].shape[1]
  return sum(rows(y_ND, place_TX[:, x]) for x in range(X) for y_ND, place_TX in parts).astype(parts[0][0].dtype)


def _room(x_TD, order_N, block: int):
  """Zeros for the rows beyond the slots. The last block may begin at the last row."""
  # The zeros have the type of x, which varies over devices inside shard_map.
  return jnp.zeros((order_N.shape[0] + block, x_TD.shape[1]), x_TD.dtype) + 0 * x_TD[:1]


def _put(beyond_ND, y_BD, start):
  """Rows after the end of a block's expert are not read, or are overwritten by the next block."""
  return jax.lax.dynamic_update_slice_in_dim(beyond_ND, y_BD, start, axis=0)


def _backward(C, block, saved, cotangents):
  """A row's arithmetic is the same in a slot and beyond the slots, so that it does not depend on other rows."""
  dy_TD, _ = cotangents
  x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, a_SF = saved
  (T, X), flat_N = weight_TX.shape, weight_TX.reshape(-1)
  choice_S, inside_S, place_TX, beyond_TX = _equal_groups(order_N, bounds, X, C)
  token_S, weight_S = choice_S // X, jnp.where(inside_S, flat_N[choice_S], 0)
  rows = x_TD[token_S], up_EDF, down_EFD, weight_S, bounds, a_SF, dy_TD[token_S]
  dx_SD, *grads, dweight_S = backward_rows(*rows, EQUAL, None, False)
  dweight_N = dweight_S.at[place_TX.reshape(-1)].get(mode="fill", fill_value=0)
  count, of = _beyond(order_N, bounds, C, block)

  def add(v, carry):
    beyond_ND, dup_EDF, ddown_EFD, dweight_N = carry
    e, start, choice_B, inside_B = of(v)
    x_BD, dy_BD = x_TD[choice_B // X], jnp.where(inside_B[:, None], dy_TD[choice_B // X], 0)
    one = x_BD, up_EDF[e][None], down_EFD[e][None], flat_N[choice_B], ONE
    _, a_BF = forward_rows(*one, EQUAL, None, False)
    dx_BD, dup_1DF, ddown_1FD, dweight_B = backward_rows(*one, a_BF, dy_BD, EQUAL, None, False)
    return (
      _put(beyond_ND, dx_BD, start), dup_EDF.at[e].add(dup_1DF[0]), ddown_EFD.at[e].add(ddown_1FD[0]),
      dweight_N.at[jnp.where(inside_B, choice_B, T * X)].add(dweight_B, mode="drop"),
    )  # fmt: skip

  beyond_ND, dup_EDF, ddown_EFD, dweight_N = _loop(count, add, (_room(x_TD, order_N, block), *grads, dweight_N))
  dx_TD = _sum_of_choices((dx_SD, place_TX), (beyond_ND, beyond_TX))
  return dx_TD, dup_EDF, ddown_EFD, dweight_N.reshape(T, X), None, None


mlp.defvjp(_forward, _backward)
