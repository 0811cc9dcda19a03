"""Functions of single tokens over whole batches, a chunk of tokens at a time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def over_wanted(
  fn: Callable, arrays: Sequence[jax.Array], wanted_BT: jax.Array, *, chunk: int = 2048
) -> tuple[jax.Array, ...]:
  """fn(*arrays [N, ...]) -> a tuple of [N, ...], for about `chunk` wanted tokens at a time.

  Args:
    fn: of each token by itself; it may close over anything, a head of [D, V] say.
    arrays: [B, T, ...] each.
    wanted_BT: bool; the others get 0.

  What `fn` makes of a chunk is made again in the backward pass, and nothing of it is kept between.
  Wanted tokens move to the front of their rows, and columns that no row wants are skipped: prompts
  cost nothing. Rows stay whole, so that a batch that is sharded by rows moves no token to another
  device.
  """
  B, T = wanted_BT.shape
  columns = max(1, min(T, chunk // B))
  place_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1)
  _, order_BT = jax.lax.sort((~wanted_BT, place_BT), dimension=1, num_keys=2)
  _, back_BT = jax.lax.sort((order_BT, place_BT), dimension=1, num_keys=1)
  like = lambda of_BT, a: of_BT.reshape(B, T, *[1] * (a.ndim - 2))

  def columns_first(a):  # [B, T, ...] -> [T // columns, B * columns, ...], wanted ones first.
    a = jnp.take_along_axis(a, like(order_BT, a), axis=1)
    a = jnp.pad(a, [(0, 0), (0, -T % columns)] + [(0, 0)] * (a.ndim - 2))
    a = a.reshape(B, -1, columns, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0).reshape(a.shape[1], B * columns, *a.shape[3:])

  # Around the choice and not inside: what a branch keeps, a head too, would be kept for every chunk.
  @jax.checkpoint
  def of_chunk(wanted_N, *arrays):
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *arrays))
    return jax.lax.cond(jnp.any(wanted_N), lambda: fn(*arrays), lambda: nothing)

  def rows_first(a):
    a = jnp.moveaxis(a.reshape(-1, B, columns, *a.shape[2:]), 0, 1).reshape(B, -1, *a.shape[2:])
    a = jnp.take_along_axis(a, like(back_BT, a), axis=1)
    return jnp.where(like(wanted_BT, a), a, 0)

  found = jax.lax.map(lambda xs: of_chunk(*xs), tuple(map(columns_first, (wanted_BT, *arrays))))
  return tuple(map(rows_first, found))
