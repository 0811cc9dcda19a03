"""Verdicts: what a verifier is given, and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nemocascade.sandbox import limited

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

# A row of the released data: responses_create_params {input, tools?}, agent_ref {type, name}, and
# the fields of its domain.
Row = dict[str, Any]


Message = dict[str, Any]


@dataclasses.dataclass
class Completion:
  """The assistant turns of one episode, and the world they acted on (None if there is none)."""

  turns: tuple[Turn, ...]
  world: object | None = None
  results: tuple[tuple[str, ...], ...] = ()  # What the tools answered to the calls of each turn, from the first on.

  @property
  def content(self) -> str:
    """The last turn's text after its thoughts: the only text that is judged."""
    return self.turns[-1].content if self.turns else ""

  @property
  def reasoning(self) -> str | None:
    return self.turns[-1].reasoning if self.turns else None

  @property
  def finished(self) -> bool:
    """Whether the model ended the last turn itself, before the length limit."""
    return bool(self.turns) and self.turns[-1].finished

  @property
  def text(self) -> str:
    """All turns with their thoughts, their calls and what the tools answered, for logs."""
    parts = []
    for i, turn in enumerate(self.turns):
      if turn.reasoning is not None:
        parts.append(f"<think>\n{turn.reasoning}\n</think>\n")
      parts.append(turn.content)
      parts += [f"{call.name}({call.arguments})" for call in turn.tool_calls]
      parts += [
        f"\n<tool_response>\n{result}\n</tool_response>\n" for results in self.results[i : i + 1] for result in results
      ]
    return "".join(parts)


NONFINITE = "nonfinite"  # Cause of masking: the reward is NaN or infinite, or would be in fp32.
LARGEST = float.fromhex("0x1.fffffep+127")  # In fp32.


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A reward and the reason for it, for logs.

  A masked verdict means that the verifier could not judge; the sample is not trained on. `cause`
  says why in one word, and masked samples are counted per cause:
    the causes of limited.NoAnswer ("time", "memory", "crash", "error", "evaluation"),
    "unknown": the verifier lacks the row's mode, format or id,
    "row": the row cannot be judged,
    NONFINITE: the reward was not finite in fp32,
    "": any other reason.

  A reward that is not finite in fp32 is replaced by 0 and masked, so that it cannot enter the statistics of a
  group or a batch.
  """

  reward: float
  reason: str
  masked: bool = False
  cause: str = ""

  def __post_init__(self):
    if not (math.isfinite(self.reward) and abs(self.reward) <= LARGEST):
      for name, value in (("reward", 0.0), ("masked", True), ("cause", NONFINITE)):
        object.__setattr__(self, name, value)

  @property
  def success(self) -> bool:
    """Whether the reward is full (at least 1), as pass@k counts. A partial reward is no success."""
    return not self.masked and self.reward >= 1


def no_verdict(cause: str, reason: str) -> Verdict:
  """A masked verdict."""
  return Verdict(0.0, reason[:200], masked=True, cause=cause)


def guarded(judge: Callable[[Row, Completion], Verdict], row: Row, completion: Completion) -> Verdict:
  """The verdict of `judge`, or a masked one if it raises."""
  try:
    return judge(row, completion)
  except limited.NoAnswer as error:
    return no_verdict(error.cause, f"no answer: {error}")
  except (Exception, SystemExit) as error:  # noqa: BLE001  No completion may stop a run.
    return no_verdict("error", f"verifier failed: {type(error).__name__}: {error}")
