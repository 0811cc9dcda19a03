"""A user's own reward function and environment as the parts of a domain, and the trial calls that check them.

A reward is a function in a Python file, of one completion, `(row, completion)`, or of a batch, `(rows, completions)`;
the names of its two parameters say which. `row` is the row as its file has it, in the released form; `completion` is a
`nemocascade.verifiers.verdict.Completion`: `completion.content` is the answer, the text of the last turn after its
thoughts; `completion.reasoning` the thoughts; `completion.turns` all turns with their tool calls;
`completion.finished` whether the model ended the last turn itself; `completion.world` the environment's world, or None.
It returns a finite number or a Verdict; of a batch, a list of them, one for each completion in order.

An environment is a class that is made without arguments:

  class Shop:
    max_turns = 4                    # Assistant turns of one episode at most; 8 unless it says so.
    def start(self, row): ...        # -> a fresh world for one episode, any object
    def act(self, world, turn): ...  # -> the results of turn.tool_calls, a list of texts; None ends the episode
"""

from __future__ import annotations

import contextlib
import copy
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from nemocascade import own_code
from nemocascade.data.chat_parse import Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.domains.domain import Domain, Environment, NotStarted
from nemocascade.domains.rows import prompt_tools
from nemocascade.errors import UserError, short
from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import NONFINITE, Completion, Row, Verdict, guarded, no_verdict

ONE, BATCH = ("row", "completion"), ("rows", "completions")
MAX_TURNS = 8  # Of an environment that does not say.
TRIALS = ("", "A trial answer.")


class OwnReward:
  """A Verify from a user's function. What it returns or raises wrongly during a run becomes masked verdicts.

  The function gets copies: what it changes in a row or a completion, nobody else sees. The first wrong result
  is named on stderr.
  """

  def __init__(self, function: Callable, *, batched: bool, where: str):
    """
    Args:
      where: "FIELD='FILE.py:NAME'", for the message.
    """
    self.function, self.batched, self._where = function, batched, where
    self._told = False

  def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    rows, completions = list(rows), list(completions)
    if self.batched:
      verdicts = self._all(rows, completions)
    else:
      verdicts = [guarded(self._one, *pair) for pair in zip(rows, completions, strict=True)]
    wrong = next((verdict for verdict in verdicts if verdict.cause in ("error", NONFINITE)), None)
    if wrong and not self._told:
      self._told = True
      print(
        f"warning: {self._where}: {wrong.reason}; such completions are masked (rollout/masked_{wrong.cause})",
        file=sys.stderr,
      )
    return verdicts

  def scores(self, rows: list[Row], completions: list[Completion]) -> list[Any]:
    """What the function itself returns for each completion; its exceptions pass."""
    if not self.batched:
      return [self._score(*pair) for pair in zip(rows, completions, strict=True)]
    copies = {id(row): copy.deepcopy(row) for row in rows}  # Completions of one row still share it.
    found = self.function([copies[id(row)] for row in rows], list(map(copy.copy, completions)))
    unordered = isinstance(found, str | bytes | bytearray | Mapping | Set)
    if not hasattr(found, "__len__") or unordered or len(found) != len(completions):
      raise TypeError(f"returned {_shown(found)} for {len(completions)} completions: must be a list of as many numbers")
    return list(found)

  def _one(self, row: Row, completion: Completion) -> Verdict:
    try:
      return as_verdict(self._score(row, completion))
    except limited.NoAnswer:  # Of a verifier of the library that the function calls.
      raise
    except (Exception, SystemExit) as error:
      return _failed(error)

  def _score(self, row: Row, completion: Completion) -> Any:
    return self.function(copy.deepcopy(row), copy.copy(completion))

  def _all(self, rows: list[Row], completions: list[Completion]) -> list[Verdict]:
    try:
      return [as_verdict(score) for score in self.scores(rows, completions)]
    except (Exception, SystemExit) as error:
      return [_failed(error)] * len(completions)


def _failed(error: BaseException) -> Verdict:
  return no_verdict("error", f"the reward failed: {own_code.raised(error)}")


def as_verdict(score: object) -> Verdict:
  """The Verdict that a function returned, or of the number that it returned.

  Raises:
    TypeError: it is neither. A number that is not finite gives a masked verdict.
  """
  if isinstance(score, Verdict):
    return score
  number = isinstance(score, numbers.Real) or getattr(score, "shape", None) == ()
  if not number or getattr(getattr(score, "dtype", None), "kind", "") in tuple("SUOcMm"):
    raise TypeError(f"returned {_shown(score)}: must be a finite number or a Verdict")
  return Verdict(float(score), f"score {float(score):g}")


def load_reward(spec: str, *, field: str) -> OwnReward:
  """The reward function that `FILE.py:NAME` names.

  Raises:
    UserError: it cannot be loaded, or its parameters are neither (row, completion) nor (rows, completions).
  """
  function = own_code.load(spec, field=field)
  names = own_code.parameters(function)[:2]
  if names not in (ONE, BATCH):
    raise UserError(
      f"{field}={spec!r}: its parameters are ({', '.join(own_code.parameters(function))}); they must be"
      " (row, completion) for one completion, or (rows, completions) for a batch"
    )
  return OwnReward(function, batched=names == BATCH, where=f"{field}={spec!r}")


