"""Long contexts: a question whose answer stands in one of many documents."""

from __future__ import annotations

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.verifiers.boxed import last_boxed
from nemocascade.verifiers.verdict import Completion, Row, Verdict


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the last \\boxed{} holds exactly the expected answer."""
  answer = last_boxed(completion.content)
  if answer is None:
    return Verdict(0.0, "no \\boxed{} answer")
  right = answer == str(row["expected_answer"]).strip()
  return Verdict(float(right), "right" if right else f"answered {answer[:80]!r}")


def make_verify() -> Verify:
  return one_by_one(judge)
