"""The state-space recurrence of Mamba-2 (SSD): one step, its scan, and the chunked form."""

import jax
import jax.numpy as jnp

from nemocascade.segments import segment_starts

UNROLLED = 4  # Chunks that the scan between them takes at a time: each is little work.


def ssd_step(state_BMPN, x_BMP, log_decay_BM, b_BMN, c_BMN):
  """One more token: (state, token) -> (state, y_BMP). Decoding is this, repeated. All fp32."""
  state_BMPN = jnp.exp(log_decay_BM)[..., None, None] * state_BMPN
  state_BMPN += x_BMP[..., None] * b_BMN[:, :, None, :]
  return state_BMPN, jnp.einsum("BMPN,BMN->BMP", state_BMPN, c_BMN, precision="highest")


def ssd_ref(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, *, initial_state=None):
  """The definition: token by token, forgetting at every document's start.

  Args:
    x_BTMP: inputs, already multiplied by dt.
    log_decay_BTM: dt * A, at most 0.
    b_BTUN, c_BTUN: shared by the M // U heads of a group.
    segment_ids_BT: documents; padding (0) leaves the state as it is.
  Returns:
    (y_BTMP, state_BMPN after the last token), fp32.
  """
  x_BTMP, log_decay_BTM, b_BTMN, c_BTMN, zero_BMPN = _prepare(
    x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT
  )
  forget_BT = segment_starts(segment_ids_BT) & (segment_ids_BT > 0)
  if initial_state is not None:  # The first document goes on.
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
  """fp32, heads spelt out, padding neutral."""
  B, _, M, P = x_BTMP.shape
  per_group = M // b_BTUN.shape[2]
  b_BTMN, c_BTMN = (
    jnp.repeat(a.astype(jnp.float32), per_group, axis=2) for a in (b_BTUN, c_BTUN)
  )
  real_BT1 = (segment_ids_BT > 0)[..., None]
  x_BTMP = jnp.where(real_BT1[..., None], x_BTMP.astype(jnp.float32), 0.0)
  log_decay_BTM = jnp.where(real_BT1, log_decay_BTM.astype(jnp.float32), 0.0)
  return x_BTMP, log_decay_BTM, b_BTMN, c_BTMN, jnp.zeros((B, M, P, b_BTUN.shape[3]), jnp.float32)


def ssd(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, *, chunk, initial_state=None):
  """The same in chunks of `chunk` tokens: products inside a chunk, a scan over chunks between.

  Any T: a last partial chunk is padded. Memory is T x chunk a head, not T x T.
  Source: Mamba-2 (Dao and Gu, 2024), section 6.
  """
  T = x_BTMP.shape[1]
  C = min(chunk, T)
  pad = -T % C
  grow = lambda a: jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
  x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT = map(
    grow, (x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT)
  )
  B, _, M, P = x_BTMP.shape
  U, N = b_BTUN.shape[2:]
  R, Z = M // U, x_BTMP.shape[1] // C  # heads a group; chunks

  # Which document's state a token belongs to: padding inherits the one before it.
  real_BT = segment_ids_BT > 0
  forget_BT = segment_starts(segment_ids_BT) & real_BT
  if initial_state is not None:
    forget_BT = forget_BT.at[:, 0].set(False)
  doc = jnp.cumsum(forget_BT, axis=1, dtype=jnp.int32).reshape(B, 1, 1, Z, C)

  # Groups and heads before chunks and tokens: every product is then over the last two axes.
  x = jnp.where(real_BT[..., None, None], x_BTMP.astype(jnp.float32), 0.0)
  a = jnp.where(real_BT[..., None], log_decay_BTM.astype(jnp.float32), 0.0)
  x = jnp.transpose(x.reshape(B, Z, C, U, R, P), (0, 3, 4, 1, 2, 5))  # [B, U, R, Z, C, P]
  a = jnp.transpose(a.reshape(B, Z, C, U, R), (0, 3, 4, 1, 2))  # [B, U, R, Z, C]
  b, c = (
    jnp.transpose(v.astype(jnp.float32).reshape(B, Z, C, U, N), (0, 3, 1, 2, 4))
    for v in (b_BTUN, c_BTUN)
  )  # [B, U, Z, C, N]

  # Inside a chunk: y_i = sum_j<=i (c_i . b_j) exp(sum of decays after j up to i) x_j.
  total = jnp.cumsum(a, axis=-1)
  see = (doc[..., :, None] == doc[..., None, :]) & jnp.tri(C, dtype=bool)[(None,) * 4]
  # Chosen inside the exponent: where a pair is not seen the gap may be large and positive.
  gap = total[..., :, None] - total[..., None, :]
  decay = jnp.exp(jnp.where(see, gap, -jnp.inf))  # [B, U, R, Z, i, j]
  score = jnp.einsum("buzin,buzjn->buzij", c, b)
  y = jnp.einsum("burzij,burzjp->burzip", score[:, :, None] * decay, x)

  # What a chunk adds to the state at its end: tokens of the document that is open there.
  to_end = jnp.exp(jnp.where(doc == doc[..., -1:], total[..., -1:] - total, -jnp.inf))
  added = jnp.einsum("burzjp,buzjn->burzpn", to_end[..., None] * x, b)

  # Between chunks: the state at a chunk's start survives to its end if no document starts in it.
  before = jnp.pad(doc[..., :-1, -1], [(0, 0)] * 3 + [(1, 0)])  # [B, 1, 1, Z]
  whole = jnp.exp(jnp.where(doc[..., -1] == before, total[..., -1], -jnp.inf))  # [B, U, R, Z]
  if initial_state is None:
    state = jnp.zeros((B, U, R, P, N), jnp.float32)
  else:
    state = initial_state.reshape(B, U, R, P, N)

  def tick(state, xs):
    whole, added = xs
    return whole[..., None, None] * state + added, state

  first = lambda v: jnp.moveaxis(v, 3, 0)  # noqa: E731
  state, starts = jax.lax.scan(tick, state, (first(whole), first(added)), unroll=UNROLLED)
  starts = jnp.moveaxis(starts, 0, 3)  # [B, U, R, Z, P, N]

  from_start = jnp.exp(jnp.where(doc == before[..., None], total, -jnp.inf))  # [B, U, R, Z, C]
  y += jnp.einsum("buzin,burzpn->burzip", c, starts) * from_start[..., None]
  y = jnp.transpose(y, (0, 3, 4, 1, 2, 5)).reshape(B, Z * C, M, P)
  return y[:, :T], state.reshape(B, M, P, N)
