"""Mathematics, judged by math-verify, or by the scorer of the reasoning-gym dataset that a row names."""

from __future__ import annotations

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.verifiers import equality, scorers
from nemocascade.verifiers.boxed import BOXED, FBOX, last_boxed, last_tagged
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

NO_ANSWER = "neither expected_answer nor metadata.source_dataset"


def judge(row: Row, completion: Completion) -> Verdict:
  """Judges the last \\boxed{}: reward 1 iff it equals the row's `expected_answer`.

  A row without `expected_answer` is scored in [0, 1] by the reasoning-gym dataset that it names.
  """
  content = completion.content
  answer = last_boxed(content, (BOXED, FBOX))
  if row.get("expected_answer") is None:
    return _scored(row, last_tagged(content, "answer") or answer or content.strip())
  if not answer:
    return Verdict(0.0, "no \\boxed{} answer")
  same = equality.equal(str(row["expected_answer"]), answer)
  if same is None:
    return no_verdict("row", "the expected answer cannot be read")
  return Verdict(float(same), "equal" if same else f"not equal: {answer[:80]}")


def _scored(row: Row, answer: str) -> Verdict:
  """The verdict on a reasoning-gym row, whose answer may be in an <answer> tag, a box, or neither."""
  entry = {key: row.get(key) for key in ("question", "answer", "metadata")}
  if not (entry["metadata"] or {}).get("source_dataset"):
    return no_verdict("row", NO_ANSWER)
  score = scorers.score(entry, answer)
  if score is None:
    dataset = entry["metadata"]["source_dataset"]
    return no_verdict("unknown", f"reasoning-gym has no dataset {dataset!r}")
  return Verdict(score, f"score {score:g}: {answer[:80]}")


def unsupported(row: Row) -> str:
  """Why no completion of the row can be judged: it has no answer; else ""."""
  named = row.get("expected_answer") is not None or (row.get("metadata") or {}).get("source_dataset")
  return "" if named else NO_ANSWER


def make_verify() -> Verify:
  return one_by_one(judge)
