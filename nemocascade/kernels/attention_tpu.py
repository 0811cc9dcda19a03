"""Causal attention within documents for TPUs, in Pallas; blocks of other documents are neither read nor multiplied.

The grid walks a list of visits (block of queries, block of keys), made from the segment ids before the kernel
and passed by scalar prefetch; its length is dynamic, so a skipped pair costs nothing. Scores are kept
transposed, [keys, queries]: sums over keys then run along sublanes, and what belongs to a query is one row.
The softmax is online and the gradient recomputes probabilities (FlashAttention, arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nemocascade.kernels.attention_blocks import MASKED, aligned
from nemocascade.kernels.pallas_product import VMEM, like
from nemocascade.kernels.product import precision

LOG2E = 1.4426950408889634
PART = 128  # Keys whose products are computed while the softmax of those before runs.
MASKED_PART = 512  # The same in a visit with a mask, where parts of 256 or 1024 keys take longer on v5p.
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
  arrays = aligned(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, block)
  attend = functools.partial(_attend, block=block, interpret=interpret)
  B, N, M = arrays[0].shape[0], arrays[0].shape[3] // block, arrays[1].shape[2] // block
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


def _visits(ids_BT, ids_BS, first_BN, block: int, by_keys: bool):
  """(codes int32 [most visits], number of visits) in the order of queries, or of keys.

  FIRST and LAST mark the first and last visit of a block of queries (of keys, if `by_keys`). WHOLE marks a visit
  before the diagonal with one document, which needs no mask.
  """
  (B, N), M = first_BN.shape, ids_BS.shape[1] // block
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
  low, high = (f(ids_BT.reshape(B * N, block), axis=1) for f in (jnp.min, jnp.max))
  low_k, high_k = (f(ids_BS.reshape(B * M, block), axis=1) for f in (jnp.min, jnp.max))
  row_V, key_V = jnp.clip(b_V * N + n_V, 0, B * N - 1), jnp.clip(b_V * M + m_V, 0, B * M - 1)
  one_V = (low[row_V] == high[row_V]) & (low_k[key_V] == high_k[key_V]) & (low[row_V] == low_k[key_V])
  whole_V = one_V & (low[row_V] > 0) & (m_V < n_V + M - N)
  flags_V = FIRST * (place_V == 0) + LAST * (place_V == count_X[x_V] - 1) + WHOLE * whole_V
  code_V = (row_V << (KEY_BITS + FLAG_BITS)) + (jnp.clip(m_V, 0, M - 1) << FLAG_BITS) + flags_V
  return code_V, jnp.sum(count_X)


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


def _products(q_ref, k_ref, ids_q_ref, ids_k_ref, code, N: int, M: int, masked: bool, keys=None):
  """fp32 products_MN of a visit's keys and queries, MASKED where they may not see each other.

  Args:
    keys: a slice of the block's keys with a start and an end, or None for all.
  """
  block = q_ref.shape[0]
  keys = keys or slice(0, block)
  product_MN = _dot(k_ref[keys, :], q_ref[...], (1, 1))
  if not masked:
    return product_MN
  # How many tokens the block of queries lies behind these keys.
  behind = (jax.lax.rem(_row(code), N) + M - N - _key(code)) * block - keys.start
  n, m = (jax.lax.broadcasted_iota(jnp.int32, product_MN.shape, axis) for axis in (1, 0))
  see_MN = (ids_k_ref[keys, :] == ids_q_ref[...]) & (n + behind >= m)
  return jnp.where(see_MN, product_MN, MASKED)


def _scores(q_ref, *args):
  """fp32 scores_MN of a visit, [keys, queries]; the arguments are those of _products."""
  return _products(q_ref, *args) * q_ref.shape[-1] ** -0.5


def _for_mask(code, body):
  """Calls body(masked), without a mask where the visit needs none."""
  pl.when(_is(code, WHOLE))(lambda: body(False))
  pl.when(~_is(code, WHOLE))(lambda: body(True))


def _forward_kernel(code_V, q_ref, k_ref, v_ref, ids_q_ref, ids_k_ref, y_ref, lse_ref, most, total, sums, *, N, M):
  code = code_V[pl.program_id(1)]

  @pl.when(_is(code, FIRST))
  def _():
    most[...] = jnp.full_like(most, MASKED)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  bits = q_ref.shape[-1] ** -0.5 * LOG2E  # A product times this is a score in powers of two.

  def visit(masked: bool):
    block = q_ref.shape[0]
    part = MASKED_PART if masked else PART
    part = part if block % part == 0 else block
    parts = [slice(start, start + part) for start in range(0, block, part)]
    products = functools.partial(_products, q_ref, k_ref, ids_q_ref, ids_k_ref, code, N, M, masked)
    ahead = products(parts[0])
    for keys, after in zip(parts, [*parts[1:], None], strict=True):
      product_MN = ahead
      if after is not None:  # In front of the softmax that it overlaps with.
        ahead = products(after)
      old = most[...]
      new = jnp.maximum(old, jnp.max(product_MN, axis=0, keepdims=True) * bits)
      prob_MN = jnp.exp2(product_MN * bits - new)
      if masked:  # A query that has seen no key has `new` near MASKED, and exp2(0) = 1.
        prob_MN = jnp.where(product_MN > MASKED / 2, prob_MN, 0.0)
      scale = jnp.exp2(old - new)
      most[...] = new
      total[...] = total[...] * scale + jnp.sum(prob_MN, axis=0, keepdims=True)
      sums[...] = sums[...] * scale + _dot(v_ref[keys, :], prob_MN.astype(v_ref.dtype), (0, 0))

  _for_mask(code, visit)

  @pl.when(_is(code, LAST))
  def _():
    y_ref[...] = jnp.transpose(sums[...] / total[...]).astype(y_ref.dtype)
    lse_ref[...] = most[...] / LOG2E + jnp.log(total[...])


def _dscores(score_MN, dy_ref, v_ref, lse_ref, mean_ref, dtype):
  """(probabilities, gradients of the unscaled scores), [keys, queries], of dtype; masked pairs give 0."""
  prob_MN = jnp.where(score_MN > MASKED / 2, jnp.exp(score_MN - lse_ref[...]), 0.0)
  dprob_MN = _dot(v_ref[...], dy_ref[...], (1, 1))
  dscore_MN = prob_MN * (dprob_MN - mean_ref[...]) * v_ref.shape[-1] ** -0.5
  return prob_MN.astype(dtype), dscore_MN.astype(dtype)


def _dq_kernel(code_V, q, k, v, ids_q, ids_k, dy, lse, mean, dq_ref, sums, *, N, M):
  code = code_V[pl.program_id(1)]

  @pl.when(_is(code, FIRST))
  def _():
    sums[...] = jnp.zeros_like(sums)

  def visit(masked: bool):
    score_MN = _scores(q, k, ids_q, ids_k, code, N, M, masked)
    _, dscore_MN = _dscores(score_MN, dy, v, lse, mean, q.dtype)
    sums[...] += _dot(dscore_MN, k[...], (0, 0))

  _for_mask(code, visit)

  @pl.when(_is(code, LAST))
  def _():
    dq_ref[...] = sums[...].astype(dq_ref.dtype)


def _dkv_kernel(code_V, q, k, v, ids_q, ids_k, dy, lse, mean, dk_ref, dv_ref, dk, dv, *, N, M):
  """The innermost grid dimension runs over the R query heads of a key-value head."""
  code, r = code_V[pl.program_id(1)], pl.program_id(2)

  @pl.when(_is(code, FIRST) & (r == 0))
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def visit(masked: bool):
    score_MN = _scores(q, k, ids_q, ids_k, code, N, M, masked)
    prob_MN, dscore_MN = _dscores(score_MN, dy, v, lse, mean, q.dtype)
    dk[...] += _dot(dscore_MN, q[...], (1, 0))
    dv[...] += _dot(prob_MN, dy[...], (1, 0))

  _for_mask(code, visit)

  @pl.when(_is(code, LAST) & (r == pl.num_programs(2) - 1))
  def _():
    dk_ref[...] = dk[...].astype(dk_ref.dtype)
    dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _specs(block: int, N: int, H: int, R: int, inner: bool) -> dict[str, pl.BlockSpec]:
  """Block specs: of q and y, of k and v, of the ids, and of one number a query.

  The grid is (query heads, visits), or if `inner` (key-value heads, visits, their R query heads).
  """

  def spec(shape, place):
    def index(head, v, *rest):
      code = rest[-1][v]
      # lax.div and lax.rem round towards 0, as integer division on a TPU does; the operands are not negative.
      own = (head * R + rest[0], head) if inner else (head, jax.lax.div(head, R))
      return place(jax.lax.div(_row(code), N), *own, jax.lax.rem(_row(code), N), _key(code))

    return pl.BlockSpec(shape, index)

  return dict(
    q=spec((None, None, block, H), lambda b, h, k, n, m: (b, h, n, 0)),
    kv=spec((None, None, block, H), lambda b, h, k, n, m: (b, k, m, 0)),
    ids_q=spec((None, 1, block), lambda b, h, k, n, m: (b, 0, n)),
    ids_k=spec((None, block, 1), lambda b, h, k, n, m: (b, m, 0)),
    of_q=spec((None, None, 1, block), lambda b, h, k, n, m: (b, h, 0, n)),
  )


def _call(kernel, name, visits, arrays, outputs, scratch, heads, interpret, inner=()):
  """Runs a kernel over (heads, visits, *inner). `arrays` and `outputs` are (array or its shape, block spec)."""
  codes, count = visits
  return pl.pallas_call(
    kernel, name=name, interpret=interpret,
    out_shape=[shape for shape, _ in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(heads, count, *inner), in_specs=[spec for _, spec in arrays],
      out_specs=[spec for _, spec in outputs], scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", *("arbitrary" for _ in inner)), vmem_limit_bytes=VMEM
    ),
  )(codes, *(array for array, _ in arrays))  # fmt: skip


def _inputs(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, block: int, inner: bool = False):
  """(block specs, [(array, its spec)] of what every kernel reads)."""
  B, K, R, T, H = q_BKRTH.shape
  specs = _specs(block, T // block, H, R, inner)
  q = q_BKRTH.reshape(B, K * R, T, H)
  named = dict(q=q, k=k_BKSH, v=v_BKSH, ids_q=ids_BT[:, None], ids_k=ids_BS[..., None])
  return specs, [(array, specs["kv" if name in "kv" else name]) for name, array in named.items()]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block, interpret):
  return _forward(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block, interpret)[0]


def _forward(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block, interpret):
  B, K, R, T, H = q_BKRTH.shape
  specs, read = _inputs(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, block)
  kernel = functools.partial(_forward_kernel, N=T // block, M=k_BKSH.shape[2] // block)
  y, lse = _call(
    kernel, "attention_forward", _visits(ids_BT, ids_BS, first_BN, block, by_keys=False), read,
    [
      (like(q_BKRTH, (B, K * R, T, H), v_BKSH.dtype), specs["q"]),
      (like(q_BKRTH, (B, K * R, 1, T), jnp.float32), specs["of_q"]),
    ],
    [(1, block), (1, block), (H, block)], K * R, interpret,
  )  # fmt: skip
  return y.reshape(q_BKRTH.shape), (q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, y, lse)


def _backward(block, interpret, saved, dy_BKRTH):
  *arrays, first_BN, y, lse = saved
  q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS = arrays
  _, K, R, T, H = q_BKRTH.shape
  sizes = dict(N=T // block, M=k_BKSH.shape[2] // block)
  dy = dy_BKRTH.reshape(y.shape)
  # The row sums of probabilities times their gradients.
  mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)[:, :, None]
  of_queries = lambda specs: [(dy, specs["q"]), (lse, specs["of_q"]), (mean, specs["of_q"])]

  specs, read = _inputs(*arrays, block)
  visits = _visits(ids_BT, ids_BS, first_BN, block, by_keys=False)
  (dq,) = _call(
    functools.partial(_dq_kernel, **sizes), "attention_dq", visits, read + of_queries(specs),
    [(like(q_BKRTH, y.shape, q_BKRTH.dtype), specs["q"])], [(block, H)], K * R, interpret,
  )  # fmt: skip

  specs, read = _inputs(*arrays, block, inner=True)
  visits = _visits(ids_BT, ids_BS, first_BN, block, by_keys=True)
  out = [(like(q_BKRTH, a.shape, a.dtype), specs["kv"]) for a in (k_BKSH, v_BKSH)]
  dk, dv = _call(
    functools.partial(_dkv_kernel, **sizes), "attention_dkv", visits, read + of_queries(specs),
    out, [(block, H), (block, H)], K, interpret, inner=(R,),
  )  # fmt: skip
  # Blocks of earlier keys that no query sees are not visited, so nothing is written there.
  seen_BM = jnp.any(first_BN[:, None] <= jnp.arange(sizes["M"])[None, :, None], axis=2)
  seen_BS = jnp.repeat(seen_BM, block, axis=1)[:, None, :, None]
  dk, dv = (jnp.where(seen_BS, d, 0) for d in (dk, dv))
  return dq.reshape(q_BKRTH.shape), dk, dv, None, None, None


_attend.defvjp(_forward, _backward)
