"""Mathematics: chains of additions from reasoning-gym, judged by math-verify."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from nemocascade.domains import domain
from nemocascade.domains.rows import make_prompt
from nemocascade.verifiers import equality, scorers
from nemocascade.verifiers.boxed import BOXED, FBOX, box, last_boxed
from nemocascade.verifiers.verdict import Completion, Message, Row, Verdict, no_verdict

STYLE = domain.Style("sum", "about", error_rate=0.65)
INSTRUCTION = "Solve it and put the answer inside \\boxed{}:"
POOL = 1 << 30  # Size of the reasoning-gym dataset; a problem is generated from its index.


@dataclasses.dataclass
class Math(domain.Domain):
  """Each thought adds one term; one that errs has a total too high by 1, which the next ones use.

  A thought is a full equation, `8 - 2 = 6`, so that finding the term and adding it are two separate
  small steps.
  """

  name: str = "math"
  style: domain.Style = STYLE
  terms: tuple[int, int] = (3, 4)  # Number of terms of a short and of a long problem.
  long_share: float = 0.35  # Share of long problems.
  largest_total: int = 9  # Running totals are 0 .. 9, which keeps the addition table small.
  phrases: tuple[str, ...] = (
    f"{INSTRUCTION} ", "sum ", "about ", " + ", " - ", " =", " = ", "\\boxed{",
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    chains = _chains(self.terms[int(rng.random() < self.long_share)])
    while True:
      entry = chains(int(rng.integers(POOL)))
      if all(0 <= total <= self.largest_total for total in running_totals(_expression(entry))):
        break
    question = f"{_expression(entry)} ="
    return make_prompt(
      self.name, f"{INSTRUCTION} {question}",
      question=question, expected_answer=entry["answer"], metadata=entry["metadata"],
    )  # fmt: skip

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    words = row["question"].split()
    total, thoughts = int(words[0]), []
    for sign, term in zip(words[1:-1:2], words[2::2], strict=True):
      marker, errs = self.style.draw(rng)
      before, total = total, total + (int(term) if sign == "+" else -int(term)) + errs
      thoughts.append(f"{marker} {before} {sign} {term} = {total}")
    return [domain.assistant(box(total), thoughts=thoughts if thinking else None)]

  def judge(self, row: Row, completion: Completion) -> Verdict:
    """Judges the last \\boxed{}: reward 1 iff it equals the row's `expected_answer`.

    A row without `expected_answer` is scored in [0, 1] by the reasoning-gym dataset that it names.
    """
    content = completion.content
    answer = last_boxed(content, (BOXED, FBOX))
    if "expected_answer" not in row:
      return _scored(row, scorers.tagged(content) or answer or content.strip())
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
    return no_verdict("row", "neither expected_answer nor metadata.source_dataset")
  score = scorers.score(entry, answer)
  if score is None:
    dataset = entry["metadata"]["source_dataset"]
    return no_verdict("unknown", f"reasoning-gym has no dataset {dataset!r}")
  return Verdict(score, f"score {score:g}: {answer[:80]}")


def running_totals(expression: str) -> list[int]:
  """The totals after the first, second, ... term of `a + b - c`."""
  words = expression.split()
  signed = [int(words[0])]
  signed += [int(term) if sign == "+" else -int(term) for sign, term in zip(words[1::2], words[2::2], strict=True)]
  return np.cumsum(signed).tolist()


def _expression(entry: Row) -> str:
  return entry["metadata"]["expression"]


@functools.cache
def _chains(terms: int) -> Callable[[int], Row]:
  """Maps an index below POOL to a problem of `terms` one-digit terms."""
  import reasoning_gym  # Slow to import, and needed only to make rows.

  dataset = reasoning_gym.create_dataset(
    "chain_sum", min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, seed=0, size=POOL
  )
  return dataset.__getitem__


def make_domain() -> Math:
  return Math()
