"""Statistics of paired seeds: values computed by hand, and the coverage of statistics."""

import math

import numpy as np
import pytest

from nemocascade.evaluate import statistics


def test_the_p_value_of_signs_is_counted_by_hand():
  # Of the 8 sign flips of (1, 2, 3), two have |sum| >= 6. For (1, 2, -3), whose sum is 0, all count.
  assert statistics.paired_p([1, 2, 3]) == pytest.approx(2 / 8)
  assert statistics.paired_p([1, 2, -3]) == 1.0
  # |3 + 2 - 1| = 4: the flips with |sum| >= 4 are +-(3, 2, -1) and +-(3, 2, 1).
  assert statistics.paired_p([3, 2, -1]) == pytest.approx(4 / 8)
  assert statistics.paired_p(np.ones(8)) == pytest.approx(2 / 256)


def test_the_p_value_of_many_pairs_is_sampled_and_never_0():
  assert statistics.paired_p(np.ones(40)) == pytest.approx(1 / statistics.RESAMPLES)
  assert statistics.paired_p(np.tile([1.0, -1.0], 20)) == 1.0


def test_an_interval_of_a_mean_is_the_binomials_where_seeds_are_0_or_1():
  # The bootstrap mean of five 0s and five 1s is Binomial(10, 1/2) / 10; these are its 2.5% and 97.5% points.
  low, high = statistics.bootstrap([0] * 5 + [1] * 5)
  assert (low, high) == (pytest.approx(0.2), pytest.approx(0.8))


def test_of_one_seed_there_is_no_interval():
  assert statistics.mean([0.25]) == {"mean": 0.25, "ci95": [0.25, 0.25]}


def test_an_interval_covers_the_mean_as_often_as_such_intervals_of_eight_seeds_do():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(200):
    low, high = statistics.bootstrap(rng.normal(size=8))
    covered += low <= 0 <= high
  assert 0.84 < covered / 200 < 0.97  # Percentile intervals of 8 values are known to be slightly too narrow.


def test_equal_numbers_give_equal_intervals_and_shifted_ones_shifted():
  values = [0.1, 0.5, 0.3, 0.9]
  assert statistics.mean(values) == statistics.mean(values)
  low, high = statistics.bootstrap(values)
  np.testing.assert_allclose(statistics.bootstrap(np.add(values, 2)), (low + 2, high + 2))


def test_a_median_of_counts_is_one_of_them_and_never_reached_is_none():
  assert statistics.median([10, 30])["median"] == 10
  assert statistics.median([20, math.inf, 10])["median"] == 20
  found = statistics.median([20, math.inf, math.inf])
  assert found["median"] is None and found["ci95"] == [20, None]
  assert statistics.median([math.inf] * 3) == {"median": None, "ci95": [None, None]}


def test_the_share_of_the_gap_is_of_each_seeds_own():
  shares = statistics.gap_closed([0.5, 0.9, 0.4], [0.3, 0.5, 0.4], [0.7, 0.9, 0.4])
  np.testing.assert_allclose(shares, [0.5, 1.0, np.nan])


def test_a_level_is_reached_between_the_points_around_it():
  assert statistics.first_at([0, 10, 20], [0.2, 0.4, 0.8], 0.6) == pytest.approx(15)
  assert statistics.first_at([0, 10, 20], [0.2, 0.8, 0.1], 0.5) == pytest.approx(5)
  assert statistics.first_at([0, 10], [0.2, 0.4], 0.2) == 0
  assert statistics.first_at([0, 10], [0.2, 0.4], 0.5) == math.inf


def test_a_curve_is_read_between_its_points_and_held_at_its_end():
  assert statistics.at([0, 10, 20], [0.2, 0.4, 0.8], 15) == pytest.approx(0.6)
  assert statistics.at([0, 10], [0.2, 0.4], 50) == 0.4
