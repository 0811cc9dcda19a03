"""The state-space recurrence of Mamba-2 (SSD): one step, the scan over tokens, and the chunked form.

Axes of the chunked form: Z chunks, C tokens of a chunk, Q = R x P channels of the R heads of a group. Groups
and chunks come before tokens, so that every product is a batched matmul of the last two axes.
"""

import functools

import jax
import jax.numpy as jnp

from nemocascade.errors import unknown
from nemocascade.kernels import ssd_channels
from nemocascade.kernels.product import einsum, einsum_fp32
from nemocascade.segments import segment_starts

FORMS = ("tokens", "channels")
UNROLLED = 4  # Chunks per iteration of the scan between chunks: each is little work.


def ssd_step(state_BMPN, x_BMP, log_decay_BM, b_BMN, c_BMN):
  """Adds one token: (state, token) -> (new state, y_BMP), all fp32. Decoding repeats this step."""
  state_BMPN = jnp.exp(log_decay_BM)[..., None, None] * state_BMPN
  state_BMPN += x_BMP[..., None] * b_BMN[:, :, None, :]
  return state_BMPN, einsum("BMPN,BMN->BMP", state_BMPN, c_BMN)


def ssd_ref(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, *, initial_state=None):
  """The definition: token by token; the state is reset to 0 at the start of every document.

  Args:
    x_BTMP: inputs, already multiplied by dt.
    log_decay_BTM: dt * A, at most 0.
    b_BTUN, c_BTUN: input and output vectors, shared by the M // U heads of a group.
    segment_ids_BT: int32, the document of each token; padding (0) leaves the state unchanged.
    initial_state: [B, M, P, N] fp32, the state that each row's first document continues from, or None.

  Returns:
    (y_BTMP, state_BMPN after the last token), fp32.
  """
  x_BTMP, log_decay_BTM, b_BTMN, c_BTMN, zero_BMPN = _prepare(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT)
  forget_BT = segment_starts(segment_ids_BT) & (segment_ids_BT > 0)
  if initial_state is not None:  # The first document continues.
    forget_BT = forget_BT.at[:, 0].set(False)

  def tick(state_BMPN, token):
    forget_B, *token = token
    state_BMPN = jnp.where(forget_B[:, None, None, None], 0.0, state_BMPN)
    return ssd_step(state_BMPN, *token)

  first = lambda a: jnp.moveaxis(a, 1, 0)  # noqa: E731
  xs = jax.tree.map(first, (forget_BT, x_BTMP, log_decay_BTM, b_BTMN, c_BTMN))
  state_BMPN, y_TBMP = jax.lax.scan(tick, zero_BMPN if initial_state is None else initial_state, xs)
  return jnp.moveaxis(y_TBMP, 0, 1), state_BMPN


def _prepare(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT):
  """(x, log decay, b, c, zero state): fp32, b and c repeated for every head, x and log decay 0 at padding."""
  B, _, M, P = x_BTMP.shape
  per_group = M // b_BTUN.shape[2]
  b_BTMN, c_BTMN = (jnp.repeat(a.astype(jnp.float32), per_group, axis=2) for a in (b_BTUN, c_BTUN))
  real_BT1 = (segment_ids_BT > 0)[..., None]
  x_BTMP = jnp.where(real_BT1[..., None], x_BTMP.astype(jnp.float32), 0.0)
  log_decay_BTM = jnp.where(real_BT1, log_decay_BTM.astype(jnp.float32), 0.0)
  return x_BTMP, log_decay_BTM, b_BTMN, c_BTMN, jnp.zeros((B, M, P, b_BTUN.shape[3]), jnp.float32)


