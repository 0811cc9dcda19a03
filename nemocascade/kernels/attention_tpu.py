"""Causal attention within documents for TPUs, in Pallas; blocks of other documents are neither read nor multiplied.

The grid walks a list of visits (block of queries, block of keys), made from the segment ids before the kernel
and passed by scalar prefetch; its length is dynamic, so a skipped pair costs nothing. A query sees the keys from the
first one of its document up to itself, so that a mask compares places, and needs no documents of keys. Scores are kept
transposed, [keys, queries]: sums over keys then run along sublanes, and what belongs to a query is one row.
The softmax is online and the gradient recomputes probabilities (FlashAttention, arXiv 2205.14135).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nemocascade.kernels.attention_blocks import MASKED, aligned, first_blocks, gaps
from nemocascade.kernels.pallas_product import VMEM, like
from nemocascade.kernels.product import precision

LOG2E = 1.4426950408889634
# Kinds of visits: every query sees every key; some queries do not see some keys; the keys are those of the queries.
KINDS = ("whole", "border", "diagonal")
# Kernel -> keys and queries of a part of a visit, chosen by the schedules for v5p. The gradients' kernels divide only
# visits on the diagonal.
PARTS = {"attention_forward": (128, 256), "attention_dq": (256, 1024), "attention_dkv": (256, 1024)}
NO_KEY = -(1 << 30)  # Place of what is not a key: before the first key of any query.
UNSEEN = MASKED / 1024  # Highest score so far of a query that has seen no key: exp2(MASKED - UNSEEN) is 0.
MOST_VISITS = 1 << 17  # Entries of a list of visits, of 4 bytes each, in scalar memory.
# A visit is one int32: flags in the low bits, then the block of keys, then the block of queries of all rows.
FIRST, LAST, WHOLE, FLAG_BITS, KEY_BITS = 1, 2, 4, 3, 13
MOST_ROWS = 1 << (31 - KEY_BITS - FLAG_BITS)  # Blocks of queries that a visit can name.


def choose_block(T: int) -> int:
  """Queries and keys of a block for rows of T tokens."""
  return next((n for n in (128, 256, 512) if T <= 8 * n), 1024)


def attention_tpu(
  q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, *, block: int | None = None, interpret: bool = False
):
  """Attention of T queries to S >= T keys, of which the last T are the queries' own tokens.

  Args:
    segment_ids_BT, segment_ids_BS: as in attention_blocks.aligned.
    block: queries and keys of a block; by default chosen from T.
    interpret: whether to run in the Pallas interpreter, on any platform.

  Returns:
    [B, K, R, T, H] of v's dtype; at padding it is finite and means nothing.
  """
  T = q_BKRTH.shape[3]
  block = block or choose_block(T)
  *arrays, _, ids_BS, start_BT = aligned(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, block)
  arrays += [start_BT, gaps(ids_BS)]
  attend = functools.partial(_attend, block=block, interpret=interpret)
  B, N, M = start_BT.shape[0], start_BT.shape[1] // block, ids_BS.shape[1] // block
  rows = max(1, min(B, MOST_VISITS // _most_visits(N, M), MOST_ROWS // N))  # Rows whose visits fit in one list.
  while B % rows:
    rows -= 1
  if rows == B:
    return attend(*arrays)[:, :, :, :T]
  split = jax.tree.map(lambda a: a.reshape(B // rows, rows, *a.shape[1:]), arrays)
  y = jax.lax.map(lambda a: attend(*a), split)
  return y.reshape(B, *y.shape[2:])[:, :, :, :T]


def _most_visits(N: int, M: int) -> int:
  """Visits of a row with N blocks of queries behind M - N blocks of earlier keys, if all is one document."""
  return N * (M - N) + N * (N + 1) // 2


def _visits(start_BT, gap_B2, M: int, block: int, by_keys: bool):
  """(codes int32 [most visits], number of visits) in the order of queries, or of keys; M is a row's blocks of keys.

  FIRST and LAST mark the first and last visit of a block of queries (of keys, if `by_keys`). WHOLE marks a visit
  in which every query sees every key.
  """
  first_BN = first_blocks(start_BT, block)
  B, N = first_BN.shape
  n_N, m_M = jnp.arange(N, dtype=jnp.int32), jnp.arange(M, dtype=jnp.int32)
  if by_keys:
    # first_BN does not fall along a row, so the queries that see a block of keys are consecutive.
    begin_BX = jnp.broadcast_to(jnp.maximum(m_M - (M - N), 0)[None], (B, M))
    end_BX = jnp.sum(first_BN[:, None] <= m_M[None, :, None], axis=2, dtype=jnp.int32)
  else:
    begin_BX, end_BX = first_BN, jnp.broadcast_to((n_N + M - N + 1)[None], (B, N))
  count_X = jnp.maximum(end_BX - begin_BX, 0).reshape(-1)
  most = B * _most_visits(N, M)
  x_V = jnp.repeat(jnp.arange(count_X.size, dtype=jnp.int32), count_X, total_repeat_length=most)
  place_V = jnp.arange(most, dtype=jnp.int32) - (jnp.cumsum(count_X) - count_X)[x_V]
  other_V = begin_BX.reshape(-1)[x_V] + place_V
  b_V = x_V // (M if by_keys else N)
  n_V, m_V = (other_V, x_V % M) if by_keys else (x_V % N, other_V)
  row_V, key_V = jnp.clip(b_V * N + n_V, 0, B * N - 1), jnp.clip(m_V, 0, M - 1)
  seen_V = jnp.max(start_BT.reshape(B * N, block), axis=1)[row_V] <= key_V * block
  (begin_V, end_V) = gap_B2[b_V].T
  filled_V = ((key_V + 1) * block <= begin_V) | (key_V * block >= end_V)
  whole_V = seen_V & filled_V & (key_V < n_V + M - N)
  flags_V = FIRST * (place_V == 0) + LAST * (place_V == count_X[x_V] - 1) + WHOLE * whole_V
  return (row_V << (KEY_BITS + FLAG_BITS)) + (key_V << FLAG_BITS) + flags_V, jnp.sum(count_X)


def _row(code):
  return code >> (KEY_BITS + FLAG_BITS)


def _key(code):
  return (code >> FLAG_BITS) & ((1 << KEY_BITS) - 1)


def _is(code, flag: int):
  return (code & flag) != 0


def _dot(a, b, over: tuple[int, int]):
  """fp32 product of two matrices, summed over dimension over[0] of a and over[1] of b."""
  return jax.lax.dot_general(
    a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32, precision=precision(a.dtype)
  )


class Visit(NamedTuple):
  """A block of queries with a block of keys.

  Attributes:
    kind: one of KINDS.
    first: place of the first key in its row.
    gap: begin and end of the row's places without a key, of which some may be in the block.
  """

  kind: str
  first: jax.Array
  gap: tuple[jax.Array, jax.Array]


def _visit(code, gaps_ref, body, *, block: int, N: int, M: int):
  """Calls body(Visit) in the branch of the visit's kind."""
  row, key, whole = _row(code), _key(code), _is(code, WHOLE)
  b, on_diagonal = jax.lax.div(row, N), key == jax.lax.rem(row, N) + M - N
  gap = gaps_ref[2 * b], gaps_ref[2 * b + 1]
  for kind, when in zip(KINDS, (whole, ~whole & ~on_diagonal, on_diagonal), strict=True):
    pl.when(when)(functools.partial(body, Visit(kind, key * block, gap)))


