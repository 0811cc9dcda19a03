"""Statistics of paired runs and paired scores: means, medians, intervals, p-values, points of score curves."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray
RESAMPLES = 10_000
EXACT_SIGNS = 16  # Up to this many pairs the test uses every assignment of signs.


def bootstrap(values_N: Numbers, *, of: Callable = np.mean, level: float = 0.95) -> tuple[float, float]:
  """Percentile bootstrap interval (low, high) of a statistic over seeds.

  The resampling has a fixed seed, so the same values give the same interval. For one value both ends are
  that value.

  Args:
    values_N: one number for each seed; infinities are allowed if the statistic is a median.
    of: the statistic, called as of(values, axis=...).
    level: coverage of the interval.
  """
  values_N = np.asarray(values_N, np.float64)
  rng = np.random.default_rng(0)
  drawn = values_N[rng.integers(len(values_N), size=(RESAMPLES, len(values_N)))]
  low, high = (1 - level) / 2, (1 + level) / 2
  # Takes order statistics without interpolation, which is undefined between a number and infinity.
  ranked = np.sort(of(drawn, axis=1))
  pick = lambda q: float(ranked[min(int(q * RESAMPLES), RESAMPLES - 1)])
  return pick(low), pick(high)


def mean(values_N: Numbers) -> dict:
  """{"mean", "ci95"} over seeds."""
  return {"mean": float(np.mean(values_N)), "ci95": list(bootstrap(values_N))}


def lower_median(values, axis=None):
  """The median; for an even number of values the smaller middle one, so that it is always one of the values."""
  values = np.sort(values, axis=axis)
  return np.take(values, (values.shape[axis if axis is not None else 0] - 1) // 2, axis=axis or 0)


def median(values_N: Numbers) -> dict:
  """{"median", "ci95"} over seeds; infinite results (a level that was never reached) become None."""
  values_N = np.asarray(values_N, np.float64)
  known = lambda x: float(x) if math.isfinite(x) else None
  return {
    "median": known(lower_median(values_N)),
    "ci95": [known(x) for x in bootstrap(values_N, of=lower_median)],
  }


def paired_p(differences_N: Numbers) -> float:
  """Two-sided p-value of the hypothesis that the mean difference is 0, by a sign-flip permutation test.

  Up to EXACT_SIGNS pairs it uses all 2^N sign assignments, so p is at least 2 / 2^N. With more pairs it uses
  RESAMPLES random assignments, the observed one included.
  """
  d_N = np.asarray(differences_N, np.float64)
  if len(d_N) <= EXACT_SIGNS:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d_N))))
  else:
    signs = np.random.default_rng(0).choice((1.0, -1.0), size=(RESAMPLES, len(d_N)))
    signs[0] = 1.0
  means = np.abs(signs @ d_N)
  return float(np.mean(means >= means[0] * (1 - 1e-9)))


def paired_interval(differences_N: Numbers, *, z: float = 1.959964) -> tuple[float, float]:
  """95% interval (low, high) of the mean difference of two scores on the same prompts.

  It is the interval of Agresti and Min for matched proportions (Statistics in Medicine 24:729, 2005): a normal interval
  after two pseudo-prompts are added, half a prompt in each of the four cells: one prompt without a difference, and half
  a prompt with +1 and with -1 each. So a few prompts that all agree give no interval of width 0, and one prompt decides
  nothing. Differences of partial scores, such as 0.5, enter as they are.

  Args:
    differences_N: score minus score of each prompt, between -1 and 1; empty gives (-1, 1).
  """
  d_N = np.asarray(differences_N, np.float64)
  if not len(d_N):
    return -1.0, 1.0
  n = len(d_N) + 2
  centre = float(np.sum(d_N)) / n
  half = z * math.sqrt((float(np.sum(d_N**2)) + 1.0) / n - centre**2) / math.sqrt(n)
  return centre - half, centre + half


def gap_closed(scores_N, students_N, teachers_N) -> np.ndarray:
  """For each seed, (score - student) / (teacher - student); NaN if the teacher is not above the student."""
  scores_N, students_N, teachers_N = (np.asarray(x, np.float64) for x in (scores_N, students_N, teachers_N))
  gap_N = teachers_N - students_N
  return np.where(gap_N > 0, (scores_N - students_N) / np.where(gap_N > 0, gap_N, 1.0), np.nan)


def first_at(steps: Sequence[float], scores: Sequence[float], level: float) -> float:
  """The step at which the piecewise linear curve first reaches the level; infinity if it never does."""
  for i, score in enumerate(scores):
    if score >= level:
      if i == 0:
        return float(steps[0])
      below = scores[i - 1]
      return float(steps[i - 1] + (steps[i] - steps[i - 1]) * (level - below) / (score - below))
  return math.inf


def at(steps: Sequence[float], scores: Sequence[float], step: float) -> float:
  """The score of the piecewise linear curve at a step; outside its range the first or last score."""
  return float(np.interp(step, steps, scores))
