"""The chunked form of SSD for CPUs.

XLA on CPUs multiplies batches of small matrices fast, and in bf16 at all, only if the left operand is contracted over
its last axis and both operands lie in memory in the order of their axes. So arrays whose channels are contracted have
tokens first, arrays whose tokens are contracted have channels first, and chunks come before rows, as the scan between
chunks reads them. Axes are those of ssd.py; heads are R x P.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from nemocascade.kernels.product import einsum, einsum_fp32


@jax.custom_vjp
def chunked(x, a, b, c, doc, first=None):
  """(y [B, Z, C, U, Q], the state after the last chunk [B, U, Q, N]), both fp32.

  Args:
    x: [B, Z, C, U, Q]; a: log decays [B, Z, C, U, R], fp32; b, c: [B, Z, C, U, N]; doc: number of each token's
      document within its chunk [B, Z, C], 0 for one that began before it.
    first: [B, U, Q, N] fp32, the state at the start of the row, or None.
  """
  return _forward(x, a, b, c, doc, first)[0]


def _in_order(v):
  return with_layout_constraint(v, Layout(tuple(range(v.ndim))))


def _tokens_first(v):
  """[B, Z, C, U, K] -> [Z, B, U, C, K]"""
  return _in_order(jnp.transpose(v, (1, 0, 3, 2, 4)))


def _channels_first(v, R):
  """[B, Z, C, U, Q] -> [Z, B, U, R, P, C]"""
  v = v.reshape(*v.shape[:4], R, -1)
  return _in_order(jnp.transpose(v, (1, 0, 3, 4, 5, 2)))


def _decays(a, doc):
  """(decay from token j to token i [Z, B, U, R, i, j], to the chunk's end and from its start [Z, B, U, R, C], of a
  whole chunk [Z, B, U, R], whether token i sees token j [Z, B, i, j]); 0 from one document to another."""
  a, doc = jnp.transpose(a, (1, 0, 3, 4, 2)), jnp.swapaxes(doc, 0, 1)
  sees = (doc[..., :, None] == doc[..., None, :]) & jnp.tri(doc.shape[-1], dtype=bool)[None, None]
  total, own = einsum("zburj,zbij->zburi", a, sees.astype(a.dtype)), doc[:, :, None, None]
  # Masked inside the exponent: for a masked pair the gap may be large and positive, so exp may overflow.
  only = lambda seen, gap: jnp.exp(jnp.where(seen, gap, -jnp.inf))
  return (
    only(sees[:, :, None, None], total[..., :, None] - total[..., None, :]),
    only(own == own[..., -1:], total[..., -1:] - total),
    only(own == 0, total),
    only(own[..., -1] == 0, total[..., -1]),
    sees,
  )


def _by_token(v, weight):
  """v [..., R, P, C] times weight [..., R, C] -> [..., Q, C] of v's dtype."""
  v = (v * weight[..., None, :]).astype(v.dtype)
  return v.reshape(*v.shape[:3], -1, v.shape[-1])


def _natural(weight):
  """[Z, B, U, R, C] -> [B, Z, C, U, R, 1]"""
  return jnp.transpose(weight, (1, 0, 4, 2, 3))[..., None]


def _scale(state, whole):
  """state [B, U, Q, N] times whole [B, U, R]."""
  return (state.reshape(*whole.shape, -1, state.shape[-1]) * whole[..., None, None]).reshape(state.shape)


def _forward(x, a, b, c, doc, first):
  R, dtype = a.shape[-1], b.dtype
  decay, to_end, from_start, whole, _ = _decays(a, doc)
  x_t, b, c = _channels_first(x, R), _tokens_first(b), _tokens_first(c)
  # Inside a chunk: y_i = sum_j<=i (c_i . b_j) exp(sum of decays after j up to i) x_j.
  score = einsum_fp32("zbuin,zbujn->zbuij", c, b)
  weight = (score[:, :, :, None] * decay).astype(dtype)
  y = jnp.transpose(einsum_fp32("zburij,zburpj->zburip", weight, x_t), (1, 0, 4, 2, 3, 5))
  # Between chunks.
  added = einsum_fp32("zbuqj,zbujn->zbuqn", _by_token(x_t, to_end), b)
  state = jnp.zeros(added.shape[1:], jnp.float32) if first is None else first
  tick = lambda state, xs: (_scale(state, xs[0]) + xs[1], state)  # noqa: E731
  last, starts = jax.lax.scan(tick, state, (whole, added))
  starts = starts.astype(dtype)  # Not in the scan, where XLA on CPUs writes bf16 slowly.
  if len(added) > 1 or first is not None:
    carried = jnp.transpose(einsum_fp32("zbuin,zbuqn->zbuiq", c, starts), (1, 0, 3, 2, 4))
    y += carried.reshape(y.shape) * _natural(from_start)
  y = y.reshape(x.shape)
  return (y, last), (x, a, b, c, doc, first, x_t, decay, weight, starts, last, y)