def ssd(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, *, chunk, initial_state=None, form: str | None = None):
  """`ssd_ref` in chunks of at most `chunk` tokens: products inside chunks, a scan from chunk to chunk.

  T is any length: the last chunk is padded. Memory is T x chunk per head, not T x T. Products of pairs of
  tokens, products of tokens with a chunk's state, and their gradients are in b's dtype with fp32 sums, as in
  Mamba-2's own kernels. Running sums of log decays, decays, states and sums by head are always fp32.
  Source: Mamba-2 (Dao and Gu, 2024), section 6.

  Args:
    form: one of FORMS; by default `channels` on CPUs and `tokens` elsewhere.

  Raises:
    UserError: unknown form.
  """
  if form is not None and form not in FORMS:
    raise unknown("form of the SSD scan", form, FORMS)
  B, T, M, P = x_BTMP.shape
  U, N = b_BTUN.shape[2:]
  R, Z = M // U, -(-T // chunk)
  C = -(-T // Z)  # Chunks of equal size need the least padding.
  real_BT = segment_ids_BT > 0
  forget_BT = segment_starts(segment_ids_BT) & real_BT
  if initial_state is not None:
    forget_BT = forget_BT.at[:, 0].set(False)

  def cut(v):  # [B, T, U, ...] -> [B, Z, C, U, ...]
    v = jnp.pad(v, [(0, 0), (0, Z * C - T)] + [(0, 0)] * (v.ndim - 2))
    return v.reshape(B, Z, C, *v.shape[2:])

  x = cut(jnp.where(real_BT[..., None, None], x_BTMP, 0.0).astype(b_BTUN.dtype).reshape(B, T, U, R * P))
  a = cut(jnp.where(real_BT[..., None], log_decay_BTM.astype(jnp.float32), 0.0).reshape(B, T, U, R))
  # Number of each token's document within its chunk; 0 is one that began before the chunk. Padding belongs to
  # the document before it.
  doc = _running_sum(jnp.pad(forget_BT, ((0, 0), (0, Z * C - T))).astype(jnp.float32).reshape(B, Z, C))
  first = () if initial_state is None else (initial_state.astype(jnp.float32).reshape(B, U, R * P, N),)
  arrays = x, a, cut(b_BTUN), cut(c_BTUN), doc, *first
  if form is None:
    y, state = jax.lax.platform_dependent(*arrays, cpu=ssd_channels.chunked, default=_tokens)
  else:
    y, state = (ssd_channels.chunked if form == "channels" else _tokens)(*arrays)
  return y.reshape(B, Z * C, M, P)[:, :T], state.reshape(B, M, P, N)


def _tokens(x, a, b, c, doc, first=None):
  """The form with tokens before channels; see ssd_channels.chunked."""
  x, a, b, c = (jnp.moveaxis(v, 3, 1) for v in (x, a, b, c))
  a = jnp.swapaxes(a, -1, -2)
  y, last = _chunked(x, a, b, c, doc, None if first is None else jnp.swapaxes(first, -1, -2))
  # The final state is computed outside `_chunked`, so that XLA drops it where it is unused.
  _, to_end, _, whole = _decays(a[:, :, -1:], doc[:, -1:])
  state = _by_head(last, whole[:, :, 0, None]) + _added(b[:, :, -1:], x[:, :, -1:], to_end)[:, :, 0]
  return jnp.moveaxis(y, 1, 3), jnp.swapaxes(state, -1, -2)


def ssd_summary(x_BTMP, log_decay_BTM, b_BTUN, segment_ids_BT, starts_BT):
  """(added_BMPN, decay_BM), fp32: after T tokens a state is decay * state + added.

  Args: those of ssd_ref, and
    starts_BT: bool, the first tokens of documents, at which the state is reset to 0.
  """
  B, T, M, P = x_BTMP.shape
  U, N = b_BTUN.shape[2:]
  real_BT1 = (segment_ids_BT > 0)[..., None]
  log_decay_BTM = jnp.where(real_BT1, log_decay_BTM.astype(jnp.float32), 0.0)
  # Summed from the end, so that the decays of the last tokens, which matter most, are exact.
  left_BTM = jax.lax.cumsum(log_decay_BTM, axis=1, reverse=True)
  reset_B1, to_end_BTM = jnp.any(starts_BT, axis=1)[:, None], left_BTM - log_decay_BTM
  started_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
  last_BT1 = (started_BT == started_BT[:, -1:])[..., None] & real_BT1
  # Masked inside the exponent, so that gradients of masked tokens are 0.
  weight_BTM = jnp.exp(jnp.where(last_BT1, to_end_BTM, -jnp.inf))
  # The whole run as one chunk of `_outer`: [B, U, 1, T, ...].
  x = (jnp.where(real_BT1[..., None], x_BTMP, 0.0) * weight_BTM[..., None]).astype(b_BTUN.dtype)
  together = lambda v: jnp.swapaxes(v, 1, 2)[:, :, None]
  added = _outer(together(b_BTUN), together(x.reshape(B, T, U, -1)))[:, :, 0]
  decay_BM = jnp.exp(jnp.where(reset_B1, -jnp.inf, left_BTM[:, 0]))
  return jnp.swapaxes(added, -1, -2).reshape(B, M, P, N), decay_BM


def _running_sum(v):
  """Running sum of the last axis, as a product: XLA's cumsum on CPU slows down pairwise operations on it."""
  return einsum("...j,ji->...i", v, jnp.triu(jnp.ones((v.shape[-1],) * 2, v.dtype)))


def _sees(doc):
  """bool [B, Z, C, C]: whether token i has token j at or before it in its document, at [i, j]."""
  return (doc[..., :, None] == doc[..., None, :]) & jnp.tri(doc.shape[-1], dtype=bool)[None, None]


def _decays(a, doc):
  """The decays within each chunk, fp32; 0 from one document to another.

  Args:
    a: log decays [B, U, Z, R, C]; doc: number of each token's document within its chunk [B, Z, C].

  Returns:
    decay [B, U, Z, R, C, C]: from token j to token i at [i, j], where i >= j.
    to_end [B, U, Z, C, R]: from each token to the chunk's end.
    from_start [B, U, Z, C, R]: from the chunk's start to each token.
    whole [B, U, Z, R]: over the whole chunk.
  """
  own = doc[:, None, :, None]
  total = einsum("buzrj,bzij->buzri", a, _sees(doc).astype(a.dtype))
  # Masked inside the exponent: for a masked pair the gap may be large and positive, so exp may overflow.
  only = lambda seen, gap: jnp.exp(jnp.where(seen, gap, -jnp.inf))
  return (
    only(_sees(doc)[:, None, :, None], total[..., :, None] - total[..., None, :]),
    jnp.swapaxes(only(own == own[..., -1:], total[..., -1:] - total), -1, -2),
    jnp.swapaxes(only(own == 0, total), -1, -2),
    only(own[..., -1] == 0, total[..., -1]),
  )


def _dot(form, x, y, dtype):
  return einsum_fp32(form, x.astype(dtype), y.astype(dtype))


def _heads(v, R):
  """[..., C, Q] -> [..., R, C, P]"""
  return jnp.swapaxes(v.reshape(*v.shape[:-1], R, v.shape[-1] // R), -2, -3)


def _group(v):
  """[..., R, C, P] -> [..., C, Q]"""
  v = jnp.swapaxes(v, -2, -3)
  return v.reshape(*v.shape[:-2], v.shape[-2] * v.shape[-1])


def _by_head(v, weight):
  """Multiplies the channels of each head in v [..., Q] by the head's weight [..., R]."""
  R = weight.shape[-1]
  return (v.reshape(*v.shape[:-1], R, v.shape[-1] // R) * weight[..., None]).reshape(v.shape)


def _sum_by_head(v, R):
  """[..., Q] -> [..., R]: sums the channels of each head, as a product: XLA sums short rows slowly on CPU."""
  return einsum("...q,qr->...r", v, jnp.repeat(jnp.eye(R, dtype=v.dtype), v.shape[-1] // R, axis=0))


def _added(b, x, to_end):
  """[B, U, Z, N, Q]: what each chunk adds to the state, from tokens in the document of its last token."""
  return _outer(b, _by_head(x, to_end))


@jax.custom_vjp
def _outer(b, x):
  """The sum of b_j x_j over a chunk's tokens j, [B, U, Z, N, Q] fp32; gradients also multiply in b's dtype."""
  return _dot("buzjn,buzjq->buznq", b, x, b.dtype)


def _outer_backward(saved, d):
  b, x = saved
  db, dx = _dot("buzjq,buznq->buzjn", x, d, b.dtype), _dot("buzjn,buznq->buzjq", b, d, b.dtype)
  return db.astype(b.dtype), dx.astype(x.dtype)


_outer.defvjp(lambda b, x: (_outer(b, x), (b, x)), _outer_backward)


def _scan(first, whole, added, *, reverse=False):
  """[B, U, K + 1, N, Q]: `first`, then K states, each of them the previous one * whole + added."""

  def tick(state, xs):
    whole, added = xs
    state = _by_head(state, whole[:, :, None]) + added
    return state, state

  K = added.shape[2]
  xs = jnp.moveaxis(whole, 2, 0), jnp.moveaxis(added, 2, 0)
  _, then = jax.lax.scan(tick, first, xs, reverse=reverse, unroll=min(K, UNROLLED) or 1)
  first, then = first[:, :, None], jnp.moveaxis(then, 0, 2)
  return jnp.concatenate([then, first] if reverse else [first, then], axis=2)


def _chunk_starts(first, whole, added):
  """(states at the starts of chunks, the first chunk that has one): without `first` chunk 0 has none."""
  if first is not None:
    return _scan(first, whole[:, :, :-1], added), 0
  if not added.shape[2]:  # There is only one chunk.
    return added, 1
  return _scan(added[:, :, 0], whole[:, :, 1:-1], added[:, :, 1:]), 1


@jax.custom_vjp
def _chunked(x, a, b, c, doc, first):
  """(y [B, U, Z, C, Q], state [B, U, N, Q] at the start of the last chunk), both fp32.

  Args:
    x: [B, U, Z, C, Q]; a: log decays [B, U, Z, R, C]; b, c: [B, U, Z, C, N]; doc: [B, Z, C].
    first: [B, U, N, Q], the state at the start of the row, or None.
  """
  return _forward(x, a, b, c, doc, first)[0]


def _forward(x, a, b, c, doc, first):
  R = a.shape[3]
  decay, to_end, from_start, whole = _decays(a, doc)
  dot = functools.partial(_dot, dtype=b.dtype)
  # Inside a chunk: y_i = sum_j<=i (c_i . b_j) exp(sum of decays after j up to i) x_j.
  score = dot("buzin,buzjn->buzij", c, b)
  y = _group(dot("buzrij,buzrjp->buzrip", score[:, :, :, None] * decay, _heads(x, R)))
  # Between chunks: what all chunks before the last one add to the state.
  added = _added(b[:, :, :-1], x[:, :, :-1], to_end[:, :, :-1])
  starts, z = _chunk_starts(first, whole, added)
  carried = dot("buzin,buznq->buziq", c[:, :, z:], starts)
  y = y.at[:, :, z:].add(_by_head(carried, from_start[:, :, z:]))
  last = starts[:, :, -1] if starts.shape[2] else jnp.zeros((*added.shape[:2], *added.shape[3:]), jnp.float32)
  return (y, last), (x, a, b, c, doc, first, starts, y)


def _backward(saved, cotangents):
  """Hand-written: it recomputes the arrays of the decays' size; autodiff saves many of them.

  total_t is the running sum of the log decays of t's document. exp(total_i - total_j) multiplies the same products in y and in
  dx. The gradient of the totals therefore needs no array of pairs: for token t it is dy_t . y_t - x_t . dx_t.
  The last total of a chunk also gets dS . S, where S is the state at the end of the chunk.
  """
  x, a, b, c, doc, first, starts, y = saved
  dy, dlast = cotangents
  dy = dy.astype(x.dtype)  # Rounded as in the products, so that a token's term with itself cancels in dtotal.
  R, z = a.shape[3], int(first is None)
  decay, to_end, from_start, whole = _decays(a, doc)
  dot = functools.partial(_dot, dtype=b.dtype)
  # Pairs are [j, i]: then only the product for dc, the smallest, needs a transpose.
  decay = jnp.swapaxes(decay, -1, -2)
  score = dot("buzjn,buzin->buzji", b, c)
  dy_heads = _heads(dy, R)
  dx = _group(dot("buzrji,buzrip->buzrjp", score[:, :, :, None] * decay, dy_heads))
  dweight = dot("buzrjp,buzrip->buzrji", _heads(x, R), dy_heads) * decay
  dscore = sum(dweight[:, :, :, r] for r in range(R))
  dc = dot("buzji,buzjn->buzin", dscore, b)
  db = dot("buzji,buzin->buzjn", dscore, c)
  dtotal_end = jnp.zeros_like(whole)

  if starts.shape[2]:
    dcarried = _by_head(dy[:, :, z:], from_start[:, :, z:])
    dc = dc.at[:, :, z:].add(dot("buziq,buznq->buzin", dcarried, starts))
    dstarts = dot("buzin,buziq->buznq", c[:, :, z:], dcarried)
    # The gradient of the state at each start, with the contributions of later chunks.
    dstarts = _scan(dstarts[:, :, -1] + dlast, whole[:, :, z:-1], dstarts[:, :, :-1], reverse=True)
    dadded = dstarts[:, :, 1 - z :]
    ended = slice(0, dadded.shape[2])
    db = db.at[:, :, ended].add(dot("buzjq,buznq->buzjn", _by_head(x[:, :, ended], to_end[:, :, ended]), dadded))
    dx = dx.at[:, :, ended].add(_by_head(dot("buzjn,buznq->buzjq", b[:, :, ended], dadded), to_end[:, :, ended]))
    dends = jnp.sum(_sum_by_head(dadded * starts[:, :, 1 - z :], R), axis=3)
    dtotal_end = dtotal_end.at[:, :, ended].set(dends)

  dtotal = _sum_by_head(dy * y - x * dx, R)  # [B, U, Z, C, R]
  dtotal = jnp.swapaxes(dtotal, -1, -2)
  da = einsum("buzri,bzij->buzrj", dtotal, _sees(doc).astype(dtotal.dtype))
  at_end = (doc == doc[..., -1:])[:, None, :, None]  # The chunk's last total is that of its last document.
  da += jnp.where(at_end, dtotal_end[..., None], 0.0)
  dfirst = None if first is None else dstarts[:, :, 0]
  return dx.astype(x.dtype), da, db.astype(b.dtype), dc.astype(c.dtype), None, dfirst


_chunked.defvjp(_forward, _backward)
