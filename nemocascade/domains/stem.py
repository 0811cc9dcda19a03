"""Multiple-choice questions, answered by the letter of an option."""

from __future__ import annotations

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.verifiers import choice
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

NO_ANSWER = "no expected answer"


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the letter extracted by the row's `grading_mode` is the expected one."""
  mode = row.get("grading_mode") or choice.MODES[0]
  if mode not in choice.MODES:
    return no_verdict("unknown", f"unknown grading mode {mode!r}")
  expected = (row.get("expected_answer") or "").strip().upper()
  if not expected:
    return no_verdict("row", NO_ANSWER)
  options = choice.options_of(row)
  template = row.get("template_metadata") or {}
  letter = choice.chosen(completion.content, options, mode, template)
  if letter is None:
    return Verdict(0.0, "no option is chosen")
  right = letter == expected
  return Verdict(float(right), "right" if right else f"chose {letter}")


def unsupported(row: Row) -> str:
  """Why no completion of the row can be judged: its grading mode is unknown, or it has no answer; else ""."""
  mode = row.get("grading_mode") or choice.MODES[0]
  if mode not in choice.MODES:
    return f"unknown grading mode {mode!r}"
  return "" if str(row.get("expected_answer") or "").strip() else NO_ANSWER


def make_verify() -> Verify:
  return one_by_one(judge)
