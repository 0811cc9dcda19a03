"""What paired runs say of each other: means and medians with bootstrap intervals, differences, p-values."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000
EXACT_SIGNS = 16  # Up to so many pairs every assignment of signs is looked at.


def bootstrap(
  values_N: Sequence[float] | np.ndarray, *, of: Callable = np.mean, level: float = 0.95
) -> tuple[float, float]:
  """The interval of a statistic over seeds: percentiles of it over resampled seeds.

  Args:
    values_N: one number a seed; infinities are allowed where the statistic is a median.
    of: the statistic, called as of(values, axis=...).

  The same numbers always give the same interval. Of one seed it is that seed's value: no interval.
  """
  values_N = np.asarray(values_N, np.float64)
  rng = np.random.default_rng(0)
  drawn = values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))]
  low, high = (1 - level) / 2, (1 + level) / 2
  # Ranks and not interpolation: between a number and infinity there is nothing to interpolate.
  ranked = np.sort(of(drawn, axis=1))
  pick = lambda q: float(ranked[min(int(q * RESAMPLES), RESAMPLES - 1)])
  return pick(low), pick(high)


def mean(values_N: Sequence[float]) -> dict:
  """{"mean", "ci95"} over seeds."""
  return {"mean": float(np.mean(values_N)), "ci95": list(bootstrap(values_N))}


def lower_median(values, axis=None):
  """The middle value, the smaller of two: of counts, some of them infinite, it is one of them."""
  values = np.sort(values, axis=axis)
  return np.take(values, (values.shape[axis if axis is not None else 0] - 1) // 2, axis=axis or 0)


def median(values_N: Sequence[float]) -> dict:
  """{"median", "ci95"} over seeds; what is infinite (never reached) is None."""
  values_N = np.asarray(values_N, np.float64)
  known = lambda x: float(x) if math.isfinite(x) else None
  return {
    "median": known(lower_median(values_N)),
    "ci95": [known(x) for x in bootstrap(values_N, of=lower_median)],
  }


def paired_p(differences_N: Sequence[float]) -> float:
  """Two-sided p-value of a mean difference of 0, by flipping the signs of the pairs.

  All 2^N flips where there are few pairs, and else RESAMPLES of them with the flips as seen.
  With N pairs it cannot be less than 2 / 2^N.
  """
  d_N = np.asarray(differences_N, np.float64)
  if len(d_N) <= EXACT_SIGNS:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d_N))))
  else:
    signs = np.random.default_rng(0).choice((1.0, -1.0), size=(RESAMPLES, len(d_N)))
    signs[0] = 1.0
  means = np.abs(signs @ d_N)
  return float(np.mean(means >= means[0] * (1 - 1e-9)))


def gap_closed(scores_N, students_N, teachers_N) -> np.ndarray:
  """Of each seed the share of the way from its student to its teacher; NaN where there is no way."""
  scores_N, students_N, teachers_N = (np.asarray(x, np.float64) for x in (scores_N, students_N, teachers_N))
  gap_N = teachers_N - students_N
  return np.where(gap_N > 0, (scores_N - students_N) / np.where(gap_N > 0, gap_N, 1.0), np.nan)


def first_at(steps: Sequence[float], scores: Sequence[float], level: float) -> float:
  """Where the curve, straight between its points, first comes to the level; infinity if it does not."""
  for i, score in enumerate(scores):
    if score >= level:
      if i == 0:
        return float(steps[0])
      below = scores[i - 1]
      return float(steps[i - 1] + (steps[i] - steps[i - 1]) * (level - below) / (score - below))
  return math.inf


def at(steps: Sequence[float], scores: Sequence[float], step: float) -> float:
  """The curve at a step, straight between its points; its end is held."""
  return float(np.interp(step, steps, scores))
