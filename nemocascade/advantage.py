"""Advantage estimators: functions Rollout -> advantages_QGT (`AdvantageFn`).

A group is the G completions of a prompt, axis G of the arrays. Invalid samples are left out of all means
and deviations. The functions do not mask tokens or stop gradients; the loss does both for all of them.

A user's own function stands in a file of the user's, and a config names it: `advantage="my_advantages.py:centred"`.
It is traced by `jax.jit`. Its keyword-only arguments are settings, which `options.centred` gives. The decorator
`needs` states what it reads besides rewards.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.segments import masked_mean
from nemocascade.types import Array, Rollout

AdvantageFn = Callable[[Rollout], Array]


@dataclasses.dataclass(frozen=True)
class Needs:
  """What an advantage needs of a run.

  Attributes:
    teachers: it reads `teacher_logprobs_QGT`, so every domain of the mixture needs a teacher.
    groups: it compares the completions of a prompt, so there must be at least two.
  """

  teachers: bool = False
  groups: bool = False


def needs(*, teachers: bool = False, groups: bool = False) -> Callable[[AdvantageFn], AdvantageFn]:
  """Decorator of an advantage that states its Needs."""

  def stated(advantage: AdvantageFn) -> AdvantageFn:
    advantage.needs = Needs(teachers, groups)  # type: ignore[attr-defined]
    return advantage

  return stated


def needs_of(advantage: AdvantageFn) -> Needs:
  """The Needs that an advantage states; none if it is not decorated."""
  return getattr(advantage, "needs", Needs())


def _every_token(advantages_QG: Array, r: Rollout) -> jax.Array:
  return jnp.broadcast_to(advantages_QG[..., None], r.tokens_QGT.shape)


def _group_mean(x_QG: Array, r: Rollout) -> jax.Array:
  """[Q, 1]: the mean over each group's valid samples; 0 for a group without valid samples."""
  count_Q1 = jnp.sum(r.valid_QG, axis=-1, keepdims=True, dtype=jnp.float32)
  total_Q1 = jnp.sum(jnp.where(r.valid_QG, x_QG, 0.0), axis=-1, keepdims=True)
  return total_Q1 / jnp.maximum(count_Q1, 1.0)


def _above_mean(r: Rollout) -> Array:
  """[Q, G]: reward minus the mean of its group.

  The group's largest reward is subtracted first, so that a group of equal rewards gives exactly 0. Otherwise
  rounding in the mean leaves a small difference, and the division by the group's tiny standard deviation
  makes it an advantage of about 0.1.
  """
  best_Q1 = jnp.max(
    r.rewards_QG, axis=-1, keepdims=True, where=r.valid_QG, initial=-jnp.inf
  )  # -inf if no sample of the group is valid; the callers mask the results of such a group.
  below_QG = r.rewards_QG - best_Q1
  return below_QG - _group_mean(below_QG, r)


def none(r: Rollout) -> jax.Array:
  """0 everywhere: only the other terms of the loss have a gradient, such as the distance from a teacher."""
  return jnp.zeros(r.tokens_QGT.shape, jnp.float32)


