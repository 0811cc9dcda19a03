"""Functions of packed rows: starts and positions of documents, means over documents, masked sums."""

import jax
import jax.numpy as jnp

from nemocascade.types import Array


def segment_starts(segment_ids_BT: jax.Array, edge_B1: jax.Array | None = None) -> jax.Array:
  """bool [B, T]: true on the first token of every document, and on the first of every run of padding.

  Args:
    edge_B1: the document of the token before the row, which the row may continue; None if there is none.
  """
  edge_B1 = jnp.full_like(segment_ids_BT[:, :1], -1) if edge_B1 is None else edge_B1
  return segment_ids_BT != jnp.concatenate([edge_B1, segment_ids_BT[:, :-1]], axis=1)


def positions(segment_ids_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: the position of each token in its document, from 0."""
  place_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None], segment_ids_BT.shape)
  start_BT = jnp.where(segment_starts(segment_ids_BT), place_BT, 0)
  return place_BT - jax.lax.cummax(start_BT, axis=1)


def counted_before(mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """int32 [B, T]: how many true entries of the mask come before each token in its document."""
  before_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - mask_BT
  start_BT = jnp.where(segment_starts(segment_ids_BT), before_BT, 0)
  return before_BT - jax.lax.cummax(start_BT, axis=1)


def document_mean(x_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """At each token, the mean of x over the tokens of its document where mask is true; 0 if there are none.

  x and the result have shape [B, T, ...]; x must be a float.
  """

  def of_row(x_T, mask_T, segment_ids_T):
    sums = lambda a_T: jax.ops.segment_sum(a_T, segment_ids_T, num_segments=len(x_T) + 1)  # noqa: E731
    wide = lambda a_T: a_T.reshape(a_T.shape + (1,) * (x_T.ndim - 1))  # noqa: E731
    total, count = sums(jnp.where(wide(mask_T), x_T, 0.0)), sums(mask_T.astype(jnp.float32))
    return (total / wide(jnp.maximum(count, 1.0)))[segment_ids_T]

  return jax.vmap(of_row)(x_BT, mask_BT, segment_ids_BT)


def masked_sum(x: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
  """(sum of x where mask, number of true entries of mask), both fp32 scalars.

  It masks with `where` and does not multiply, so a NaN outside the mask does not spread.
  """
  total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
  return total, jnp.sum(mask, dtype=jnp.float32)


def masked_mean(x: Array, mask: Array) -> jax.Array:
  """Mean of x where mask is true; 0 if it is nowhere true. For metrics only: losses keep (sum, count)."""
  total, count = masked_sum(x, mask)
  return total / jnp.maximum(count, 1.0)
