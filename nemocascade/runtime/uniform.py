"""How many tokens a teacher says nothing about: those on which its distribution is nearly uniform."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nemocascade.mesh import rows, whole
from nemocascade.types import Rollout

SEEN = 64  # Tokens per domain that are judged where the teacher's logits must be computed.


def uniform_share(
  rollout: Rollout, domains: Sequence[str], vocab_size: int, mesh: Mesh, heads_ZDV: jax.Array | None = None
) -> dict[str, float]:
  """{"teacher/uniform": share of learned tokens on which a teacher is nearly uniform}, or {} without tokens.

  Nearly uniform means a log-probability within one nat of -log(vocab_size). It is that of the likeliest token
  if the rollout has top tokens or teacher states, else that of the sampled token. With teacher states only
  SEEN tokens per domain are judged. The result is the largest share of any domain.

  The devices count; the host reads numbers of samples, and no array of tokens.

  Args:
    rollout: its arrays [Q, G, T, ...] are on the mesh.
    domains: the domain of each prompt.
    heads_ZDV: the heads of the teachers, sharded or not; needed if the rollout has teacher states.
  """
  by_states = rollout.teacher_states_QGTD is not None
  logprobs = rollout.teacher_logprobs_QGT if rollout.top_logprobs_QGTK is None else rollout.top_logprobs_QGTK
  learned_QG, near_QG = jax.device_get(
    _counts(rollout.loss_mask_QGT, rollout.valid_QG, None if by_states else logprobs, vocab_size, mesh=mesh)
  )
  shares = []
  for name in dict.fromkeys(domains):
    q = np.flatnonzero([other == name for other in domains])
    if not (total := int(learned_QG[q].sum())):
      continue
    if by_states:
      place_N = np.linspace(0, total - 1, SEEN).astype(int)  # May repeat tokens.
      states = rollout.teacher_states_QGTD, rollout.loss_mask_QGT, rollout.valid_QG
      logprobs_N = _top_logprobs(*states, *_find(learned_QG, q, place_N), heads_ZDV, rollout.teacher_Q[q[0]], mesh=mesh)
      shares.append(np.mean(_near(np.asarray(logprobs_N), vocab_size)))
    else:
      shares.append(near_QG[q].sum() / total)
  return {"teacher/uniform": float(max(shares))} if shares else {}


def _near(logprobs, vocab_size: int):
  return abs(logprobs + np.float32(np.log(vocab_size))) < 1.0


@functools.partial(jax.jit, static_argnames=("vocab_size", "mesh"))
def _counts(loss_mask_QGT, valid_QG, logprobs, vocab_size: int, *, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """(learned tokens, those nearly uniform) of each sample, on every device; without log-probabilities none is.

  Args:
    logprobs: [Q, G, T], or [Q, G, T, K] of the likeliest tokens, or None.
  """
  learned_QGT = loss_mask_QGT & valid_QG[..., None]
  if logprobs is None:
    near_QGT = jnp.zeros_like(learned_QGT)
  else:
    near_QGT = _near(logprobs if logprobs.ndim == 3 else logprobs.max(-1), vocab_size)
  found = (jnp.sum(mask, axis=-1, dtype=jnp.int32) for mask in (learned_QGT, learned_QGT & near_QGT))
  return jax.lax.with_sharding_constraint(tuple(found), whole(mesh))


def _find(learned_QG: np.ndarray, q: np.ndarray, place_N: np.ndarray) -> tuple[np.ndarray, ...]:
  """(prompt, sample, number among the sample's learned tokens) of learned tokens of the prompts q, by their number."""
  ends = np.cumsum(learned_QG[q])
  sample_N = np.searchsorted(ends, place_N, side="right")
  G = learned_QG.shape[1]
  before_N = ends[sample_N] - learned_QG[q].ravel()[sample_N]
  return q[sample_N // G].astype(np.int32), (sample_N % G).astype(np.int32), (place_N - before_N).astype(np.int32)


@functools.partial(jax.jit, static_argnames="mesh")
def _top_logprobs(
  states_QGTD, loss_mask_QGT, valid_QG, q_N, g_N, number_N, heads_ZDV, z, *, mesh: Mesh
) -> jax.Array:  # fmt: skip
  """The log-probability of the teacher's likeliest token at N learned tokens, on every device.

  Args:
    q_N, g_N, number_N: the tokens, as in `_find`.
    z: the teacher's head.
  """
  held = rows(mesh, len(loss_mask_QGT)).spec
  axes = tuple(jax.tree.leaves(tuple(held)))

  def own(states_QGTD, learned_QGT):
    Q = learned_QGT.shape[0]
    here_N = q_N - (jax.lax.axis_index(axes) * Q if axes else 0)
    at_N = jnp.clip(here_N, 0, Q - 1), g_N
    t_N = jnp.argmax(jnp.cumsum(learned_QGT[at_N], axis=-1) > number_N[:, None], axis=-1)
    x_ND = jnp.where(((here_N >= 0) & (here_N < Q))[:, None], states_QGTD[*at_N, t_N], 0)
    return jax.lax.psum(x_ND, axes) if axes else x_ND

  gather = jax.shard_map(own, mesh=mesh, in_specs=held, out_specs=PartitionSpec(), check_vma=False)
  x_ND = gather(states_QGTD, loss_mask_QGT & valid_QG[..., None])
  logits_NV = jnp.einsum("ND,DV->NV", x_ND, heads_ZDV[z], preferred_element_type=jnp.float32)
  return jax.lax.with_sharding_constraint(jnp.max(jax.nn.log_softmax(logits_NV), axis=-1), whole(mesh))
