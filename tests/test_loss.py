"""Laws of losses: means by hand, the corrections' masks, and what a gradient goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.step import loss

LOSS_BT = jnp.array([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [7.0, 7.0, 7.0, 7.0]])
MASK_BT = jnp.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)


def test_sft_loss_is_minus_the_learned_logprobs_with_their_count():
  total, count = loss.sft_loss(-LOSS_BT, MASK_BT)
  assert (float(total), float(count)) == (1 + 2 + 3 + 20, 4)


def mean(aggregate, loss_BT, mask_BT):
  weights_BT, count = aggregate(mask_BT)
  return jnp.sum(jnp.where(mask_BT, weights_BT * loss_BT, 0.0)), count


def test_token_mean_weighs_every_token_alike():
  total, count = mean(loss.token_mean, LOSS_BT, MASK_BT)
  assert float(total / count) == (1 + 2 + 3 + 20) / 4


def test_sequence_mean_weighs_every_sequence_alike_and_skips_empty_ones():
  total, count = mean(loss.sequence_mean, LOSS_BT, MASK_BT)
  assert float(count) == 2
  assert float(total / count) == ((1 + 2 + 3) / 3 + 20) / 2


@pytest.mark.parametrize("aggregate", loss.AGGREGATIONS.values(), ids=loss.AGGREGATIONS)
def test_parts_of_a_batch_add_up_to_the_batch(aggregate):
  parts = [mean(aggregate, LOSS_BT[b : b + 1], MASK_BT[b : b + 1]) for b in range(3)]
  np.testing.assert_allclose(np.sum(parts, axis=0), mean(aggregate, LOSS_BT, MASK_BT), rtol=1e-6)


@pytest.mark.parametrize("aggregate", loss.AGGREGATIONS.values(), ids=loss.AGGREGATIONS)
def test_only_learned_tokens_have_weight(aggregate):
  weights_BT, _ = aggregate(MASK_BT)
  assert jnp.all((weights_BT != 0) == MASK_BT)


def test_icepop_is_a_mask_and_not_a_clamp():
  ratio_1T = jnp.array([[0.0, 0.49, 0.5, 1.0, 2.0, 2.01, 1e9]])
  expected = [[0.0, 0.0, 0.5, 1.0, 2.0, 0.0, 0.0]]
  np.testing.assert_array_equal(loss.icepop(ratio_1T), jnp.array(expected))
  np.testing.assert_array_equal(loss.icepop(ratio_1T, low=0.9, high=1.1)[0, 2:5], [0, 1, 0])


def test_no_correction_weighs_all_ratios_alike():
  np.testing.assert_array_equal(loss.no_correction(jnp.array([[0.1, 1.0, 9.0]])), [[1, 1, 1]])


def test_policy_gradient_goes_through_the_logprobs_alone():
  args = jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, -4.0]]), jnp.array([[0.5, 1.0]])
  value = lambda *a: jnp.sum(loss.policy_gradient_loss(*a))  # noqa: E731
  logprobs, advantages, weights = jax.grad(value, argnums=(0, 1, 2))(*args)
  np.testing.assert_allclose(logprobs, [[-1.5, 4.0]])  # -w a: the better token's loss falls.
  assert not np.any(advantages) and not np.any(weights)


def test_k3_is_never_negative_and_its_expectation_is_the_kl():
  policy_V, other_V = (
    jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (7,))) for i in (0, 1)
  )
  k3_V = loss.kl_k3(policy_V, other_V)
  assert jnp.all(k3_V >= 0)
  kl = jnp.sum(jnp.exp(policy_V) * (policy_V - other_V))
  np.testing.assert_allclose(jnp.sum(jnp.exp(policy_V) * k3_V), kl, rtol=1e-5)
