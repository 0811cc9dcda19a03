"""Mathematics: chains of additions from reasoning-gym."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.errors import UserError
from nemocascade.generated import generator
from nemocascade.verifiers.boxed import box
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("sum", "about", error_rate=0.65)
INSTRUCTION = "Solve it and put the answer inside \\boxed{}:"
MOST_DRAWS = 100_000  # Problems that are drawn for one row.
POOL = 1 << 30  # Size of the reasoning-gym dataset; a problem is generated from its index.


@dataclasses.dataclass
class Math(generator.Generator):
  """Each thought adds one term; one that errs has a total too high by 1, which the next ones use.

  A thought is a full equation, `8 - 2 = 6`, so that finding the term and adding it are two separate
  small steps.
  """

  name: str = "math"
  style: generator.Style = STYLE
  terms: tuple[int, int] = (3, 4)  # Number of terms of a short and of a long problem.
  long_share: float = 0.35  # Share of long problems.
  largest_total: int = 9  # Running totals are 0 .. 9, which keeps the addition table small.
  phrases: tuple[str, ...] = (
    f"{INSTRUCTION} ", "sum ", "about ", " + ", " - ", " =", " = ", "\\boxed{",
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    chains = _chains(self.terms[int(rng.random() < self.long_share)])
    for _ in range(MOST_DRAWS):
      entry = chains(int(rng.integers(POOL)))
      if all(0 <= total <= self.largest_total for total in running_totals(_expression(entry))):
        break
    else:
      raise UserError(
        f"tasks.math.terms={self.terms} with largest_total={self.largest_total}: no problem in {MOST_DRAWS} has all"
        " its running totals in this range; give fewer terms, or raise largest_total"
      )
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
    return [generator.assistant(box(total), thoughts=thoughts if thinking else None)]


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
