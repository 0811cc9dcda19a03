"""Preference: a judge compares an answer with the row's `reference`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemocascade.domains.domain import Verify
from nemocascade.domains.rows import prompt_messages
from nemocascade.verifiers.judge import Comparison, Judge, Match, answer_of, first_wins
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict


def make_verify(judge: Judge | None = None) -> Verify:
  """A Verify that gives reward 1 where the judge prefers the answer to the reference; masked without a judge."""

  def verify(rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """Reward 1 iff the judge prefers the answer to the row's reference. Calls the judge once, even without a match."""
    verdicts: list[Verdict | None] = []
    matches = []
    for row, completion in zip(rows, completions, strict=True):
      answer, reference = answer_of(completion), row.get("reference")
      if judge is None:
        verdicts.append(no_verdict("row", "no judge"))
      elif reference is None:
        verdicts.append(no_verdict("row", "no reference to compare with"))
      elif answer is None:
        verdicts.append(Verdict(0.0, "no answer: malformed or unfinished"))
      else:
        verdicts.append(None)
        matches.append(Match(prompt_messages(row), answer, reference))
    if judge is not None:
      try:
        compared = iter(judge.compare_many(matches))
      except Exception as error:  # A failure of the judge leaves all answers without a verdict.
        failed = no_verdict("error", f"judge failed: {type(error).__name__}: {error}")
        return [verdict or failed for verdict in verdicts]
      verdicts = [_verdict(next(compared)) if verdict is None else verdict for verdict in verdicts]
    return verdicts

  return verify


def _verdict(comparison: Comparison) -> Verdict:
  if not np.isfinite(comparison).all():
    return Verdict(float("nan"), "the judge's reward is not a finite number")
  won = first_wins(comparison)
  return Verdict(float(won), "preferred to the reference" if won else "not preferred")
