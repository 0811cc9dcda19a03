"""The difficulty of prompts for a model: how many of its completions solve each, and which prompts to train on.

Nemotron-Cascade 2 (arXiv 2603.19220, section 4.8) samples 16 completions of each prompt of its agentic stage,
drops the prompts that all of them solve, and drops 90% of those that none solves, at random.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from nemocascade.rollout.samples import Samples
from nemocascade.verifiers.verdict import Row, Verdict

FATES = ("kept", "solved", "unsolved", "unjudged", "too long")  # What becomes of a prompt; all but kept are dropped.


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """The completions of one prompt: those with a verdict, and of these those that solve it."""

  judged: int
  passed: int

  @property
  def fields(self) -> dict[str, float]:
    """The fields of a released row that hold it."""
    return {
      "pass_rate": self.passed / self.judged if self.judged else 0.0,
      "pass_rate_total": self.judged,
      "pass_rate_passed": self.passed,
    }


def measure(
  rows: Sequence[Row],
  collect: Callable[[list[Row], int, int], Samples],
  judge: Callable[[Samples, int], list[list[Verdict]]],
  *,
  start: int,
  batch: int,
  solved: float,
) -> Iterator[list[Difficulty]]:
  """Yields the difficulties of the next `batch` rows, from row `start` on.

  Args:
    collect: (rows, index, count) -> Samples of exactly `batch` rows; `index` is the number of the first. The last
      batch is filled up with copies of its last row, whose samples do not count: only the first `count` do.
    judge: (Samples, count) -> verdicts[q][g] of the first `count` rows.
    solved: the least reward of a completion that solves its prompt.
  """
  for first in range(start, len(rows), batch):
    chunk = [rows[i] for i in range(first, min(first + batch, len(rows)))]
    padded = chunk + [chunk[-1]] * (batch - len(chunk))
    verdicts = judge(collect(padded, first, len(chunk)), len(chunk))
    yield [of_verdicts(group, solved) for group in verdicts]


def of_verdicts(verdicts: Sequence[Verdict], solved: float) -> Difficulty:
  rewards = [verdict.reward for verdict in verdicts if not verdict.masked]
  return Difficulty(len(rewards), sum(reward >= solved for reward in rewards))


def fate(difficulty: Difficulty, draw: float, *, keep_solved: float, keep_unsolved: float) -> str:
  """One of FATES: whether the prompt is trained on, or why not.

  Args:
    draw: uniform in [0, 1); a prompt that all or none of its completions solve is kept where it is below the share
      `keep_solved` or `keep_unsolved`.
  """
  if not difficulty.judged:
    return "unjudged"
  if difficulty.passed == difficulty.judged:
    return "kept" if draw < keep_solved else "solved"
  if difficulty.passed == 0:
    return "kept" if draw < keep_unsolved else "unsolved"
  return "kept"
