"""The interface of a generator: prompts made by a program, and demonstrations of mixed quality on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from nemocascade import errors
from nemocascade.domains.rows import SPLITS, make_rng, prompt_messages, prompt_tools, split_of
from nemocascade.verifiers.verdict import Message, Row

# Draws tried per row. Needing more means that all prompts of the generator fall in one split: a bug.
MAX_DRAWS = 10_000
NON_THINKING_SHARE = 0.1  # Share of a thinking generator's demonstrations that have no thoughts.


@dataclasses.dataclass(frozen=True)
class Style:
  """Two ways to write a step of thought in demonstrations: careful (always right) or sloppy.

  Each step begins with a marker word that shows which way it is. Every generator has its own markers,
  so that training on one domain cannot improve another through a shared word.
  """

  careful: str  # Marker words.
  sloppy: str
  sloppy_rate: float = 0.6  # Share of sloppy steps.
  error_rate: float = 0.7  # Share of sloppy steps that are wrong.

  def draw(self, rng: np.random.Generator) -> tuple[str, bool]:
    """(marker, whether the step is wrong) of one step."""
    sloppy, errs = rng.random() < self.sloppy_rate, rng.random() < self.error_rate
    return (self.sloppy if sloppy else self.careful), bool(sloppy and errs)


class Generator:
  """The base of all generators. A subclass defines `name`, `style`, `make_row` and `demonstrate`."""

  name: str = ""
  thinking: bool = True  # Whether its demonstrations have thoughts.
  phrases: tuple[str, ...] = ()  # Strings that become one token each, with their spaces as written.
  style: Style

  def make_row(self, rng: np.random.Generator) -> Row:
    raise NotImplementedError

  def make_teaching_row(self, rng: np.random.Generator) -> Row:
    """A row to demonstrate. It may be easier than those of `make_row`, used in RL and evaluation."""
    return self.make_row(rng)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    """The messages that follow the row's input, of mixed quality; an assistant turn comes last."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GeneratedRows:
  """A generator's rows as the rows of the domain `name`: endless, and drawn anew for every seed."""

  generator: Generator
  name: str
  fingerprint: ClassVar[str] = ""  # A generator's rows change with this code alone.

  def train(self, seed: int, number: int) -> Row:
    return self._named(rows(self.generator, "train", seed, number, 1))[0]

  def heldout(self, seed: int, start: int, count: int) -> list[Row]:
    return self._named(rows(self.generator, "heldout", seed, start, count))

  def _named(self, found: list[Row]) -> list[Row]:
    return [row | {"agent_ref": {**row["agent_ref"], "name": self.name}} for row in found]


def assistant(content: str, *, thoughts: Sequence[str] | None = None, **fields: Any) -> Message:
  """An assistant message; `thoughts` are the reasoning steps before its content, if any."""
  message: Message = {"role": "assistant", "content": content, **fields}
  if thoughts is not None:
    message["reasoning_content"] = "\n".join(thoughts)
  return message


def rows(generator: Generator, split: str, seed: int, start: int, count: int, *, teaching: bool = False) -> list[Row]:
  """Rows [start, start + count) of the generator's endless, reproducible list for this split and seed.

  Args:
    teaching: draws with `make_teaching_row` instead of `make_row`.
  """
  if split not in SPLITS:
    raise errors.unknown("split", split, SPLITS)
  make = generator.make_teaching_row if teaching else generator.make_row

  def draw(i: int) -> Row:
    rng = make_rng(seed, generator.name, split, i)
    for _ in range(MAX_DRAWS):
      row = make(rng)
      if split_of(row) == split:
        return row
    raise RuntimeError(f"generator {generator.name!r}: no {split} prompt in {MAX_DRAWS} draws")

  return [draw(i) for i in range(start, start + count)]


def demonstrations(
  generator: Generator, seed: int, start: int, count: int, *, split: str = "train",
  non_thinking_share: float = NON_THINKING_SHARE,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """Yields SFT examples {messages, tools, thinking} on rows [start, start + count) of the split.

  Args:
    non_thinking_share: share of examples without thoughts, of a generator that thinks.
  """
  for i in range(start, start + count):
    (row,) = rows(generator, split, seed, i, 1, teaching=True)
    rng = make_rng(seed, generator.name, split, i, "demonstration")
    thinking = generator.thinking and bool(rng.random() >= non_thinking_share)
    messages = prompt_messages(row) + generator.demonstrate(row, rng, thinking=thinking)
    yield {"messages": messages, "tools": prompt_tools(row), "thinking": thinking}
