"""Held-out scores by domain: avg@k and pass@k with 95% intervals, every verdict kept."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from nemocascade.domains.domain import Row, Verdict
from nemocascade.rollout.episode import Samples


@dataclasses.dataclass(frozen=True)
class DomainScore:
  """Of one domain: the mean verdict over n prompts of k completions each."""

  mean: float  # avg@k: over the completions that got a verdict.
  low: float  # 95% interval of the mean, over prompts.
  high: float
  best: float  # pass@k: share of prompts with at least one full verdict.
  prompts: int
  masked: int  # Completions without a verdict; not in the mean.
  unfinished: int
  tokens: int  # Sampled, over all completions.


def mean_interval(success_Q: np.ndarray) -> tuple[float, float]:
  """95% interval of the mean over prompts.

  Wilson's where every prompt counts 0 or 1 (it stays honest near the ends); else the normal
  interval of the per-prompt means.
  """
  n = len(success_Q)
  if n == 0:
    return 0.0, 1.0
  p, z = float(np.mean(success_Q)), 1.959964
  if np.isin(success_Q, (0.0, 1.0)).all():
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
  half = z * float(np.std(success_Q, ddof=1)) / math.sqrt(n) if n > 1 else 1.0
  return max(0.0, p - half), min(1.0, p + half)


def score_verdicts(verdicts_QG: Sequence[Sequence[Verdict]], samples: Samples | None = None):
  """DomainScore of verdicts[q][g]; `samples`, of the same prompts, adds tokens and unfinished."""
  means, best = [], []
  for verdicts_G in verdicts_QG:
    rewards = [v.reward for v in verdicts_G if not v.masked]
    if rewards:
      means.append(float(np.mean(rewards)))
      best.append(float(any(v.success for v in verdicts_G)))
  low, high = mean_interval(np.asarray(means))
  return DomainScore(
    mean=float(np.mean(means)) if means else 0.0,
    low=low,
    high=high,
    best=float(np.mean(best)) if best else 0.0,
    prompts=len(verdicts_QG),
    masked=sum(v.masked for verdicts_G in verdicts_QG for v in verdicts_G),
    unfinished=sum(not c.finished for group in samples.completions for c in group) if samples else 0,
    tokens=int(samples.loss_mask_QGT.sum()) if samples else 0,
  )


def evaluate(
  rows: dict[str, list[Row]],
  collect: Callable[[list[Row], int], Samples],
  judge: Callable[[Samples], list[list[Verdict]]],
  *,
  batch: int,
) -> dict[str, DomainScore]:
  """Scores each domain's rows.

  `collect(rows, index)` samples completions of exactly `batch` rows (the last batch is filled up
  with copies of its last row, whose completions are dropped), `index` the first one's number.
  """
  flat = [(name, row) for name, domain_rows in rows.items() for row in domain_rows]
  verdicts: dict[str, list] = {name: [] for name in rows}
  parts: dict[str, list[Samples]] = {name: [] for name in rows}
  for start in range(0, len(flat), batch):
    chunk = flat[start : start + batch]
    padded = [row for _, row in chunk] + [chunk[-1][1]] * (batch - len(chunk))
    samples = collect(padded, start).take(range(len(chunk)))
    judged = judge(samples)
    for name in {name for name, _ in chunk}:
      picked = [i for i, (other, _) in enumerate(chunk) if other == name]
      verdicts[name] += [judged[i] for i in picked]
      parts[name].append(samples.take(picked))
  return {
    name: score_verdicts(verdicts[name], Samples.concatenate(parts[name])) for name in rows if rows[name]
  }
