"""Causal attention within documents in blocks; the time follows the documents' lengths, not the row's.

A block of queries meets only those blocks of keys that hold tokens of its documents (`attention_blocks.first_blocks`). The
softmax is computed online over blocks, as in FlashAttention (Dao et al., arXiv 2205.14135), and the gradient
recomputes the probabilities from the saved log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp

from nemocascade.kernels.attention_blocks import MASKED, aligned, first_blocks
from nemocascade.kernels.product import einsum_fp32


def attention_blocked(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, *, block: int):
  """Attention of T queries to S >= T keys, of which the last T are the queries' own tokens.

  Args:
    segment_ids_BT, segment_ids_BS: as in attention_blocks.aligned.
    block: queries and keys of a block.

  Returns:
    [B, K, R, T, H] of v's dtype; at padding it is finite and means nothing.
  """
  T = q_BKRTH.shape[3]
  *arrays, start_BT = aligned(q_BKRTH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, block)
  return _attend(*arrays, first_blocks(start_BT, block), block)[:, :, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block):
  return _forward(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block)[0]


def _cut(a, i, block: int, axis: int):
  return jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)


def _scores(q_KRNH, k_KNH, ids_N, ids_M, i, j, block: int, before: int):
  """(fp32 scores_KRNM, which pairs may see each other) of block i of queries and block j of keys."""
  n, m = before + i * block + jnp.arange(block), j * block + jnp.arange(block)
  see_NM = (ids_N[:, None] == ids_M[None]) & (n[:, None] >= m[None])
  score = einsum_fp32("KRNH,KMH->KRNM", q_KRNH, k_KNH) * q_KRNH.shape[-1] ** -0.5
  return jnp.where(see_NM, score, MASKED), see_NM


def _forward(q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, block):
  B, K, R, T, H = q_BKRTH.shape
  before = k_BKSH.shape[2] - T

  def of_block(place):
    b, i = place // (T // block), place % (T // block)
    q, ids = _cut(q_BKRTH[b], i, block, 2), _cut(ids_BT[b], i, block, 0)

    def add(j, carry):
      most, total, y = carry
      k, v = _cut(k_BKSH[b], j, block, 1), _cut(v_BKSH[b], j, block, 1)
      score, see = _scores(q, k, ids, _cut(ids_BS[b], j, block, 0), i, j, block, before)
      new = jnp.maximum(most, score.max(-1))
      prob = jnp.where(see, jnp.exp(score - new[..., None]), 0)
      scale = jnp.exp(most - new)
      weighed = einsum_fp32("KRNM,KMH->KRNH", prob.astype(v.dtype), v)
      return new, total * scale + prob.sum(-1), y * scale[..., None] + weighed

    zero = jnp.zeros((K, R, block), jnp.float32)
    carry = zero + MASKED, zero, jnp.zeros((K, R, block, H), jnp.float32)
    most, total, y = jax.lax.fori_loop(first_BN[b, i], before // block + i + 1, add, carry)
    return y / total[..., None], most + jnp.log(total)

  y, lse = jax.lax.map(of_block, jnp.arange(B * (T // block)))  # fp32: XLA on CPUs writes bf16 slowly in loops.
  together = lambda a: jnp.moveaxis(a.reshape(B, T // block, *a.shape[1:]), 1, 3).reshape(B, K, R, T, *a.shape[4:])
  y_BKRTH = together(y.astype(v_BKSH.dtype))
  return y_BKRTH, (q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, y_BKRTH, together(lse))


def _backward(block, saved, dy_BKRTH):
  q_BKRTH, k_BKSH, v_BKSH, ids_BT, ids_BS, first_BN, y_BKRTH, lse_BKRT = saved
  B, K, R, T, H = q_BKRTH.shape
  before = k_BKSH.shape[2] - T
  # The row sums of probabilities times their gradients.
  mean_BKRT = jnp.sum(dy_BKRTH.astype(jnp.float32) * y_BKRTH.astype(jnp.float32), axis=-1)

  def of_block(dkv, place):
    b, i = place // (T // block), place % (T // block)
    q, dy, ids = _cut(q_BKRTH[b], i, block, 2), _cut(dy_BKRTH[b], i, block, 2), _cut(ids_BT[b], i, block, 0)
    lse, mean = _cut(lse_BKRT[b], i, block, 2), _cut(mean_BKRT[b], i, block, 2)

    def add(j, carry):
      dq, dk_BKSH, dv_BKSH = carry
      k, v = _cut(k_BKSH[b], j, block, 1), _cut(v_BKSH[b], j, block, 1)
      score, see = _scores(q, k, ids, _cut(ids_BS[b], j, block, 0), i, j, block, before)
      prob = jnp.where(see, jnp.exp(score - lse[..., None]), 0)
      dprob = einsum_fp32("KRNH,KMH->KRNM", dy, v)
      dscore = (prob * (dprob - mean[..., None]) * H**-0.5).astype(q.dtype)
      dq += einsum_fp32("KRNM,KMH->KRNH", dscore, k)
      add_to = lambda d_BKSH, d: jax.lax.dynamic_update_slice(
        d_BKSH, jax.lax.dynamic_slice(d_BKSH, (b, 0, j * block, 0), (1, K, block, H)) + d, (b, 0, j * block, 0)
      )
      dk_BKSH = add_to(dk_BKSH, einsum_fp32("KRNM,KRNH->KMH", dscore, q)[None])
      dv_BKSH = add_to(dv_BKSH, einsum_fp32("KRNM,KRNH->KMH", prob.astype(dy.dtype), dy)[None])
      return dq, dk_BKSH, dv_BKSH

    dq = jnp.zeros((K, R, block, H), jnp.float32)
    dq, *dkv = jax.lax.fori_loop(first_BN[b, i], before // block + i + 1, add, (dq, *dkv))
    return tuple(dkv), dq

  dkv = (jnp.zeros(k_BKSH.shape, jnp.float32),) * 2
  (dk, dv), dq = jax.lax.scan(of_block, dkv, jnp.arange(B * (T // block)))
  dq_BKRTH = jnp.moveaxis(dq.astype(q_BKRTH.dtype).reshape(B, T // block, K, R, block, H), 1, 3).reshape(q_BKRTH.shape)
  return dq_BKRTH, dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), None, None, None


_attend.defvjp(_forward, _backward)