@needs(groups=True)
def grpo(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """(reward - group mean) / (group standard deviation + eps): GRPO (Shao et al., 2024, arXiv 2402.03300).

  Nemotron-Cascade 2 (arXiv 2603.19220, section 4) uses it too. It states neither eps nor the deviation's ddof;
  here ddof is 0.
  """
  above_QG = _above_mean(r)
  std_Q1 = jnp.sqrt(_group_mean(jnp.square(above_QG), r))
  return _every_token(jnp.where(r.valid_QG, above_QG / (std_Q1 + eps), 0.0), r)


@needs(groups=True)
def dr_grpo(r: Rollout) -> jax.Array:
  """Reward minus its group's mean: Dr. GRPO (Liu et al., 2025, arXiv 2503.20783, section 3.2).

  The paper combines it with the aggregation `constant_length`: a sum over tokens divided by a constant.
  """
  return _every_token(jnp.where(r.valid_QG, _above_mean(r), 0.0), r)


@needs(groups=True)
def rloo(r: Rollout) -> jax.Array:
  """Reward minus the mean of the group's other samples: RLOO (Ahmadian et al., 2024, arXiv 2402.14740, eq. 8).

  This equals (reward - group mean) * n / (n - 1) for n valid samples. A single sample gets 0.
  """
  n_Q1 = jnp.sum(r.valid_QG, axis=-1, keepdims=True, dtype=jnp.float32)
  others_Q1 = n_Q1 / jnp.maximum(n_Q1 - 1.0, 1.0)
  return _every_token(jnp.where(r.valid_QG, _above_mean(r) * others_Q1, 0.0), r)


def reinforce_pp(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """(reward - batch mean) / (batch standard deviation + eps): REINFORCE++ (Hu, 2025, arXiv 2501.03262, eq. 9).

  Groups may have a single sample. The paper subtracts a KL from the reward; here `kl_weight` adds it to the
  loss.
  """
  whole = r.replace(rewards_QG=r.rewards_QG.reshape(1, -1), valid_QG=r.valid_QG.reshape(1, -1))
  above_QG = _above_mean(whole).reshape(r.rewards_QG.shape)
  return _every_token(_in_batch_deviations(above_QG, r, eps), r)


@needs(groups=True)
def reinforce_pp_baseline(r: Rollout, *, eps: float = 1e-6) -> jax.Array:
  """(reward - group mean) / (batch deviation of these differences + eps); same paper, variant with baseline."""
  return _every_token(_in_batch_deviations(_above_mean(r), r, eps), r)


def _in_batch_deviations(above_QG: Array, r: Rollout, eps: float) -> jax.Array:
  std = jnp.sqrt(masked_mean(jnp.square(above_QG), r.valid_QG))
  return jnp.where(r.valid_QG, above_QG / (std + eps), 0.0)


@needs(groups=True)
def maxrl(r: Rollout) -> jax.Array:
  """(reward - group mean) / group mean: MaxRL (Tajwar et al., 2026, arXiv 2602.02710, algorithm 1).

  Meant for rewards of 0 and 1. Prompts with few successes weigh most. A group without a success gets 0.
  """
  mean_Q1 = _group_mean(r.rewards_QG, r)
  scaled_QG = _above_mean(r) / jnp.where(mean_Q1 > 0, mean_Q1, 1.0)
  return _every_token(jnp.where(r.valid_QG & (mean_Q1 > 0), scaled_QG, 0.0), r)


@needs(teachers=True)
def mopd(r: Rollout) -> Array:
  """log pi_teacher - log pi_policy of each sampled token, in nats.

  Nemotron-Cascade 2 (arXiv 2603.19220, section 4.4, eq. 2), multi-domain on-policy distillation.
  Its expectation over the policy's next token is minus the reverse KL to the teacher. So the loss descends the
  sum of these KLs over the sampled prefixes, with the prefixes held fixed. This is not the gradient of the KL
  between whole sequences: the effect of a token on later prefixes is left out.

  The policy's log-probability is the sampler's record, which on policy equals the trainer's except for
  numerical differences; the loss's correction accounts for these.
  """
  if r.teacher_logprobs_QGT is None:
    raise ValueError("mopd reads Rollout.teacher_logprobs_QGT, and no teacher has scored this rollout")
  return r.teacher_logprobs_QGT - r.behaviour_logprobs_QGT


@needs(teachers=True)
def mopd_clipped(r: Rollout, *, clip: float = 1.0) -> jax.Array:
  """`mopd` clipped to [-clip, clip] nats, because it has a long negative tail.

  NeMo-RL's recipe for Nemotron-3-Ultra (examples/nemo_gym/nemotron-3-ultra/mopd.yaml) clips at 20 nats.
  """
  return jnp.clip(mopd(r), -clip, clip)


@needs(teachers=True, groups=True)
def mopd_outcome(r: Rollout, *, alpha: float = 1.0) -> Array:
  """`mopd` + alpha * `grpo`: teacher and outcome reward together (MiMo-V2-Flash, arXiv 2601.02780, eq. 9).

  That report states no value of alpha.
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
