"""Advantages: a rollout in, one number for every token out.

All are an `AdvantageFn`, Rollout -> advantages_QGT, so a step takes whichever it is handed. The
group is axis G, so none needs to be told its size. None masks tokens or stops a gradient: the loss
does both, once, for all. Samples that are not valid take no part in any statistics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.segments import masked_mean
from nemocascade.types import Rollout

AdvantageFn = Callable[[Rollout], jax.Array]


def _every_token(advantages_QG: jax.Array, r: Rollout) -> jax.Array:
  return jnp.broadcast_to(advantages_QG[..., None], r.tokens_QGT.shape)


def _group_mean(x_QG: jax.Array, r: Rollout) -> jax.Array:
  """[Q, 1]: the mean over a group's valid samples, 0 where it has none."""
  count_Q1 = jnp.sum(r.valid_QG, axis=-1, keepdims=True, dtype=jnp.float32)
  total_Q1 = jnp.sum(jnp.where(r.valid_QG, x_QG, 0.0), axis=-1, keepdims=True)
  return total_Q1 / jnp.maximum(count_Q1, 1.0)


def _above_mean(r: Rollout) -> jax.Array:
  """[Q, G]: reward above the mean of its group.

  Taken from the group's best first: a unanimous group is then exactly 0. The mean of equal rewards
  is off by a rounding, which a division by their standard deviation would make an advantage of 0.1.
  """
  best_Q1 = jnp.max(
    r.rewards_QG, axis=-1, keepdims=True, where=r.valid_QG, initial=-jnp.inf
  )  # -inf where no sample is valid; then nothing below is kept.
  below_QG = r.rewards_QG - best_Q1
  return below_QG - _group_mean(below_QG, r)


def none(r: Rollout) -> jax.Array:
  """0: the other terms of the loss teach alone, such as a distance from the teacher."""
  return jnp.zeros(r.tokens_QGT.shape, jnp.float32)


def grpo(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """Reward in standard deviations from its group's mean (Shao et al., 2024; paper.md 4.1).

  The deviation divides by the group's size (ddof 0); the paper names neither ddof nor eps.
  """
  above_QG = _above_mean(r)
  std_Q1 = jnp.sqrt(_group_mean(jnp.square(above_QG), r))
  return _every_token(jnp.where(r.valid_QG, above_QG / (std_Q1 + eps), 0.0), r)


def dr_grpo(r: Rollout) -> jax.Array:
  """Reward above its group's mean, not scaled (Liu et al., 2025, arXiv 2503.20783, section 3.2).

  Their loss is a sum over tokens by a constant: `constant_length` is its aggregation.
  """
  return _every_token(jnp.where(r.valid_QG, _above_mean(r), 0.0), r)


def rloo(r: Rollout) -> jax.Array:
  """Reward above the mean of the group's others (Ahmadian et al., 2024, arXiv 2402.14740, eq. 8).

  That is the reward above the mean of all, times n / (n - 1); a sample that is alone teaches nothing.
  """
  n_Q1 = jnp.sum(r.valid_QG, axis=-1, keepdims=True, dtype=jnp.float32)
  others_Q1 = n_Q1 / jnp.maximum(n_Q1 - 1.0, 1.0)
  return _every_token(jnp.where(r.valid_QG, _above_mean(r) * others_Q1, 0.0), r)


def reinforce_pp(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """Reward in standard deviations from the mean of the batch (Hu, 2025, arXiv 2501.03262, eq. 9).

  Groups see each other here, and may be of one. The paper's KL inside the reward is the loss's
  `kl_weight`.
  """
  whole = r.replace(rewards_QG=r.rewards_QG.reshape(1, -1), valid_QG=r.valid_QG.reshape(1, -1))
  above_QG = _above_mean(whole).reshape(r.rewards_QG.shape)
  return _every_token(_in_batch_deviations(above_QG, r, eps), r)


def reinforce_pp_baseline(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """Reward above its group's mean, in standard deviations of the batch (same paper, with baseline)."""
  return _every_token(_in_batch_deviations(_above_mean(r), r, eps), r)


def _in_batch_deviations(above_QG: jax.Array, r: Rollout, eps: float) -> jax.Array:
  std = jnp.sqrt(masked_mean(jnp.square(above_QG), r.valid_QG))
  return jnp.where(r.valid_QG, above_QG / (std + eps), 0.0)


def maxrl(r: Rollout) -> jax.Array:
  """Reward above its group's mean, over that mean (Tajwar et al., 2026, arXiv 2602.02710, alg. 1).

  For rewards of 0 and 1: hard prompts weigh most, and a group without a success teaches nothing.
  """
  mean_Q1 = _group_mean(r.rewards_QG, r)
  scaled_QG = _above_mean(r) / jnp.where(mean_Q1 > 0, mean_Q1, 1.0)
  return _every_token(jnp.where(r.valid_QG & (mean_Q1 > 0), scaled_QG, 0.0), r)


def mopd(r: Rollout) -> jax.Array:
  """How much likelier the teacher finds each token than the policy did (paper.md 5.1, eq. 2).

  Its expectation over the policy's next token is minus the reverse KL to the teacher there, so the
  loss descends the sum of these at the states that were visited, held fixed. That is not the
  gradient of the KL between whole sequences: what a token does to the states after it is left out.
  On policy, log pi_train is what the sampler recorded; the correction's ratio measures the difference.
  """
  return r.teacher_logprobs_QGT - r.behaviour_logprobs_QGT


def mopd_clipped(r: Rollout, *, clip: float = 1.0) -> jax.Array:
  """`mopd` within [-clip, clip] nats: its tail is long to the left (NeMo-RL's recipe: 20; paper.md 5.4)."""
  return jnp.clip(mopd(r), -clip, clip)


def mopd_outcome(r: Rollout, *, alpha: float = 1.0) -> jax.Array:
  """`mopd` + alpha x `grpo`: the teacher and the verdict (MiMo-V2-Flash, arXiv 2601.02780, eq. 9).

  The report prints no value of alpha.
  """
  return mopd(r) + alpha * grpo(r)


ADVANTAGES: dict[str, AdvantageFn] = dict(
  none=none,
  grpo=grpo,
  dr_grpo=dr_grpo,
  rloo=rloo,
  reinforce_pp=reinforce_pp,
  reinforce_pp_baseline=reinforce_pp_baseline,
  maxrl=maxrl,
  mopd=mopd,
  mopd_clipped=mopd_clipped,
  mopd_outcome=mopd_outcome,
)
TAUGHT = ("mopd", "mopd_clipped", "mopd_outcome")  # These read a teacher.
# These compare the completions of a prompt, so that a group of one teaches nothing.
GROUPED = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "maxrl", "mopd_outcome")
