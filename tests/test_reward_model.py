"""Tests of the reward model's step: Bradley-Terry by hand, and separation of the pairs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_checkpoint

from experiments.reward_model import on_top_of
from nemocascade.model.reward import RewardModel
from nemocascade.runtime import loading
from nemocascade.step.reward_model import bradley_terry_loss, reward_model_step
from nemocascade.types import TrainState

pytestmark = pytest.mark.usefixtures("compiled_fast")

V = 4


def reward(params, tokens_BT, segment_ids_BT):
  """The sum of a learned worth of each token."""
  return jnp.sum(jnp.where(segment_ids_BT > 0, params["worth_V"][tokens_BT], 0.0), axis=1)


def state(tx):
  params = {"worth_V": jnp.zeros(V)}
  return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def rows(*tokens):
  tokens_BT = jnp.array(tokens)
  return tokens_BT, jnp.ones_like(tokens_BT)


def test_the_loss_is_minus_log_the_probability_that_the_chosen_one_wins():
  total, count = bradley_terry_loss(jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0]))
  np.testing.assert_allclose(total, np.log(1 + np.exp(-2)) + np.log(2), rtol=1e-6)
  assert float(count) == 2


def test_the_loss_of_a_hopeless_pair_is_its_margin_and_never_overflows():
  total, _ = bradley_terry_loss(jnp.array([-1e4]), jnp.array([0.0]))
  np.testing.assert_allclose(total, 1e4, rtol=1e-6)


def test_only_the_difference_matters():
  chosen_B, rejected_B = jnp.array([0.3, -1.0]), jnp.array([1.0, 0.5])
  moved = bradley_terry_loss(chosen_B + 5, rejected_B + 5)
  np.testing.assert_allclose(moved, bradley_terry_loss(chosen_B, rejected_B), rtol=1e-5)


def test_a_step_from_zero_moves_by_half_the_difference_of_the_pairs():
  tx = optax.sgd(1.0)
  # Two pairs: token 1 beats token 2, and token 1 beats token 3; sigmoid(0) = 1/2.
  after, metrics = reward_model_step(reward, tx)(state(tx), rows([1], [1]), rows([2], [3]))
  np.testing.assert_allclose(after.params["worth_V"], [0, 0.5, -0.25, -0.25], atol=1e-6)
  np.testing.assert_allclose(metrics["loss/reward_model"], np.log(2), rtol=1e-6)


def test_pairs_come_apart_in_one_compilation():
  tx = optax.adam(0.1)
  step, current = jax.jit(reward_model_step(reward, tx)), state(tx)
  for _ in range(20):
    current, metrics = step(current, rows([1, 0], [3, 0]), rows([2, 0], [0, 2]))
  assert step._cache_size() == 1
  assert float(metrics["pairs/accuracy"]) == 1.0
  assert float(metrics["loss/reward_model"]) < 0.2


def test_it_begins_with_the_blocks_of_a_language_model_and_no_opinion(tmp_path):
  checkpoint = tiny_checkpoint.make(tmp_path)
  programs = tiny_checkpoint.programs()
  params = on_top_of(checkpoint, programs.reward_template)
  chex.assert_trees_all_equal(params["backbone"], loading.load(checkpoint, programs.template))
  rewards = lambda params: RewardModel(programs.config).apply({"params": params}, *rows([20, 21, 22], [30, 31, 32]))
  assert not np.any(rewards(params))
  seen = rewards(params | {"reward_head": jnp.ones_like(params["reward_head"])})
  assert np.all(np.isfinite(seen)) and seen[0] != seen[1]
