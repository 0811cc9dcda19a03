"""The interface of a domain: prompts, demonstrations of mixed quality, verdicts on completions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemocascade import errors
from nemocascade.domains.rows import SPLITS, prompt_messages, prompt_tools, split_of
from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import Completion, Message, Row, Verdict, guarded

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn


# Draws tried per row. Needing more means that all prompts of the domain fall in one split: a bug.
MAX_DRAWS = 10_000
NON_THINKING_SHARE = 0.1  # Share of a thinking domain's demonstrations that have no thoughts.


@dataclasses.dataclass(frozen=True)
class Style:
  """Two ways to write a step of thought in demonstrations: careful (always right) or sloppy.

  Each step begins with a marker word that shows which way it is. Every domain has its own markers,
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


class Domain:
  """The base of all domains. By default it is single-turn and judges one completion at a time.

  A subclass defines `name`, `style`, `make_row`, `demonstrate`, and `judge` or a batched `verify`.
  A domain with tools also defines `max_turns`, `start` and `act`.
  """

  name: str = ""
  thinking: bool = True  # Whether its completions have thoughts.
  phrases: tuple[str, ...] = ()  # Strings that become one token each, with their spaces as written.
  max_turns: int = 1  # Assistant turns of one episode.
  style: Style

  def make_row(self, rng: np.random.Generator) -> Row:
    raise NotImplementedError

  def make_teaching_row(self, rng: np.random.Generator) -> Row:
    """A row to demonstrate. It may be easier than those of `make_row`, used in RL and evaluation."""
    return self.make_row(rng)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    """The messages that follow the row's input, of mixed quality; an assistant turn comes last."""
    raise NotImplementedError

  def judge(self, row: Row, completion: Completion) -> Verdict:
    """The verdict on one completion. An exception means that it could not be judged."""
    raise NotImplementedError

  def verify(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """One verdict per completion, in order. A failure of `judge` becomes a masked verdict.

    `judge` runs in as many threads as `limited` has processes, to keep all of them busy.
    """
    pairs = list(zip(rows, completions, strict=True))
    with concurrent.futures.ThreadPoolExecutor(limited.WORKERS) as pool:
      return list(pool.map(lambda pair: guarded(self.judge, *pair), pairs))

  def start(self, row: Row) -> object | None:
    """A fresh world for one episode, or None if the domain has none."""
    del row
    return None

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """Runs the turn's tool calls and returns their results in order; None ends the episode."""
    del world, turn
    return None


def assistant(content: str, *, thoughts: Sequence[str] | None = None, **fields: Any) -> Message:
  """An assistant message; `thoughts` are the reasoning steps before its content, if any."""
  message: Message = {"role": "assistant", "content": content, **fields}
  if thoughts is not None:
    message["reasoning_content"] = "\n".join(thoughts)
  return message


def make_rng(*parts: object) -> np.random.Generator:
  """A generator seeded by the parts (any JSON values); the same parts give it on every machine."""
  digest = hashlib.sha256(json.dumps(parts).encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


def rows(domain: Domain, split: str, seed: int, start: int, count: int, *, teaching: bool = False) -> list[Row]:
  """Rows [start, start + count) of the domain's endless, reproducible list for this split and seed.

  Args:
    teaching: draws with `make_teaching_row` instead of `make_row`.
  """
  if split not in SPLITS:
    raise errors.unknown("split", split, SPLITS)
  make = domain.make_teaching_row if teaching else domain.make_row

  def draw(i: int) -> Row:
    rng = make_rng(seed, domain.name, split, i)
    for _ in range(MAX_DRAWS):
      row = make(rng)
      if split_of(row) == split:
        return row
    raise RuntimeError(f"domain {domain.name!r}: no {split} prompt in {MAX_DRAWS} draws")

  return [draw(i) for i in range(start, start + count)]


def demonstrations(
  domain: Domain, seed: int, start: int, count: int, *, split: str = "train",
  non_thinking_share: float = NON_THINKING_SHARE,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """Yields SFT examples {messages, tools, thinking} on rows [start, start + count) of the split.

  Args:
    non_thinking_share: share of examples without thoughts, in a domain that thinks.
  """
  for i in range(start, start + count):
    (row,) = rows(domain, split, seed, i, 1, teaching=True)
    rng = make_rng(seed, domain.name, split, i, "demonstration")
    thinking = domain.thinking and bool(rng.random() >= non_thinking_share)
    messages = prompt_messages(row) + domain.demonstrate(row, rng, thinking=thinking)
    yield {"messages": messages, "tools": prompt_tools(row), "thinking": thinking}
