"""Pairs of answers that a reward model is trained on: generated ones, or rows of files."""

import dataclasses
import sys
from typing import Protocol

from nemocascade.domains.row_files import FileRows, open_rows
from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError, short
from nemocascade.generated.preference import preference_pairs
from nemocascade.verifiers.verdict import Message, Row

GENERATED = "generated:preference"

Pair = tuple[list[Message], str, str]  # Prompt, the better answer, the other one.


class Pairs(Protocol):
  """The pairs of a run."""

  def train(self, start: int, count: int) -> list[Pair]:
    """The training pairs number `start` and on."""
    ...

  def heldout(self, count: int) -> list[Pair]:
    """At most `count` held-out pairs, the same at every call."""
    ...


@dataclasses.dataclass(frozen=True)
class GeneratedPairs:
  """Pairs that a program makes, for the tiny scale."""

  seed: int

  def train(self, start: int, count: int) -> list[Pair]:
    return preference_pairs(self.seed, count, "train", start)

  def heldout(self, count: int) -> list[Pair]:
    return preference_pairs(self.seed, count, "heldout")


@dataclasses.dataclass(frozen=True)
class FilePairs:
  """Pairs of JSON lines with a prompt (`messages` or `prompt`) and the texts `chosen` and `rejected`.

  Every epoch has a new order.
  """

  rows: FileRows
  seed: int

  def train(self, start: int, count: int) -> list[Pair]:
    return [_pair(self.rows.train(self.seed, number)) for number in range(start, start + count)]

  def heldout(self, count: int) -> list[Pair]:
    return [_pair(row) for row in self.rows.heldout(self.seed, 0, count)]


def open_pairs(seed: int, least: int, *, rows: str, heldout: str = "") -> Pairs:
  """The pairs of a config's section `source`.

  Args:
    least: held-out pairs that there must be.
    rows: GENERATED, or a path or glob of JSON lines.
    heldout: files of held-out pairs; "" holds prompts of `rows` out by their hash.

  Raises:
    UserError: no file is found, a row is malformed, or too few rows are left.
  """
  if rows == GENERATED:
    return GeneratedPairs(seed)
  found = open_rows("pairs", rows, heldout, left_out=_left_out, left_out_of_heldout=_left_out, field="source")
  if summary := found.training.summary():
    print(f"source.rows: left out {summary}", file=sys.stderr)
  if len(found.held) < least:
    raise UserError(
      f"source.heldout={heldout!r}: {len(found.held)} pairs are held out, and pairs={least} are scored together: give"
      " more rows, or fewer pairs"
    )
  return FilePairs(found, seed)


def _left_out(row: Row) -> str:
  for name in ("chosen", "rejected"):
    if not isinstance(row.get(name), str):
      raise UserError(f"{name}: must be a text, is {short(repr(row.get(name)))}")
  return "with two equal answers" if row["chosen"] == row["rejected"] else ""


def _pair(row: Row) -> Pair:
  return prompt_messages(row), row["chosen"], row["rejected"]
