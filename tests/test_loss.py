"""Tests of losses: means computed by hand, masks of the corrections, and where gradients flow."""

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


def test_constant_length_divides_every_sequence_by_the_most_there_can_be():
  total, count = mean(loss.constant_length, LOSS_BT, MASK_BT)
  assert float(count) == 2
  assert float(total / count) == ((1 + 2 + 3) / 4 + 20 / 4) / 2


ROW_MEAN = lambda x_BT: jnp.broadcast_to(jnp.mean(x_BT, axis=1, keepdims=True), x_BT.shape)  # noqa: E731
RATIO_1T = np.array([[1e-30, 0.49, 0.5, 1.0, 2.0, 2.01, 1e9]])


def corrected(correction, ratio_BT, drawn_BT=None, **options):
  """Weights of a correction for the given ratios to the sampler; `drawn_BT`: ratios to the nucleus, if cut."""
  gap_BT, drawn_gap_BT = (
    jnp.log(jnp.asarray(r, jnp.float32)) for r in (ratio_BT, ratio_BT if drawn_BT is None else drawn_BT)
  )
  return correction(gap_BT, drawn_gap_BT, ROW_MEAN, **options)


def test_icepop_is_a_mask_and_not_a_clamp():
  expected = [[0.0, 0.0, 0.5, 1.0, 2.0, 0.0, 0.0]]
  np.testing.assert_allclose(corrected(loss.icepop, RATIO_1T), expected, rtol=1e-6)
  np.testing.assert_array_equal(corrected(loss.icepop, RATIO_1T, low=0.9, high=1.1)[0, 2:5], [0, 1, 0])


def test_tis_is_a_clamp_and_not_a_mask():
  got_1T = corrected(loss.tis, RATIO_1T, low=0.2, high=2.0)
  np.testing.assert_allclose(got_1T, [[0.2, 0.49, 0.5, 1, 2, 2, 2]], rtol=1e-6)


def test_sequence_mask_keeps_or_drops_a_completion_by_its_geometric_mean():
  # Geometric means: 1, 1.1, and infinity.
  ratio_BT = [[0.5, 2.0], [1.1, 1.1], [1.0, jnp.inf]]
  expected = [[0.5, 2.0], [0, 0], [0, 0]]
  np.testing.assert_allclose(corrected(loss.sequence_mask, ratio_BT), expected, rtol=1e-6)
  np.testing.assert_allclose(corrected(loss.sequence_mask, ratio_BT, high=1.2)[1], [1.1, 1.1], rtol=1e-6)


def test_a_nucleus_weighs_what_is_kept_and_does_not_decide_what_is():
  # A tenth of the mass was cut off, so mu = pi / 0.9. The first row's trainer and sampler agree to 0.001.
  ratio_BT, drawn_BT = np.array([[1.0, 1.001], [3.0, 3.0]]), np.array([[0.9, 0.9009], [2.7, 2.7]])
  of = lambda correction, **how: corrected(correction, ratio_BT, drawn_BT, **how)  # noqa: E731
  np.testing.assert_allclose(of(loss.icepop, low=0.95, high=2.9), [[0.9, 0.9009], [0, 0]], rtol=1e-6)
  np.testing.assert_allclose(of(loss.sequence_mask), [[0.9, 0.9009], [0, 0]], rtol=1e-6)
  np.testing.assert_allclose(of(loss.tis), [[0.9, 0.9009], [2, 2]], rtol=1e-6)


def test_a_correction_makes_an_average_over_the_nucleus_that_of_the_whole_distribution_there():
  """The sum of mu c f over the nucleus equals that of pi f; without c it is 1 / 0.8 times as large."""
  pi_V, kept_V = np.array([0.5, 0.3, 0.15, 0.05]), np.array([True, True, False, False])
  mu_V, f_V = np.where(kept_V, pi_V / 0.8, 0.0), np.array([3.0, -1.0, 2.0, 5.0])
  for correction in (loss.tis, loss.icepop, loss.sequence_mask):
    c_V = corrected(correction, np.ones((1, 2)), np.full((1, 2), 0.8))[0]
    np.testing.assert_allclose(np.sum(mu_V[:2] * c_V * f_V[:2]), np.sum((pi_V * f_V)[kept_V]), rtol=1e-6)


def test_no_correction_weighs_all_ratios_alike():
  np.testing.assert_array_equal(corrected(loss.no_correction, [[0.1, 1.0, 9.0]]), [[1, 1, 1]])


def gain_and_slope(form, ratio_T, a_T, **options):
  """(gain, slope, clipped) of one completion whose proximal log-probabilities are all -1."""
  logprobs_1T = jnp.log(jnp.array([ratio_T])) - 1.0
  a_1T, proximal_1T = jnp.array([a_T]), jnp.full_like(logprobs_1T, -1.0)

  def value(logprobs_1T):
    gain_1T, clipped_1T = form(logprobs_1T, proximal_1T, a_1T, ROW_MEAN, **options)
    return jnp.sum(gain_1T), (gain_1T, clipped_1T)

  slope_1T, (gain_1T, clipped_1T) = jax.grad(value, has_aux=True)(logprobs_1T)
  return [np.asarray(x[0]) for x in (gain_1T, slope_1T, clipped_1T)]