def _parts(kernel: str, kind: str, block: int) -> list[tuple[slice, slice]]:
  """(keys, queries) of the parts of a visit. On the diagonal they leave out most pairs of a query and a later key."""
  if kernel != "attention_forward" and kind != "diagonal":
    return [(slice(0, block), slice(0, block))]
  keys, queries = (size if block % size == 0 else block for size in PARTS[kernel])
  starts = itertools.product(range(0, block, keys), range(0, block, queries))
  if kind != "diagonal":
    return [(slice(m, m + keys), slice(n, n + queries)) for m, n in starts]
  return [(slice(m, m + keys), slice(max(m, n), n + queries)) for m, n in starts if n + queries > m]


def diagonal_share(kernel: str, block: int) -> float:
  """The share of a block's pairs of a query and a key that a kernel computes on the diagonal."""
  parts = _parts(kernel, "diagonal", block)
  return sum((m.stop - m.start) * (n.stop - n.start) for m, n in parts) / block**2


def _products(visit: Visit, q_ref, k_ref, start_ref, keys: slice, queries: slice):
  """fp32 products_MN of keys and queries of a visit, MASKED where they may not see each other."""
  product_MN = _dot(k_ref[keys, :], q_ref[queries, :], (1, 1))
  if visit.kind == "whole":
    return product_MN
  m_MN, n_MN = (jax.lax.broadcasted_iota(jnp.int32, product_MN.shape, axis) for axis in (0, 1))
  before = visit.first + keys.start
  start_1N = start_ref[:, queries] - before
  if visit.kind == "diagonal":
    see_MN = m_MN >= start_1N
    if queries.start < keys.stop - 1:
      see_MN &= m_MN + (keys.start - queries.start) <= n_MN
    return jnp.where(see_MN, product_MN, MASKED)
  begin, end = (place - before for place in visit.gap)
  m_MN = jnp.where((m_MN >= begin) & (m_MN < end), NO_KEY, m_MN)
  return jnp.where(m_MN >= start_1N, product_MN, MASKED)


