"""Arithmetic on packed rows: starts, positions, masked sums with their counts."""

import jax
import jax.numpy as jnp


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
  """bool [B, T]: true on the first token of every document (and of every run of padding)."""
  before_BT = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return segment_ids_BT != before_BT


def positions(segment_ids_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: how many tokens of its own document stand before a token."""
  place_BT = jnp.broadcast_to(
    jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None], segment_ids_BT.shape
  )
  start_BT = jnp.where(segment_starts(segment_ids_BT), place_BT, 0)
  return place_BT - jax.lax.cummax(start_BT, axis=1)


def document_mean(x_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """On every token the mean of x where mask over its document; 0 where nothing is masked in.

  x, and so the result, is [B, T] or has more axes behind.
  """

  def of_row(x_T, mask_T, segment_ids_T):
    sums = lambda a_T: jax.ops.segment_sum(a_T, segment_ids_T, num_segments=len(x_T) + 1)  # noqa: E731
    wide = lambda a_T: a_T.reshape(a_T.shape + (1,) * (x_T.ndim - 1))  # noqa: E731
    total, count = sums(jnp.where(wide(mask_T), x_T, 0.0)), sums(mask_T.astype(jnp.float32))
    return (total / wide(jnp.maximum(count, 1.0)))[segment_ids_T]

  return jax.vmap(of_row)(x_BT, mask_BT, segment_ids_BT)


def masked_sum(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum of x where mask, count of mask), both fp32 scalars.

  Masks by choosing, not by multiplying: a NaN in an unwanted place does no harm.
  """
  total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
  return total, jnp.sum(mask, dtype=jnp.float32)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of x where mask; 0 where nothing is. For metrics: losses keep (sum, count)."""
  total, count = masked_sum(x, mask)
  return total / jnp.maximum(count, 1.0)
