"""Log-probability and entropy of chosen tokens, never holding [N, V] for all N."""

import functools

import jax
import jax.numpy as jnp


def token_logprob_ref(x_ND, head_DV, tokens_N, *, temperature=1.0):
  """The definition: (logprob_N, entropy_N) in fp32, nats, of softmax(x @ head / temperature)."""
  logits_NV = jnp.einsum("ND,DV->NV", x_ND, head_DV).astype(jnp.float32) / temperature
  logprobs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
  entropy_N = -jnp.sum(jnp.exp(logprobs_NV) * logprobs_NV, axis=-1)
  return jnp.take_along_axis(logprobs_NV, tokens_N[:, None], axis=-1)[:, 0], entropy_N


def token_logprob(x_BTD, head_DV, tokens_BT, wanted_BT, *, temperature=1.0, chunk=2048):
  """The same where wanted, and 0 elsewhere: (logprob_BT, entropy_BT).

  About `chunk` tokens at a time, whose logits are made again in the backward pass. Wanted tokens
  move to the front of their rows, and columns that no row wants are skipped: prompts cost nothing.
  Rows stay whole, so that a batch that is sharded by rows moves no token to another device.
  """
  B, T, D = x_BTD.shape
  columns = max(1, min(T, chunk // B))
  part = jax.checkpoint(functools.partial(token_logprob_ref, temperature=temperature))
  place_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1)
  _, order_BT = jax.lax.sort((~wanted_BT, place_BT), dimension=1, num_keys=2)
  _, back_BT = jax.lax.sort((order_BT, place_BT), dimension=1, num_keys=1)

  def columns_first(a):  # [B, T, ...] -> [T // columns, B * columns, ...], wanted ones first.
    a = jnp.take_along_axis(a, order_BT.reshape(B, T, *[1] * (a.ndim - 2)), axis=1)
    a = jnp.pad(a, [(0, 0), (0, -T % columns)] + [(0, 0)] * (a.ndim - 2))
    a = a.reshape(B, -1, columns, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0).reshape(a.shape[1], B * columns, *a.shape[3:])

  def scored(xs):
    x_ND, tokens_N, wanted_N = xs
    nothing = jnp.zeros(tokens_N.shape, jnp.float32)
    return jax.lax.cond(
      jnp.any(wanted_N), lambda: part(x_ND, head_DV, tokens_N), lambda: (nothing, nothing)
    )

  def rows_first(a):
    a_BT = jnp.moveaxis(a.reshape(-1, B, columns), 0, 1).reshape(B, -1)
    return jnp.where(wanted_BT, jnp.take_along_axis(a_BT, back_BT, axis=1), 0.0)

  logprob, entropy = jax.lax.map(scored, tuple(map(columns_first, (x_BTD, tokens_BT, wanted_BT))))
  return rows_first(logprob), rows_first(entropy)
