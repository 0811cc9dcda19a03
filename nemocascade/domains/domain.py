"""A domain: where its rows come from, how a completion is judged, and the tools that it answers, if any."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import Completion, Row, Verdict, guarded

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

# One verdict per completion, in order. It raises nothing: what cannot be judged gets a masked verdict.
Verify = Callable[[Sequence[Row], Sequence[Completion]], list[Verdict]]


class Rows(Protocol):
  """A domain's rows: an endless list to train on, and held-out rows. Every row names its domain (`agent_ref.name`).

  Attributes:
    fingerprint: changes where the rows behind a seed and number may have changed, such as with a file's content.
  """

  fingerprint: str

  def train(self, seed: int, number: int) -> Row:
    """Row `number` of the list for this seed; numbers start at 0 and have no end."""
    ...

  def heldout(self, seed: int, start: int, count: int) -> list[Row]:
    """Held-out rows [start, start + count) for this seed; fewer where there are no more."""
    ...


class Environment(Protocol):
  """What answers the tool calls of a domain.

  Attributes:
    max_turns: assistant turns of one episode at most.
    in_threads: whether `act` may run in several threads at a time, for different worlds; if absent, it may not.
  """

  max_turns: int

  def start(self, row: Row) -> object:
    """A fresh world for one episode; the verifier gets it as `completion.world`."""
    ...

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """Runs the turn's tool calls and returns their results in order; None ends the episode."""
    ...


@dataclasses.dataclass(frozen=True)
class Failed:
  """The world of an episode whose environment could not start on the row, or failed. The verdict is masked."""

  reason: str


@dataclasses.dataclass(frozen=True)
class Domain:
  """A domain, composed of its parts.

  Attributes:
    thinking: whether completions have thoughts.
    max_turns: assistant turns of one episode at most; None takes the environment's, or 1 without one.
    beside: whether `verify` may be called for each completion alone, in several threads, while others are decoded.
      Otherwise it gets all completions of a rollout in one call at its end, in the main thread of every process.
  """

  name: str
  rows: Rows
  verify: Verify
  environment: Environment | None = None
  thinking: bool = True
  max_turns: int | None = None
  beside: bool = False

  @property
  def turns(self) -> int:
    """Assistant turns of one episode at most."""
    if self.environment is None:
      return 1
    return self.max_turns or self.environment.max_turns

  @property
  def in_threads(self) -> bool:
    """Whether `act` may run in several threads at a time."""
    return getattr(self.environment, "in_threads", False)

  def start(self, row: Row) -> object | None:
    """A fresh world for one episode, or None without an environment."""
    return None if self.environment is None else self.environment.start(row)

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """The results of the turn's tool calls; None ends the episode."""
    return None if self.environment is None or isinstance(world, Failed) else self.environment.act(world, turn)


def one_by_one(judge: Callable[[Row, Completion], Verdict]) -> Verify:
  """A Verify that judges one completion at a time. If `judge` raises, the verdict is masked.

  `judge` runs in as many threads as `limited` has processes, to keep all of them busy.
  """

  def verify(rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    pairs = list(zip(rows, completions, strict=True))
    if len(pairs) == 1:
      return [guarded(judge, *pairs[0])]
    with concurrent.futures.ThreadPoolExecutor(limited.WORKERS) as pool:
      return list(pool.map(lambda pair: guarded(judge, *pair), pairs))

  return verify
