"""Which blocks of keys a block of queries meets in causal attention within documents."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # Score of a pair that may not see each other.


def document_starts(segment_ids_BT, earlier_BS=None):
  """int32 [B, T]: index of the first key that each query may see, among S earlier keys and the row's T.

  The first document of a row also sees the earlier keys of its number. Padding (segment 0) sees only itself.

  Args:
    earlier_BS: int32, documents of the earlier keys, -1 where there is none; None for no earlier keys.
  """
  T, earlier, first_B1 = segment_ids_BT.shape[1], 0, 0
  if earlier_BS is not None and (earlier := earlier_BS.shape[1]):
    own_BS = earlier_BS == segment_ids_BT[:, :1]
    first_B1 = jnp.where(jnp.any(own_BS, axis=1), jnp.argmax(own_BS, axis=1), earlier)[:, None]
  t_T = jnp.arange(T, dtype=jnp.int32)[None]
  begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
  start_BT = jax.lax.cummax(jnp.where(begins_BT, t_T, 0), axis=1)
  start_BT = jnp.where(start_BT > 0, start_BT + earlier, first_B1)
  return jnp.where(segment_ids_BT > 0, start_BT, t_T + earlier)


def first_blocks(start_BT, block: int):
  """int32 [B, T / block]: the first block of keys that any query of each block of queries sees."""
  B, T = start_BT.shape
  return jnp.min(start_BT.reshape(B, T // block, block), axis=2) // block


def gaps(ids_BS):
  """int32 [B, 2]: begin and end of the places without a key (-1) behind the first key of each row.

  They are consecutive: what a cache has room for. Without any, begin is S and end is 0.
  """
  S, is_key_BS = ids_BS.shape[1], ids_BS >= 0
  missing_BS = ~is_key_BS & (jax.lax.cummax(is_key_BS.astype(jnp.int32), axis=1) > 0)
  s_1S = jnp.arange(S, dtype=jnp.int32)[None]
  begin_B, end_B = jnp.where(missing_BS, s_1S, S).min(axis=1), jnp.where(missing_BS, s_1S + 1, 0).max(axis=1)
  return jnp.stack([begin_B, end_B], axis=1)


def blocks_touched(segment_ids_BT, block: int):
  """int32 [B]: the pairs of blocks (queries, keys) that attention computes in each row of T tokens."""
  T = segment_ids_BT.shape[1]
  segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, -T % block)))
  first_BN = first_blocks(document_starts(segment_ids_BT), block)
  return jnp.sum(jnp.arange(1, first_BN.shape[1] + 1)[None] - first_BN, axis=1)


def aligned(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, block: int):
  """Pads queries and keys to whole blocks, so that they meet on the diagonal.

  Args:
    segment_ids_BT: int32, documents of the T queries; 0 is padding.
    segment_ids_BS: documents of the S >= T keys, of which the last T are the queries' own tokens. Earlier keys
      that do not exist have -1. Keys of one document are consecutive.

  Returns:
    The five arrays, padded, and document_starts. Earlier keys are padded in front, all others behind.
  """
  T = q_BKRTH.shape[3]
  before = k_BKSH.shape[2] - T
  front, back = -before % block, -T % block
  q_BKRTH = jnp.pad(q_BKRTH, [(0, 0)] * 3 + [(0, back), (0, 0)])
  k_BKSH, v_BKSH = (jnp.pad(a, [(0, 0)] * 2 + [(front, back), (0, 0)]) for a in (k_BKSH, v_BKSH))
  ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, back)))
  ids_BS = jnp.pad(jnp.pad(segment_ids_BS, ((0, 0), (0, back))), ((0, 0), (front, 0)), constant_values=-1)
  return q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, document_starts(ids_BT, ids_BS[:, : before + front])
