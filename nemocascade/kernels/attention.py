"""Causal grouped-query attention within documents, without positions; for rows and for one token."""

import functools

import jax
import jax.numpy as jnp

from nemocascade.errors import unknown
from nemocascade.kernels.attention_blocked import attention_blocked
from nemocascade.kernels.attention_tpu import attention_tpu
from nemocascade.kernels.product import einsum, einsum_fp32

FORMS = ("definition", "parts", "blocked", "tpu")
BLOCK = 128  # Queries and keys of a block in the blocked form.
LONG = 512  # From this many tokens a row on, CPUs and TPUs skip blocks.
PARTS = 4  # The queries of a row are split into this many parts; a part reads only keys up to its end.
CACHE_BLOCK = 1_024  # Places of a key-value cache that a decoded token reads at a time.
QUERIES = 512  # A part with more queries computes this many rows of the score matrix at a time.


def attention_ref(q_BTKRH, k_BSKH, v_BSKH, segment_ids_BT):
  """The definition: softmax in fp32 over the token itself and the earlier tokens of its document.

  Args:
    q_BTKRH: R query heads for each of the K key-value heads.
    k_BSKH, v_BSKH: S = T keys and values.
    segment_ids_BT: int32, the document of each token.

  Returns:
    [B, T, K, R, H] of v's dtype.
  """
  T, H = q_BTKRH.shape[1], q_BTKRH.shape[-1]
  score_BKRTS = einsum("BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH).astype(jnp.float32) * H**-0.5
  see_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  see_BTS &= jnp.tri(T, dtype=bool)[None]
  score_BKRTS = jnp.where(see_BTS[:, None, None], score_BKRTS, -1e30)
  prob_BKRTS = jax.nn.softmax(score_BKRTS, axis=-1).astype(v_BSKH.dtype)
  return einsum("BKRTS,BSKH->BTKRH", prob_BKRTS, v_BSKH)


@jax.custom_vjp
def _attend(q_BKRTH, k_BKSH, v_BKSH, see_BTS):
  """Heads come before time, so that every product is a batched matmul of the last two axes."""
  return _weigh(_prob(q_BKRTH, k_BKSH, see_BTS), v_BKSH)


def _prob(q_BKRTH, k_BKSH, see_BTS):
  score_BKRTS = einsum_fp32("BKRTH,BKSH->BKRTS", q_BKRTH, k_BKSH)
  score_BKRTS *= q_BKRTH.shape[-1] ** -0.5
  return jax.nn.softmax(jnp.where(see_BTS[:, None, None], score_BKRTS, -1e30), axis=-1)


def _weigh(prob_BKRTS, v_BKSH):
  return einsum_fp32("BKRTS,BKSH->BKRTH", prob_BKRTS.astype(v_BKSH.dtype), v_BKSH).astype(v_BKSH.dtype)


def _forward(q_BKRTH, k_BKSH, v_BKSH, see_BTS):
  prob_BKRTS = _prob(q_BKRTH, k_BKSH, see_BTS)
  return _weigh(prob_BKRTS, v_BKSH), (q_BKRTH, k_BKSH, v_BKSH, prob_BKRTS)


def _backward(saved, dy_BKRTH):
  """Hand-written: it saves one array of the size of the scores, autodiff saves four."""
  q_BKRTH, k_BKSH, v_BKSH, prob_BKRTS = saved
  dprob_BKRTS = einsum_fp32("BKRTH,BKSH->BKRTS", dy_BKRTH, v_BKSH)
  mean_BKRT1 = jnp.sum(prob_BKRTS * dprob_BKRTS, axis=-1, keepdims=True)
  dscore_BKRTS = prob_BKRTS * (dprob_BKRTS - mean_BKRT1) * q_BKRTH.shape[-1] ** -0.5
  dscore_BKRTS = dscore_BKRTS.astype(q_BKRTH.dtype)
  dq_BKRTH = einsum_fp32("BKRTS,BKSH->BKRTH", dscore_BKRTS, k_BKSH)
  dk_BKSH = einsum_fp32("BKRTS,BKRTH->BKSH", dscore_BKRTS, q_BKRTH)
  dv_BKSH = einsum_fp32("BKRTS,BKRTH->BKSH", prob_BKRTS.astype(dy_BKRTH.dtype), dy_BKRTH)
  return *(d.astype(q_BKRTH.dtype) for d in (dq_BKRTH, dk_BKSH, dv_BKSH)), None


_attend.defvjp(_forward, _backward)


def attention(
  q_BTKRH, k_BTKH, v_BTKH, segment_ids_BT, *, before=None, form: str | None = None, parts=PARTS, queries=QUERIES,
  block: int | None = None, interpret: bool = False,
):  # fmt: skip
  """`attention_ref` in the form that is fastest on the platform.

  Args:
    before: (k_BKSH, v_BKSH, segment_ids_BS) of earlier tokens, -1 where there is none; those of a cache are
      `cached`. The first document of a row also sees the earlier tokens of its number.
    form: one of FORMS. By default, for rows of at least LONG tokens, "blocked" on CPUs and "tpu" on TPUs; else
      "parts".
      "parts" splits the queries; a part does not read the keys after its end. At most `queries` rows of the
      score matrix exist at a time: longer parts are computed in blocks, and the backward pass recomputes them.
      "blocked" and "tpu" skip the blocks of keys in which no query's document has a token.
    parts: number of parts.
    queries: rows of the score matrix in the form "parts".
    block: queries and keys of a block in the forms that skip blocks; by default BLOCK, or chosen from T on TPUs.
    interpret: whether to run the form "tpu" in the Pallas interpreter, on any platform.

  Raises:
    UserError: unknown form, or the form "definition" with a cache.
  """
  if form is not None and form not in FORMS[before is not None :]:
    raise unknown("form of attention", form, FORMS[before is not None :])
  if form == "definition":
    return attention_ref(q_BTKRH, k_BTKH, v_BTKH, segment_ids_BT)
  q_BKRTH = jnp.transpose(q_BTKRH, (0, 2, 3, 1, 4))
  k_BKSH, v_BKSH = (jnp.swapaxes(a, 1, 2) for a in (k_BTKH, v_BTKH))
  ids_BS = segment_ids_BT
  if before is not None:
    k_BKSH, v_BKSH, ids_BS = _after(before, k_BKSH, v_BKSH, segment_ids_BT)
  arrays = q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, ids_BS
  in_parts = functools.partial(_in_parts, parts=parts, queries=queries)
  blocked = functools.partial(attention_blocked, block=block or BLOCK)
  tpu = functools.partial(attention_tpu, block=block, interpret=interpret)
  if form is None and segment_ids_BT.shape[1] >= LONG:
    y_BKRTH = jax.lax.platform_dependent(*arrays, cpu=blocked, tpu=tpu, default=in_parts)
  else:
    y_BKRTH = dict(blocked=blocked, tpu=tpu).get(form or "", in_parts)(*arrays)
  return jnp.transpose(y_BKRTH, (0, 3, 1, 2, 4))


def cached(k_BKSH, v_BKSH, length_B, segment_ids_BT):
  """The argument `before` of `attention`: a row's first document continues the first length_B keys of a cache."""
  known_BS = jnp.arange(k_BKSH.shape[2])[None] < length_B[:, None]
  return k_BKSH, v_BKSH, jnp.where(known_BS, segment_ids_BT[:, :1], -1)


def _after(before, k_BKTH, v_BKTH, segment_ids_BT):
  """(k_BKSH, v_BKSH, segment_ids_BS) of earlier tokens and the row."""
  k_BKSH, v_BKSH, ids_BS = before
  join = lambda a, b: jnp.concatenate([a, b], axis=2)
  return join(k_BKSH, k_BKTH), join(v_BKSH, v_BKTH), jnp.concatenate([ids_BS, segment_ids_BT], axis=1)


def _in_parts(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, *, parts: int, queries: int):
  T, S = segment_ids_BT.shape[1], segment_ids_BS.shape[1] - segment_ids_BT.shape[1]
  size = -(-T // parts)
  y = []
  for first in range(0, T, size):
    end = min(first + size, T)
    y.append(
      _part(
        q_BKRTH[:, :, :, first:end], k_BKSH[:, :, : S + end], v_BKSH[:, :, : S + end],
        segment_ids_BS[:, : S + end], S + first, queries,
      )
    )  # fmt: skip
  return jnp.concatenate(y, axis=3)


def _part(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BS, first: int, queries: int):
  """Attention of the T last tokens to all first + T tokens; `first` is the index of the first query."""
  T = q_BKRTH.shape[3]

  def see(segment_ids_BT, place_T):
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BS[:, None, :]
    return same_BTS & (place_T[:, None] >= jnp.arange(first + T)[None])[None]

  if T <= queries:
    place_T = jnp.arange(first, first + T)
    return _attend(q_BKRTH, k_BKSH, v_BKSH, see(segment_ids_BS[:, first:], place_T))
  pad = -T % queries
  q_BKRTH = jnp.pad(q_BKRTH, [(0, 0)] * 3 + [(0, pad), (0, 0)])
  segment_ids_BT = jnp.pad(segment_ids_BS[:, first:], [(0, 0), (0, pad)], constant_values=-1)

  @jax.checkpoint
  def block(i):
    q = jax.lax.dynamic_slice_in_dim(q_BKRTH, i * queries, queries, axis=3)
    ids = jax.lax.dynamic_slice_in_dim(segment_ids_BT, i * queries, queries, axis=1)
    return _attend(q, k_BKSH, v_BKSH, see(ids, first + i * queries + jnp.arange(queries)))

  y = jax.lax.map(block, jnp.arange((T + pad) // queries))  # [blocks, B, K, R, queries, H]
  y = jnp.moveaxis(y, 0, 3)
  return y.reshape(*y.shape[:3], -1, y.shape[-1])[:, :, :, :T]


def decode_attention(q_BKRH, k_BKSH, v_BKSH, length_B, at=None, *, block: int = CACHE_BLOCK):
  """Attention of one query per row to the first length_B keys of its cache: [B, K, R, H] of v's dtype.

  Longer caches are read in blocks of `block` places, up to the longest row's end. A row's result has the same bits
  whatever the other rows' lengths are: blocks after its end change nothing.

  Args:
    at: None, or the index of the caches among several, [n, B, K, S, H].
  """
  (B, K, R, H), S = q_BKRH.shape, k_BKSH.shape[-2]

  def add(j, carry):
    """Adds block j to the maximum, the sum of weights and the weighted sum of values, as in flash attention."""
    max_BKR, sum_BKR, y_BKRH = carry
    first = jnp.minimum(j * block, S - block)  # The last block overlaps the one before it.
    of_block = lambda a_BKSH: _places(a_BKSH, at, first, block)
    place_S = first + jnp.arange(block)
    see_BS = (place_S >= j * block)[None] & (place_S[None] < length_B[:, None])
    score_BKRS, see_BKRS = _scores(q_BKRH, of_block(k_BKSH)), see_BS[:, None, None]
    new_BKR = jnp.maximum(max_BKR, jnp.max(jnp.where(see_BKRS, score_BKRS, -1e30), axis=-1))
    weight_BKRS = jnp.where(see_BKRS, jnp.exp(score_BKRS - new_BKR[..., None]), 0.0)
    kept_BKR = jnp.exp(max_BKR - new_BKR)
    more_BKRH = einsum_fp32("BKRS,BKSH->BKRH", weight_BKRS.astype(v_BKSH.dtype), of_block(v_BKSH))
    sum_BKR = sum_BKR * kept_BKR + jnp.sum(weight_BKRS, axis=-1)
    return new_BKR, sum_BKR, y_BKRH * kept_BKR[..., None] + more_BKRH

  if S > block:
    start = jnp.full((B, K, R), -1e30), jnp.zeros((B, K, R)), jnp.zeros((B, K, R, H))
    _, sum_BKR, y_BKRH = jax.lax.fori_loop(0, -(-jnp.max(length_B) // block), add, start)
    return (y_BKRH / sum_BKR[..., None]).astype(v_BKSH.dtype)
  k_BKSH, v_BKSH = (_places(a, at, 0, S) for a in (k_BKSH, v_BKSH))
  see_BS = jnp.arange(S)[None] < length_B[:, None]
  score_BKRS = jnp.where(see_BS[:, None, None], _scores(q_BKRH, k_BKSH), -1e30)
  prob_BKRS = jax.nn.softmax(score_BKRS, axis=-1).astype(v_BKSH.dtype)
  return einsum_fp32("BKRS,BKSH->BKRH", prob_BKRS, v_BKSH).astype(v_BKSH.dtype)


def _places(a_BKSH, at, first, count: int):
  """`count` places of a cache, or of that at index `at` of several."""
  if at is None:
    return jax.lax.dynamic_slice_in_dim(a_BKSH, first, count, axis=2)
  _, B, K, _, H = a_BKSH.shape
  return jax.lax.dynamic_slice(a_BKSH, (at, 0, 0, first, 0), (1, B, K, count, H))[0]


def _scores(q_BKRH, k_BKSH):
  return einsum_fp32("BKRH,BKSH->BKRS", q_BKRH, k_BKSH) * q_BKRH.shape[-1] ** -0.5
