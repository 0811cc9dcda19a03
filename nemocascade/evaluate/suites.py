"""Held-out scores of each domain: avg@k with its 95% interval, and pass@k."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemocascade.rollout.samples import Samples
from nemocascade.verifiers.verdict import Row, Verdict


@dataclasses.dataclass(frozen=True)
class DomainScore:
  """The score of one domain over n prompts with k completions each."""

  mean: float  # avg@k: the mean over prompts of the mean verdict of their unmasked completions.
  low: float  # The ends of the 95% interval of the mean, over prompts.
  high: float
  best: float  # pass@k: share of the prompts with a verdict that have at least one success.
  prompts: int  # Of which a completion got a verdict: what the mean and its interval are over.
  masked: int  # Completions without a verdict; they are not in the mean.
  unfinished: int  # Completions that met the length limit.
  tokens: int  # Sampled tokens of all completions.
  # Mean verdict of each prompt, in the prompts' order; None if all are masked.
  of_prompts: tuple[float | None, ...] = ()
  answers: tuple[dict[str, Any], ...] = ()  # The first completion of each of the first prompts, as lines of a log.


def mean_interval(success_Q: np.ndarray) -> tuple[float, float]:
  """95% interval (low, high) of the mean over prompts.

  If every prompt has 0 or 1 it is the Wilson interval, which stays accurate near 0 and 1. Otherwise it is the
  normal interval of the prompts' means, within [0, 1] unless a user's own reward gives others.
  """
  n = len(success_Q)
  if n == 0:
    return 0.0, 1.0
  p, z = float(np.mean(success_Q)), 1.959964
  if np.isin(success_Q, (0.0, 1.0)).all():
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
  half = z * float(np.std(success_Q, ddof=1)) / math.sqrt(n) if n > 1 else max(1.0, abs(p))
  if np.min(success_Q) < 0.0 or np.max(success_Q) > 1.0:
    return p - half, p + half
  return max(0.0, p - half), min(1.0, p + half)


def score_verdicts(verdicts_QG: Sequence[Sequence[Verdict]], *, unfinished: int = 0, tokens: int = 0) -> DomainScore:
  """The DomainScore of verdicts[q][g]; `unfinished` and `tokens` are its fields."""
  of_prompts, best = [], []
  for verdicts_G in verdicts_QG:
    rewards = [v.reward for v in verdicts_G if not v.masked]
    of_prompts.append(float(np.mean(rewards)) if rewards else None)
    if rewards:
      best.append(float(any(v.success for v in verdicts_G)))
  means = [mean for mean in of_prompts if mean is not None]
  low, high = mean_interval(np.asarray(means))
  return DomainScore(
    mean=float(np.mean(means)) if means else 0.0,
    low=low,
    high=high,
    best=float(np.mean(best)) if best else 0.0,
    prompts=len(means),
    masked=sum(v.masked for verdicts_G in verdicts_QG for v in verdicts_G),
    unfinished=unfinished,
    tokens=tokens,
    of_prompts=tuple(of_prompts),
  )


def evaluate(
  rows: dict[str, list[Row]],
  collect: Callable[[list[Row], int, int], Samples],
  judge: Callable[[Samples, int], list[list[Verdict]]],
  *,
  batch: int,
) -> dict[str, DomainScore]:
  """Scores the rows of each domain.

  Args:
    rows: domain -> its rows.
    collect: (rows, index, count) -> Samples of exactly `batch` rows; `index` is the number of the first row. The
      last batch is filled up with copies of its last row, whose samples do not count: only the first `count` do.
    judge: (Samples, count) -> verdicts[q][g] of the first `count` rows.
    batch: rows that are sampled together.
  """
  flat = [(name, row) for name, domain_rows in rows.items() for row in domain_rows]
  verdicts: dict[str, list] = {name: [] for name in rows}
  unfinished: collections.Counter[str] = collections.Counter()
  tokens: collections.Counter[str] = collections.Counter()
  for start in range(0, len(flat), batch):
    chunk = flat[start : start + batch]
    padded = [row for _, row in chunk] + [chunk[-1][1]] * (batch - len(chunk))
    samples = collect(padded, start, len(chunk))
    for q, verdicts_G in enumerate(judge(samples, len(chunk))):
      name = chunk[q][0]
      verdicts[name].append(verdicts_G)
      unfinished[name] += int((~samples.finished_QG[q]).sum())
      tokens[name] += int(samples.sampled_QG[q].sum())
  return {
    name: score_verdicts(verdicts[name], unfinished=unfinished[name], tokens=tokens[name])
    for name in rows
    if rows[name]
  }