class OwnEnvironment:
  """An Environment from a user's class. If `act` fails during a run, the model is told so as the call's result.

  A world may be a part of the row: `start` gets a copy, so that no episode changes the row of another. The first
  failure of `act` is named on stderr too.
  """

  def __init__(self, inner: Any, *, where: str):
    """
    Args:
      where: "FIELD='FILE.py:CLASS'", for the message.
    """
    self.inner, self._where, self._told = inner, where, False
    self.max_turns = getattr(inner, "max_turns", MAX_TURNS)

  def start(self, row: Row) -> object:
    try:
      return self.inner.start(copy.deepcopy(row))
    except (Exception, SystemExit) as error:
      return NotStarted(f"the environment failed to start: {own_code.raised(error)}")

  def act(self, world: object, turn: Turn) -> list[str] | None:
    try:
      return _texts(self.inner.act(world, turn))
    except (Exception, SystemExit) as error:
      said = own_code.raised(error)
      if not self._told:
        self._told = True
        print(f"warning: {self._where}: {said}; the model gets such errors as results of its calls", file=sys.stderr)
      return [f"error: {said}"] * max(1, len(turn.tool_calls))


def _texts(found: object) -> list[str] | None:
  """What `act` returned, if it is what it must be; raises TypeError otherwise."""
  if found is not None and not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
    raise TypeError(f"act returned {_shown(found)}: must be a list of texts, or None")
  return found


def load_environment(spec: str, *, field: str) -> Environment:
  """An instance of the class that `FILE.py:NAME` names.

  Raises:
    UserError: it cannot be loaded or made without arguments, or lacks start(row) or act(world, turn).
  """
  class_ = own_code.load(spec, field=field)
  try:
    inner = class_()
  except (Exception, SystemExit) as error:
    raise UserError(f"{field}={spec!r}: cannot be made without arguments: {own_code.raised(error)}") from error
  for method, takes in (("start", 1), ("act", 2)):
    found = getattr(inner, method, None)
    if not callable(found) or len(own_code.parameters(found)) < takes:
      raise UserError(f"{field}={spec!r}: lacks a method: must have start(self, row) and act(self, world, turn)")
  turns = getattr(inner, "max_turns", MAX_TURNS)
  if not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
    raise UserError(f"{field}={spec!r}: max_turns={turns!r}: must be a whole number of at least 1")
  return OwnEnvironment(inner, where=f"{field}={spec!r}")


def try_environment(domain: Domain, row: Row, spec: str, *, field: str, place: str) -> None:
  """Starts the domain's own environment on a row, and gives it a turn without calls and one with a call.

  The call has no arguments, so it may raise what wrong arguments cause: LookupError, TypeError or ValueError.

  Args:
    spec: what `field` names, for messages. place: where the row stands.

  Raises:
    UserError: it raises, or returns what it must not; the message names file, class and row.
  """
  assert isinstance(domain.environment, OwnEnvironment)
  name = next((tool.get("function", tool).get("name") for tool in prompt_tools(row)), "no_such_tool")
  inner = domain.environment.inner
  try:
    _texts(inner.act(inner.start(copy.deepcopy(row)), Turn(None, "done", (), None, True)))
    world, found = inner.start(copy.deepcopy(row)), None
    with contextlib.suppress(LookupError, TypeError, ValueError):
      found = inner.act(world, Turn(None, "", (ToolCall(str(name), {}),), None, True))
    _texts(found)
  except (Exception, SystemExit) as error:
    raise UserError(f"{field}={spec!r}: on the row of {place}: {own_code.raised(error)}") from error


def try_reward(domain: Domain, row: Row, spec: str, *, field: str, place: str) -> None:
  """Calls the domain's own reward on a row with an empty and a non-empty completion.

  Args:
    spec: what `field` names, for messages. place: where the row stands.

  Raises:
    UserError: it raises, or returns no finite number for one of them; the message names file, function and row.
  """
  assert isinstance(domain.verify, OwnReward)
  where = f"{field}={spec!r}: on the row of {place}"
  trials = [Completion((Turn("", text, (), None, True),), domain.start(row)) for text in TRIALS]
  try:
    scores = domain.verify.scores([row, row], trials)
    verdicts = [as_verdict(score) for score in scores]
  except (Exception, SystemExit) as error:
    raise UserError(f"{where}: {own_code.raised(error)}") from error
  for text, score, verdict in zip(TRIALS, scores, verdicts, strict=True):
    if verdict.cause == NONFINITE:
      what = f"the completion {text!r}" if text else "an empty completion"
      raise UserError(f"{where}: returned {_shown(score)} for {what}: must be a finite number or a Verdict")


def _shown(value: object) -> str:
  size = f" of length {len(value)}" if hasattr(value, "__len__") and not isinstance(value, str) else ""
  return short(f"{type(value).__name__}{size} {value!r}", 80)
