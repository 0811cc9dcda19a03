"""Tests of advantages: values computed by hand, independence of groups, and MOPD as a reverse KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.advantage import (
  ADVANTAGES,
  dr_grpo,
  grpo,
  maxrl,
  mopd,
  mopd_clipped,
  mopd_outcome,
  needs_of,
  reinforce_pp,
  reinforce_pp_baseline,
  rloo,
)
from nemocascade.types import Rollout

T = 3


def rollout(rewards_QG, valid_QG=None):
  rewards_QG = jnp.asarray(rewards_QG, jnp.float32)
  tokens_QGT = jnp.zeros((*rewards_QG.shape, T), jnp.int32)
  return Rollout(
    tokens_QGT=tokens_QGT,
    segment_ids_QGT=tokens_QGT + 1,
    loss_mask_QGT=tokens_QGT == 0,
    behaviour_logprobs_QGT=jnp.zeros(tokens_QGT.shape),
    rewards_QG=rewards_QG,
    valid_QG=jnp.ones(rewards_QG.shape, bool) if valid_QG is None else jnp.asarray(valid_QG),
  )


def per_sample(rewards_QG, valid_QG=None, advantage=grpo):
  return np.asarray(advantage(rollout(rewards_QG, valid_QG)))[..., 0]


OF_REWARDS = {name: fn for name, fn in ADVANTAGES.items() if not needs_of(fn).teachers}
of_rewards = pytest.mark.parametrize("advantage", OF_REWARDS.values(), ids=OF_REWARDS)
of_groups = pytest.mark.parametrize(
  "advantage", [fn for name, fn in OF_REWARDS.items() if needs_of(fn).groups and "pp" not in name]
)


@pytest.mark.parametrize(
  "rewards_G, expected_G",
  [
    ([1, 0, 1, 0], [1, -1, 1, -1]),  # mean 1/2, std 1/2
    ([1, 0, 0, 0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),  # mean 1/4, std sqrt(3)/4
    ([3, 1, -1], [1.5**0.5, 0, -(1.5**0.5)]),  # mean 1, std sqrt(8/3)
  ],
)
def test_grpo_is_deviations_from_the_mean_in_standard_deviations(rewards_G, expected_G):
  np.testing.assert_allclose(per_sample([rewards_G])[0], expected_G, atol=1e-5)


@pytest.mark.parametrize(
  "advantage, rewards_QG, expected_QG",
  [
    (dr_grpo, [[1, 0, 0, 0], [3, 1, -1, 1]], [[0.75, -0.25, -0.25, -0.25], [2, 0, -2, 0]]),
    # The means of the other completions are 0, 1/3, 1/3, 1/3.
    (rloo, [[1, 0, 0, 0]], [[1, -1 / 3, -1 / 3, -1 / 3]]),
    (rloo, [[4, 1]], [[3, -3]]),
    # Over the batch: mean 2, deviations 1, -1, 3, -3, std sqrt(5).
    (reinforce_pp, [[3, 1], [5, -1]], [[5**-0.5, -(5**-0.5)], [3 * 5**-0.5, -3 * 5**-0.5]]),
    # Deviations from the group means: 1, -1 and 3, -3; std sqrt(5).
    (reinforce_pp_baseline, [[3, 1], [9, 3]], [[5**-0.5, -(5**-0.5)], [3 * 5**-0.5, -3 * 5**-0.5]]),
    # The group means are 1/4, 3/4 and 0.
    (maxrl, [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], [[3, -1, -1, -1], [1 / 3] * 3 + [-1], [0] * 4]),
  ],
)
def test_the_others_are_their_papers_numbers_by_hand(advantage, rewards_QG, expected_QG):
  np.testing.assert_allclose(per_sample(rewards_QG, advantage=advantage), expected_QG, atol=1e-5)


def test_reinforce_pp_teaches_groups_of_one():
  np.testing.assert_allclose(per_sample([[1.0], [0.0]], advantage=reinforce_pp), [[1], [-1]], atol=1e-5)


@of_rewards
def test_prompts_permuted_permute_the_advantages(advantage):
  rewards_QG = np.random.default_rng(1).integers(0, 3, (5, 4))
  order = [3, 0, 4, 1, 2]
  np.testing.assert_allclose(
    per_sample(rewards_QG[order], advantage=advantage), per_sample(rewards_QG, advantage=advantage)[order], rtol=1e-5
  )


@of_groups
def test_no_advantage_of_groups_sees_another_group(advantage):
  both_QG = per_sample([[1, 0, 0, 0], [0, 5, 9, 2]], advantage=advantage)
  np.testing.assert_array_equal(both_QG[:1], per_sample([[1, 0, 0, 0]], advantage=advantage))


@of_rewards
def test_what_is_not_valid_is_left_out_and_never_read(advantage):
  valid_QG = [[True, True, False, True]]
  got_QG = per_sample([[1.0, 0.0, np.nan, 0.0]], valid_QG, advantage)
  np.testing.assert_allclose(got_QG[:, [0, 1, 3]], per_sample([[1.0, 0.0, 0.0]], advantage=advantage), rtol=1e-5)
  assert got_QG[0, 2] == 0
  assert not np.any(per_sample([[1.0, 0.0]], [[False, False]], advantage))


@pytest.mark.parametrize("advantage", [fn for fn in OF_REWARDS.values() if needs_of(fn).groups])
def test_a_group_of_one_teaches_nothing_where_groups_are_compared(advantage):
  assert not np.any(per_sample([[3.0], [1.0]], advantage=advantage))


def test_every_token_of_a_sample_has_its_advantage():
  advantages_QGT = grpo(rollout([[1, 0]]))
  assert advantages_QGT.shape == (1, 2, T)
  assert jnp.all(advantages_QGT == advantages_QGT[..., :1])


def test_groups_do_not_see_each_other():
  both_QG = per_sample([[1, 0, 0, 0], [0, 5, 9, 2]])
  np.testing.assert_array_equal(both_QG[:1], per_sample([[1, 0, 0, 0]]))
  np.testing.assert_array_equal(both_QG[1:], per_sample([[0, 5, 9, 2]]))


# In fp32 the mean of 16 times 0.7 is not exactly 0.7; divided by the standard deviation this would give 0.1.
@pytest.mark.parametrize("reward, G", [(0.0, 4), (1.0, 4), (0.7, 16), (0.3, 12), (-1e4 / 3, 7)])
def test_a_unanimous_group_teaches_exactly_nothing(reward, G):
  assert not np.any(per_sample(np.full((2, G), reward)))


def test_a_sample_that_is_not_valid_leaves_its_group_as_if_it_were_not_there():
  valid_QG = [[True, True, False, True]]
  with_QG = per_sample([[1.0, 0.0, 99.0, 0.0]], valid_QG)
  np.testing.assert_allclose(with_QG[:, [0, 1, 3]], per_sample([[1.0, 0.0, 0.0]]), rtol=1e-6)
  assert with_QG[0, 2] == 0


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_the_reward_of_a_sample_that_is_not_valid_is_never_read(reward):
  got_QG = per_sample([[1.0, 0.0, reward]], [[True, True, False]])
  np.testing.assert_allclose(got_QG, [[1, -1, 0]], atol=1e-5)


def test_a_group_without_valid_samples_has_no_advantage():
  assert not np.any(per_sample([[1.0, 0.0]], [[False, False]]))


def test_rewards_scaled_and_shifted_give_the_same_advantages():
  rewards_QG = np.random.default_rng(0).normal(size=(3, 8))
  np.testing.assert_allclose(per_sample(rewards_QG), per_sample(5 * rewards_QG + 7), atol=1e-4)


def test_mopd_expectation_is_minus_reverse_kl():
  # One prompt, with each token of a vocabulary of 5 as one completion: the expectation is a finite sum.
  V = 5
  policy_V, teacher_V = (jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (V,))) for i in (0, 1))
  r = rollout(np.zeros((1, V))).replace(
    behaviour_logprobs_QGT=policy_V[None, :, None], teacher_logprobs_QGT=teacher_V[None, :, None]
  )
  expected = jnp.sum(jnp.exp(policy_V) * mopd(r)[0, :, 0])
  kl = jnp.sum(jnp.exp(policy_V) * (policy_V - teacher_V))
  np.testing.assert_allclose(expected, -kl, rtol=1e-5)


def test_mopd_never_reads_a_reward():
  logprobs_QGT = jax.random.normal(jax.random.key(0), (2, 3, T))
  r = rollout(np.full((2, 3), np.nan)).replace(teacher_logprobs_QGT=logprobs_QGT)
  np.testing.assert_array_equal(mopd(r), logprobs_QGT)


def test_mopd_clipped_is_mopd_inside_the_bounds():
  r = rollout(np.zeros((1, 1))).replace(teacher_logprobs_QGT=jnp.array([[[-6.7, 0.25, 3.0]]]))
  np.testing.assert_allclose(mopd_clipped(r)[0, 0], [-1, 0.25, 1])
  np.testing.assert_allclose(mopd_clipped(r, clip=5.0)[0, 0], [-5, 0.25, 3])


def test_mopd_outcome_adds_alpha_times_the_verdicts_advantage_to_the_teachers():
  logprobs_QGT = jax.random.normal(jax.random.key(0), (1, 2, T))
  r = rollout([[1.0, 0.0]]).replace(teacher_logprobs_QGT=logprobs_QGT)
  expected_QGT = logprobs_QGT + 0.5 * jnp.array([1.0, -1.0])[None, :, None]
  np.testing.assert_allclose(mopd_outcome(r, alpha=0.5), expected_QGT, atol=1e-5)


def test_a_teacher_that_is_the_student_teaches_exactly_nothing():
  logprobs_QGT = jax.random.normal(jax.random.key(0), (2, 3, T))
  r = rollout(np.zeros((2, 3))).replace(behaviour_logprobs_QGT=logprobs_QGT, teacher_logprobs_QGT=logprobs_QGT)
  taught = [fn for fn in ADVANTAGES.values() if needs_of(fn).teachers]
  assert len(taught) == 3 and not any(np.any(fn(r)) for fn in taught)


def test_a_name_of_the_table_is_the_functions_own():
  assert all(fn.__name__ == name for name, fn in ADVANTAGES.items())