def _forward_kernel(codes, gaps_ref, q_ref, k_ref, v_ref, start_ref, y_ref, lse_ref, most, total, sums, *, N, M):
  code, block = codes[pl.program_id(1)], q_ref.shape[0]

  @pl.when(_is(code, FIRST))
  def _():
    most[...] = jnp.full_like(most, UNSEEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  bits = q_ref.shape[-1] ** -0.5 * LOG2E  # A product times this is a score in powers of two.

  def add(visit: Visit):
    parts = _parts("attention_forward", visit.kind, block)
    products = functools.partial(_products, visit, q_ref, k_ref, start_ref)

    def weigh(keys, queries, prob_MN, scale_1N):
      sums[:, queries] = sums[:, queries] * scale_1N + _dot(v_ref[keys, :], prob_MN, (0, 0))

    # While the softmax of a part runs, the products of the next one and the weighted sum of the last are computed.
    ahead = products(*parts[0])
    behind: tuple = ()
    for (keys, queries), after in zip(parts, [*parts[1:], None], strict=True):
      product_MN = ahead
      if after is not None:
        ahead = products(*after)
      if behind:
        weigh(*behind)
      old = most[:, queries]
      new = jnp.maximum(old, jnp.max(product_MN, axis=0, keepdims=True) * bits)
      prob_MN = jnp.exp2(product_MN * bits - new)
      scale_1N = jnp.exp2(old - new)
      most[:, queries] = new
      total[:, queries] = total[:, queries] * scale_1N + jnp.sum(prob_MN, axis=0, keepdims=True)
      behind = keys, queries, prob_MN.astype(v_ref.dtype), scale_1N
    weigh(*behind)

  _visit(code, gaps_ref, add, block=block, N=N, M=M)

  @pl.when(_is(code, LAST))
  def _():
    y_ref[...] = jnp.transpose(sums[...] / total[...]).astype(y_ref.dtype)
    lse_ref[...] = most[...] / LOG2E + jnp.log(total[...])


def _gradients(visit: Visit, refs, keys: slice, queries: slice):
  """(probabilities, gradients of the scores), [keys, queries], of q's dtype; masked pairs give 0."""
  q, k, v, start, dy, lse, mean = refs
  score_MN = _products(visit, q, k, start, keys, queries) * q.shape[-1] ** -0.5
  prob_MN = jnp.exp(score_MN - lse[:, queries])
  dprob_MN = _dot(v[keys, :], dy[queries, :], (1, 1))
  dscore_MN = prob_MN * (dprob_MN - mean[:, queries])
  return prob_MN.astype(q.dtype), dscore_MN.astype(q.dtype)


def _dq_kernel(codes, gaps_ref, *refs, N, M):
  *read, dq_ref, sums = refs
  code, (q, k, *_) = codes[pl.program_id(1)], read

  @pl.when(_is(code, FIRST))
  def _():
    sums[...] = jnp.zeros_like(sums)

  def add(visit: Visit):
    for keys, queries in _parts("attention_dq", visit.kind, q.shape[0]):
      _, dscore_MN = _gradients(visit, read, keys, queries)
      sums[queries, :] += _dot(dscore_MN, k[keys, :], (0, 0))

  _visit(code, gaps_ref, add, block=q.shape[0], N=N, M=M)

  @pl.when(_is(code, LAST))
  def _():
    dq_ref[...] = (sums[...] * q.shape[-1] ** -0.5).astype(dq_ref.dtype)


def _dkv_kernel(codes, gaps_ref, *refs, N, M):
  """The innermost grid dimension runs over the R query heads of a key-value head."""
  *read, dk_ref, dv_ref, dk, dv = refs
  code, r, (q, _, _, _, dy, *_) = codes[pl.program_id(1)], pl.program_id(2), read

  @pl.when(_is(code, FIRST) & (r == 0))
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def add(visit: Visit):
    for keys, queries in _parts("attention_dkv", visit.kind, q.shape[0]):
      prob_MN, dscore_MN = _gradients(visit, read, keys, queries)
      dk[keys, :] += _dot(dscore_MN, q[queries, :], (1, 0))
      dv[keys, :] += _dot(prob_MN, dy[queries, :], (1, 0))

  _visit(code, gaps_ref, add, block=q.shape[0], N=N, M=M)

  @pl.when(_is(code, LAST) & (r == pl.num_programs(2) - 1))
  def _():
    dk_ref[...] = (dk[...] * q.shape[-1] ** -0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _specs(block: int, N: int, H: int, R: int, inner: bool) -> dict[str, pl.BlockSpec]:
  """Block specs: of q and y, of k and v, of one number a query of all heads, and of one number a query and head.

  The grid is (query heads, visits), or if `inner` (key-value heads, visits, their R query heads).
  """

  def spec(shape, place):
    def index(head, v, *rest):
      code = rest[-2][v]
      # lax.div and lax.rem round towards 0, as integer division on a TPU does; the operands are not negative.
      own = (head * R + rest[0], head) if inner else (head, jax.lax.div(head, R))
      return place(jax.lax.div(_row(code), N), *own, jax.lax.rem(_row(code), N), _key(code))

    return pl.BlockSpec(shape, index)

  return dict(
    q=spec((None, None, block, H), lambda b, h, k, n, m: (b, h, n, 0)),
    kv=spec((None, None, block, H), lambda b, h, k, n, m: (b, k, m, 0)),
    start=spec((None, 1, block), lambda b, h, k, n, m: (b, 0, n)),
    of_q=spec((None, None, 1, block), lambda b, h, k, n, m: (b, h, 0, n)),
  )


def _call(kernel, name, visits, gap_B2, arrays, outputs, scratch, heads, interpret, inner=()):
  """Runs a kernel over (heads, visits, *inner). `arrays` and `outputs` are (array or its shape, block spec)."""
  codes, count = visits
  return pl.pallas_call(
    kernel, name=name, interpret=interpret,
    out_shape=[shape for shape, _ in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(heads, count, *inner), in_specs=[spec for _, spec in arrays],
      out_specs=[spec for _, spec in outputs], scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", *("arbitrary" for _ in inner)), vmem_limit_bytes=VMEM
    ),
  )(codes, gap_B2.reshape(-1), *(array for array, _ in arrays))  # fmt: skip


def _inputs(q_BKRTH, k_BKSH, v_BKSH, start_BT, block: int, inner: bool = False):
  """(block specs, [(array, its spec)] of what every kernel reads)."""
  B, K, R, T, H = q_BKRTH.shape
  specs = _specs(block, T // block, H, R, inner)
  q = q_BKRTH.reshape(B, K * R, T, H)
  named = dict(q=q, k=k_BKSH, v=v_BKSH, start=start_BT[:, None])
  return specs, [(array, specs["kv" if name in "kv" else name]) for name, array in named.items()]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q_BKRTH, k_BKSH, v_BKSH, start_BT, gap_B2, block, interpret):
  return _forward(q_BKRTH, k_BKSH, v_BKSH, start_BT, gap_B2, block, interpret)[0]


def _forward(q_BKRTH, k_BKSH, v_BKSH, start_BT, gap_B2, block, interpret):
  B, K, R, T, H = q_BKRTH.shape
  sizes = dict(N=T // block, M=k_BKSH.shape[2] // block)
  specs, read = _inputs(q_BKRTH, k_BKSH, v_BKSH, start_BT, block)
  y, lse = _call(
    functools.partial(_forward_kernel, **sizes), "attention_forward",
    _visits(start_BT, gap_B2, sizes["M"], block, by_keys=False), gap_B2, read,
    [
      (like(q_BKRTH, (B, K * R, T, H), v_BKSH.dtype), specs["q"]),
      (like(q_BKRTH, (B, K * R, 1, T), jnp.float32), specs["of_q"]),
    ],
    [(1, block), (1, block), (H, block)], K * R, interpret,
  )  # fmt: skip
  return y.reshape(q_BKRTH.shape), (q_BKRTH, k_BKSH, v_BKSH, start_BT, gap_B2, y, lse)


def _backward(block, interpret, saved, dy_BKRTH):
  q_BKRTH, k_BKSH, v_BKSH, start_BT, gap_B2, y, lse = saved
  _, K, R, T, H = q_BKRTH.shape
  sizes = dict(N=T // block, M=k_BKSH.shape[2] // block)
  dy = dy_BKRTH.reshape(y.shape)
  # The row sums of probabilities times their gradients.
  mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)[:, :, None]
  of_queries = lambda specs: [(dy, specs["q"]), (lse, specs["of_q"]), (mean, specs["of_q"])]
  visits = functools.partial(_visits, start_BT, gap_B2, sizes["M"], block)
  arrays = q_BKRTH, k_BKSH, v_BKSH, start_BT

  specs, read = _inputs(*arrays, block)
  (dq,) = _call(
    functools.partial(_dq_kernel, **sizes), "attention_dq", visits(by_keys=False), gap_B2, read + of_queries(specs),
    [(like(q_BKRTH, y.shape, q_BKRTH.dtype), specs["q"])], [(block, H)], K * R, interpret,
  )  # fmt: skip

  specs, read = _inputs(*arrays, block, inner=True)
  out = [(like(q_BKRTH, a.shape, a.dtype), specs["kv"]) for a in (k_BKSH, v_BKSH)]
  dk, dv = _call(
    functools.partial(_dkv_kernel, **sizes), "attention_dkv", visits(by_keys=True), gap_B2, read + of_queries(specs),
    out, [(block, H), (block, H)], K, interpret, inner=(R,),
  )  # fmt: skip
  # Blocks of earlier keys that no query sees are not visited, so nothing is written there.
  seen_BM = jnp.any(first_blocks(start_BT, block)[:, None] <= jnp.arange(sizes["M"])[None, :, None], axis=2)
  seen_BS = jnp.repeat(seen_BM, block, axis=1)[:, None, :, None]
  dk, dv = (jnp.where(seen_BS, d, 0) for d in (dk, dv))
  return dq.reshape(q_BKRTH.shape), dk, dv, None, None


_attend.defvjp(_forward, _backward)
