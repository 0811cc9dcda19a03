"""Applies a per-token function to a whole batch, a chunk of tokens at a time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def over_wanted(
  fn: Callable, arrays: Sequence[jax.Array], wanted_BT: jax.Array, *, chunk: int = 2048
) -> tuple[jax.Array, ...]:
  """Calls fn(*arrays [N, ...]) -> tuple of [N, ...] on about `chunk` wanted tokens at a time.

  Args:
    fn: treats each token independently; it may close over other arrays, such as a head [D, V].
    arrays: [B, T, ...] each.
    wanted_BT: bool; tokens that are not wanted get 0.

  Returns:
    A tuple of [B, T, ...].

  The backward pass recomputes `fn` for each chunk, so that none of its residuals are saved. Wanted
  tokens are moved to the front of their rows, and columns without a wanted token are skipped, so that
  prompts cost nothing. Tokens stay in their row, so that a batch sharded by rows moves no token to
  another device.
  """
  B, T = wanted_BT.shape
  columns = max(1, min(T, chunk // B))
  place_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1)
  _, order_BT = jax.lax.sort((~wanted_BT, place_BT), dimension=1, num_keys=2)
  _, back_BT = jax.lax.sort((order_BT, place_BT), dimension=1, num_keys=1)
  like = lambda of_BT, a: of_BT.reshape(B, T, *[1] * (a.ndim - 2))

  def columns_first(a):  # [B, T, ...] -> [T // columns, B * columns, ...], wanted tokens first.
    a = jnp.take_along_axis(a, like(order_BT, a), axis=1)
    a = jnp.pad(a, [(0, 0), (0, -T % columns)] + [(0, 0)] * (a.ndim - 2))
    a = a.reshape(B, -1, columns, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0).reshape(a.shape[1], B * columns, *a.shape[3:])

  # Checkpoint outside `cond`; otherwise every chunk saves the residuals of its branch, the head included.
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