def _backward(saved, cotangents):
  """Hand-written as in ssd.py, whose `_backward` says how the gradient of the log decays is found."""
  x, a, b, c, doc, first, x_t, decay, weight, starts, last, y = saved
  dy, dlast = cotangents
  R, dtype = a.shape[-1], b.dtype
  dy = dy.astype(dtype)  # Rounded as in the products, so that a token's term with itself cancels in dtotal.
  _, to_end, from_start, whole, sees = _decays(a, doc)
  heads = lambda v: v.reshape(*v.shape[:4], R, -1)  # noqa: E731
  weighed = lambda v, of: _tokens_first((heads(v) * _natural(of)).astype(dtype).reshape(v.shape))  # noqa: E731
  dy_t, weight_t = _channels_first(dy, R), _in_order(jnp.swapaxes(weight, -1, -2))
  dx = jnp.transpose(einsum_fp32("zburji,zburpi->zburjp", weight_t, dy_t), (1, 0, 4, 2, 3, 5))
  dy_heads = _in_order(jnp.transpose(heads(dy), (1, 0, 3, 4, 2, 5)))
  dweight = einsum_fp32("zburip,zburpj->zburij", dy_heads, x_t) * decay
  dscore = sum(dweight[:, :, :, r] for r in range(R)).astype(dtype)
  dc = einsum_fp32("zbuij,zbujn->zbuin", dscore, b)
  db = einsum_fp32("zbuji,zbuin->zbujn", _in_order(jnp.swapaxes(dscore, -1, -2)), c)

  def tick(dstate, xs):
    whole, more, start = xs
    before = _scale(dstate, whole) + more  # The gradient of the state at the chunk's start.
    at_start = jnp.sum((before * start).reshape(*whole.shape, -1), axis=-1)
    return before, (dstate, at_start)

  dstarts = einsum_fp32("zbuqi,zbuin->zbuqn", _by_token(dy_t, from_start), c)
  dfirst, (dends, at_start) = jax.lax.scan(tick, dlast, (whole, dstarts, starts), reverse=True)
  dends = dends.astype(dtype)
  dc += einsum_fp32("zbuiq,zbuqn->zbuin", weighed(dy, from_start), starts)
  db += einsum_fp32("zbujq,zbuqn->zbujn", weighed(x, to_end), dends)
  carried = jnp.transpose(einsum_fp32("zbujn,zbuqn->zbujq", b, dends), (1, 0, 3, 2, 4))
  dx += carried.reshape(dx.shape) * _natural(to_end)

  dtotal = jnp.sum(heads(dy) * heads(y) - heads(x) * dx, axis=-1)  # [B, Z, C, U, R]
  da = einsum("bziur,zbij->bzjur", dtotal, sees.astype(dtotal.dtype))
  # The chunk's last total is that of its last document; it also gets dS . S of the state at the chunk's end.
  at_last = jnp.sum((dlast * last).reshape(*whole.shape[1:], -1), axis=-1)
  at_end = jnp.swapaxes(jnp.concatenate([at_start[1:], at_last[None]]), 0, 1)[:, :, None]
  da += jnp.where((doc == doc[..., -1:])[..., None, None], at_end, 0.0)
  back = lambda v: jnp.transpose(v, (1, 0, 3, 2, 4)).astype(dtype)  # noqa: E731
  return dx.reshape(x.shape).astype(x.dtype), da, back(db), back(dc), None, None if first is None else dfirst


chunked.defvjp(_forward, _backward)