def test_reinforce_climbs_the_logprob_in_proportion_to_the_advantage_whatever_the_ratio():
  gain, slope, clipped = gain_and_slope(loss.reinforce, [1.0, 5.0], [3.0, -4.0])
  np.testing.assert_allclose(gain, [-3.0, -4.0 * (np.log(5) - 1)], rtol=1e-6)
  np.testing.assert_allclose(slope, [3, -4])
  assert not clipped.any()


def test_token_clip_stops_a_token_that_has_moved_far_enough_the_right_way():
  # Clipped: a good token above 1.28 and a bad one below 0.8. The other two keep their gradients.
  gain, slope, clipped = gain_and_slope(loss.token_clip, [1.5, 0.5, 0.5, 1.5], [2.0, -2.0, 2.0, -2.0])
  np.testing.assert_allclose(gain, [1.28 * 2, 0.8 * -2, 0.5 * 2, 1.5 * -2], rtol=1e-6)
  np.testing.assert_allclose(slope, [0, 0, 1, -3], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [True, True, False, False])


def test_dual_clip_bounds_what_a_worse_token_that_became_likelier_can_cost():
  gain, slope, clipped = gain_and_slope(loss.dual_clip, [5.0, 2.0, 5.0], [-2.0, -2.0, 2.0])
  np.testing.assert_allclose(gain, [-6, -4, 1.28 * 2], rtol=1e-6)
  np.testing.assert_allclose(slope, [0, -4, 0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [True, False, True])


def test_gspo_clips_a_completion_by_the_geometric_mean_of_its_ratios():
  # sqrt(2 * 0.5) = 1, so neither token is clipped, and the gain of each is its advantage.
  gain, slope, clipped = gain_and_slope(loss.gspo, [2.0, 0.5], [3.0, 3.0])
  np.testing.assert_allclose(gain, [3, 3], rtol=1e-6)
  np.testing.assert_allclose(slope, [3, 3], rtol=1e-6)
  assert not clipped.any()
  gain, slope, clipped = gain_and_slope(loss.gspo, [2.0, 2.0], [3.0, -3.0])
  np.testing.assert_allclose(gain, [1.0004 * 3, -6], rtol=1e-6)
  np.testing.assert_allclose(slope, [0, -6], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [True, False])


def test_cispo_bounds_a_tokens_weight_and_never_drops_it():
  gain, slope, clipped = gain_and_slope(loss.cispo, [0.1, 1.2, 9.0], [2.0, 2.0, -2.0])
  np.testing.assert_allclose(slope, [0.2, 2.4, -2.56], rtol=1e-6)
  np.testing.assert_allclose(gain, slope * (np.log([0.1, 1.2, 9.0]) - 1), rtol=1e-5)
  np.testing.assert_array_equal(clipped, [False, False, True])


@pytest.mark.parametrize("form", loss.RATIOS.values(), ids=loss.RATIOS)
def test_at_the_proximal_policy_all_ratio_forms_have_the_same_gradient(form):
  a_T = [1.5, -0.5, 0.0, -7.0]
  _, slope, clipped = gain_and_slope(form, [1.0] * 4, a_T)
  np.testing.assert_allclose(slope, a_T, rtol=1e-6)
  assert not clipped.any()


POLICY_V, OTHER_V = (jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (7,))) for i in (0, 1))


def kl_of(p_V, q_V):
  return jnp.sum(jnp.exp(p_V) * (p_V - q_V))


def test_k1_has_the_kl_as_its_expectation_and_k2_is_half_its_square():
  k1_V = loss.k1(POLICY_V, OTHER_V)
  np.testing.assert_allclose(jnp.sum(jnp.exp(POLICY_V) * k1_V), kl_of(POLICY_V, OTHER_V), rtol=1e-5)
  np.testing.assert_allclose(loss.k2(POLICY_V, OTHER_V), k1_V**2 / 2, rtol=1e-6)


@pytest.mark.parametrize(
  "estimate, whole",
  [
    (loss.k1, lambda logits_V: 0.0 * jnp.sum(logits_V)),
    (loss.k2, lambda logits_V: kl_of(jax.nn.log_softmax(logits_V), OTHER_V)),
    (loss.k3, lambda logits_V: kl_of(OTHER_V, jax.nn.log_softmax(logits_V))),
  ],
)
def test_the_expected_gradient_of_an_estimate_is_that_of_the_kl_it_is_said_to_be(estimate, whole):
  def expected(logits_V):
    logprobs_V = jax.nn.log_softmax(logits_V)
    return jnp.sum(jnp.exp(POLICY_V) * estimate(logprobs_V, OTHER_V))  # The sampling distribution carries no gradient.

  np.testing.assert_allclose(jax.grad(expected)(POLICY_V), jax.grad(whole)(POLICY_V), atol=1e-6)


def test_k3_is_never_negative_and_its_expectation_is_the_kl():
  k3_V = loss.k3(POLICY_V, OTHER_V)
  assert jnp.all(k3_V >= 0)
  np.testing.assert_allclose(jnp.sum(jnp.exp(POLICY_V) * k3_V), kl_of(POLICY_V, OTHER_V), rtol=1e-5)


@pytest.mark.parametrize("table", [loss.AGGREGATIONS, loss.CORRECTIONS, loss.RATIOS, loss.KLS])
def test_a_name_of_a_table_is_the_functions_own(table):
  assert all(fn.__name__ == name or name == "none" for name, fn in table.items())
