"""Tests of sampling: the right distribution, its log-probability, and independent rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.rollout.sampling import Options, likeliest, row_keys, sample

N = 20_000
LOGITS_V = jnp.array([0.5, -1.0, 2.0, 0.0, 1.0, -30.0])
draw = jax.jit(sample)


def draws(temperature, top_p, logits_V=LOGITS_V, rows=N, **options):
  """Tokens, and the log-probability that each was drawn with."""
  tokens_B, _, drawn_B = both(temperature, top_p, logits_V, rows, **options)
  return tokens_B, drawn_B


def both(temperature, top_p, logits_V=LOGITS_V, rows=N, **options):
  key_B = row_keys(jax.random.key(0), jnp.arange(rows), jnp.zeros(rows, jnp.int32))
  logits_BV = jnp.tile(logits_V[None], (rows, 1))
  options = Options(temperature, top_p=top_p, **options).by_row(rows)
  return [np.asarray(a) for a in draw(key_B, logits_BV, options)]


def softmax(logits_V, temperature=1.0):
  weights_V = np.exp(np.asarray(logits_V, np.float64) / temperature)
  return weights_V / weights_V.sum()


def nucleus(prob_V, top_p):
  """The definition: tokens in order of probability until their sum reaches top_p."""
  kept_V = np.zeros_like(prob_V)
  for token in np.argsort(-prob_V, kind="stable"):
    kept_V[token] = prob_V[token]
    if kept_V.sum() >= top_p:
      break
  return kept_V / kept_V.sum()


def assert_frequencies(tokens_B, prob_V):
  """Within 5 binomial standard errors for each token; the seed is fixed."""
  share_V = np.bincount(tokens_B, minlength=len(prob_V)) / len(tokens_B)
  assert np.all(np.abs(share_V - prob_V) <= 5 * np.sqrt(prob_V * (1 - prob_V) / len(tokens_B)))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
  tokens_B, logprobs_B = draws(temperature, 1.0)
  prob_V = softmax(LOGITS_V, temperature)
  assert_frequencies(tokens_B, prob_V)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8, 0.95])
def test_the_nucleus_is_the_fewest_likeliest_tokens_renormalised(top_p):
  tokens_B, logprobs_B = draws(1.0, top_p)
  prob_V = nucleus(softmax(LOGITS_V), top_p)
  assert_frequencies(tokens_B, prob_V)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.8), (0.6, 0.95), (1.7, 0.5)])
def test_beside_the_nucleus_the_whole_tempered_distribution_is_told(temperature, top_p):
  tokens_B, logprobs_B, drawn_B = both(temperature, top_p, rows=500)
  prob_V = softmax(LOGITS_V, temperature)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)
  np.testing.assert_allclose(drawn_B, np.log(nucleus(prob_V, top_p)[tokens_B]), atol=1e-5)


def test_of_equally_likely_tokens_the_nucleus_keeps_only_as_many_as_it_needs():
  tokens_B, logprobs_B = draws(1.0, 0.5, jnp.zeros(8))
  assert set(tokens_B.tolist()) == {0, 1, 2, 3}
  np.testing.assert_allclose(logprobs_B, np.log(1 / 4), atol=1e-6)


def test_the_temperature_is_applied_before_the_nucleus():
  tokens_B, logprobs_B = draws(3.0, 0.6)
  prob_V = nucleus(softmax(LOGITS_V, 3.0), 0.6)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)


def test_temperature_zero_is_the_likeliest_token_with_its_logprob_at_temperature_one():
  tokens_B, logprobs_B = draws(0.0, 0.5, rows=8)
  assert set(tokens_B.tolist()) == {2}
  np.testing.assert_allclose(logprobs_B, np.log(softmax(LOGITS_V)[2]), rtol=1e-6)


def test_a_sample_depends_on_its_row_and_place_and_not_on_its_neighbours():
  key, row_B, place_B = jax.random.key(3), jnp.arange(64), jnp.arange(64) % 7
  logits_BV = jax.random.normal(jax.random.key(4), (64, 11))
  together = sample(row_keys(key, row_B, place_B), logits_BV, Options().by_row(64))
  order = jax.random.permutation(jax.random.key(5), 64)[:20]
  apart = sample(row_keys(key, row_B[order], place_B[order]), logits_BV[order], Options().by_row(20))
  np.testing.assert_array_equal(apart[0], together[0][order])
  np.testing.assert_allclose(apart[1], together[1][order], rtol=1e-6)
  np.testing.assert_array_equal(together[1], together[2])  # At top_p = 1 nothing is cut off.


def test_rows_and_places_have_keys_of_their_own():
  row_B, place_B = jnp.meshgrid(jnp.arange(20), jnp.arange(20))
  keys = jax.random.key_data(row_keys(jax.random.key(0), row_B.ravel(), place_B.ravel()))
  assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 400


def test_options_are_no_reason_to_compile_again():
  fresh = jax.jit(lambda *a: sample(*a))
  key_B = jax.random.split(jax.random.key(0), 2)
  for options in (Options(), Options(0.0), Options(0.7, top_p=0.9), Options(1, top_k=3, min_p=0.1)):
    fresh(key_B, jnp.zeros((2, 5)), options.by_row(2))
  assert fresh._cache_size() == 1


@pytest.mark.parametrize(
  "options, kept", [({"top_k": 2}, [2, 4]), ({"min_p": 0.2}, [2, 4, 0]), ({"top_k": 4, "min_p": 0.3}, [2, 4]),
                    ({"top_k": 1, "min_p": 0.0}, [2]), ({"top_k": 6}, range(6))]
)  # fmt: skip
def test_the_other_cuts_keep_the_likeliest_tokens_renormalised(options, kept):
  tokens_B, logprobs_B = draws(1.0, 1.0, **options)
  prob_V = np.where(np.isin(np.arange(6), kept), softmax(LOGITS_V), 0)
  prob_V /= prob_V.sum()
  assert_frequencies(tokens_B, prob_V)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)


def test_the_nucleus_is_one_of_the_tokens_that_top_k_keeps():
  prob_V = nucleus(nucleus(softmax(LOGITS_V), 0.85), 0.7)  # The first three reach 0.85.
  tokens_B, logprobs_B = draws(1.0, 0.7, top_k=3)
  assert_frequencies(tokens_B, prob_V)
  np.testing.assert_allclose(logprobs_B, np.log(prob_V[tokens_B]), atol=1e-5)


def test_rows_have_options_of_their_own_and_do_not_change_each_others_bits():
  logits_BV = jax.random.normal(jax.random.key(1), (64, 11))
  key_B = row_keys(jax.random.key(0), jnp.arange(64), jnp.zeros(64, jnp.int32))
  options = [Options(), Options(0.5, top_p=0.7), Options(0.0), Options(top_k=2), Options(2.0, min_p=0.3)]
  alone = [draw(key_B, logits_BV, one.by_row(64)) for one in options]
  of_row = np.arange(64) % len(options)
  mixed = jax.tree.map(lambda *a: np.stack(a)[of_row, np.arange(64)], *(one.by_row(64) for one in options))
  for got, *expected in zip(draw(key_B, logits_BV, mixed), *alone, strict=True):
    np.testing.assert_array_equal(got, np.stack(expected)[of_row, np.arange(64)])


def test_a_row_that_is_not_finite_has_no_logprob_and_its_neighbours_keep_theirs():
  logits_BV = jax.random.normal(jax.random.key(1), (3, 11))
  key_B, options = jax.random.split(jax.random.key(0), 3), Options(top_p=0.9).by_row(3)
  sound, sick = (draw(key_B, logits, options) for logits in (logits_BV, logits_BV.at[1, 4].set(jnp.nan)))
  assert np.isnan(sick[1][1])
  for a, b in zip(sound, sick, strict=True):
    np.testing.assert_array_equal(np.asarray(a)[[0, 2]], np.asarray(b)[[0, 2]])


def test_the_likeliest_tokens_have_the_logprobs_that_they_would_be_told_with():
  logits_BV = jnp.stack([LOGITS_V, -LOGITS_V])
  tokens_BK, logprobs_BK = likeliest(logits_BV, Options(np.array([0.5, 0.0], np.float32)), 2)
  assert tokens_BK.tolist() == [[2, 4], [5, 1]]
  expected = [np.log(softmax(LOGITS_V, 0.5))[[2, 4]], np.log(softmax(-LOGITS_V))[[5, 1]]]
  np.testing.assert_allclose(logprobs_BK, expected, atol=1e-5)
