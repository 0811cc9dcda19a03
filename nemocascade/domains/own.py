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
    def act(self, world, turn): ...  # -> the results of turn.tool_calls, as many texts; None ends the episode

A call of one of these functions that takes longer than `limit_s` is ended, and counts as failed.
"""

from __future__ import annotations

import copy
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from nemocascade import own_code
from nemocascade.data.chat_parse import Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.domains.domain import Domain, Environment, Failed
from nemocascade.domains.rows import prompt_tools
from nemocascade.errors import UserError, short
from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import NONFINITE, Completion, Row, Verdict, guarded, no_verdict

ONE, BATCH = ("row", "completion"), ("rows", "completions")
MAX_TURNS = 8  # Of an environment that does not say.
LIMIT_S = 60.0  # Seconds that one call of a user's function may take, unless the config says otherwise.
HANGS = 3  # After this many calls at the limit, the rest of a batch is masked without a call.
TRIALS = ("", "A trial answer.")


class OwnReward:
  """A Verify from a user's function. What it returns or raises wrongly during a run becomes masked verdicts.

  The function gets copies: what it changes in a row or a completion, nobody else sees. The first wrong result
  is named on stderr.
  """

  def __init__(self, function: Callable, *, batched: bool, where: str, limit_s: float = LIMIT_S):
    """
    Args:
      where: "FIELD='FILE.py:NAME'", for the message.
      limit_s: seconds that one call of the function may take.
    """
    self.function, self.batched, self._where, self._limit_s = function, batched, where, limit_s
    self._told, self._hung = False, 0  # _hung: calls of this batch that were ended at the limit.

  def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    rows, completions = list(rows), list(completions)
    self._hung = 0
    if self.batched:
      verdicts = self._all(rows, completions)
    else:
      verdicts = [guarded(self._one, *pair) for pair in zip(rows, completions, strict=True)]
    failed = lambda verdict: verdict.cause in ("error", NONFINITE) or verdict.reason.startswith(FAILED)
    wrong = next(filter(failed, verdicts), None)
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
    found = self._call([copies[id(row)] for row in rows], list(map(copy.copy, completions)))
    unordered = isinstance(found, str | bytes | bytearray | Mapping | Set)
    if not hasattr(found, "__len__") or unordered or len(found) != len(completions):
      raise TypeError(f"returned {_shown(found)} for {len(completions)} completions: must be a list of as many numbers")
    return list(found)

  def _one(self, row: Row, completion: Completion) -> Verdict:
    if self._hung >= HANGS:
      return no_verdict("time", f"{FAILED}: {self._hung} calls before it took over {self._limit_s:g} s")
    try:
      return as_verdict(self._score(row, completion))
    except limited.NoAnswer:  # Of a verifier of the library that the function calls.
      raise
    except (Exception, SystemExit) as error:
      self._hung += isinstance(error, own_code.TookTooLong)
      return _failed(error)

  def _score(self, row: Row, completion: Completion) -> Any:
    return self._call(copy.deepcopy(row), copy.copy(completion))

  def _call(self, *arguments: Any) -> Any:
    return own_code.call(self.function, *arguments, limit_s=self._limit_s)

  def _all(self, rows: list[Row], completions: list[Completion]) -> list[Verdict]:
    try:
      return [as_verdict(score) for score in self.scores(rows, completions)]
    except (Exception, SystemExit) as error:
      return [_failed(error)] * len(completions)


FAILED = "the reward failed"


def _failed(error: BaseException) -> Verdict:
  cause = "time" if isinstance(error, own_code.TookTooLong) else "error"
  return no_verdict(cause, f"{FAILED}: {own_code.raised(error)}")


def as_verdict(score: object) -> Verdict:
  """The Verdict that a function returned, or of the number that it returned.

  Raises:
    TypeError: it is neither, or a field of the Verdict has another type than it should. A number that is not finite
      gives a masked verdict.
  """
  if isinstance(score, Verdict):
    for name, kind in (("reason", str), ("masked", bool), ("cause", str)):
      if not isinstance(value := getattr(score, name), kind):
        raise TypeError(f"returned a Verdict with {name}={_shown(value)}: must be of type {kind.__name__}")
    return score
  number = isinstance(score, numbers.Real) or getattr(score, "shape", None) == ()
  if not number or getattr(getattr(score, "dtype", None), "kind", "") in tuple("SUOcMm"):
    raise TypeError(f"returned {_shown(score)}: must be a finite number or a Verdict")
  return Verdict(float(score), f"score {float(score):g}")


def load_reward(spec: str, *, field: str, limit_s: float = LIMIT_S) -> OwnReward:
  """The reward function that `FILE.py:NAME` names; a call of it may take `limit_s` seconds.

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
  return OwnReward(function, batched=names == BATCH, where=f"{field}={spec!r}", limit_s=limit_s)


class OwnEnvironment:
  """An Environment from a user's class. If `act` fails during a run, the model is told so as the call's result.

  A world may be a part of the row: `start` gets a copy, so that no episode changes the row of another. The first
  failure of `act` is named on stderr too.
  """

  def __init__(self, inner: Any, *, where: str, limit_s: float = LIMIT_S):
    """
    Args:
      where: "FIELD='FILE.py:CLASS'", for the message.
      limit_s: seconds that one call of a method may take.
    """
    self._inner, self._where, self._limit_s, self._told = inner, where, limit_s, False
    self.max_turns = getattr(inner, "max_turns", MAX_TURNS)
    self.in_threads = bool(getattr(inner, "in_threads", False))

  def start(self, row: Row) -> object:
    try:
      return self.try_start(row)
    except (Exception, SystemExit) as error:
      return Failed(f"the environment failed to start: {own_code.raised(error)}")

  def act(self, world: object, turn: Turn) -> list[str] | None:
    try:
      return self.try_act(world, turn)
    except (Exception, SystemExit) as error:
      said = own_code.raised(error)
      if not self._told:
        self._told = True
        print(f"warning: {self._where}: {said}; the model gets such errors as results of its calls", file=sys.stderr)
      return [f"error: {said}"] * len(turn.tool_calls) or None

  def try_start(self, row: Row) -> object:
    """A fresh world from the class itself. What it raises passes."""
    return own_code.call(self._inner.start, copy.deepcopy(row), limit_s=self._limit_s)

  def try_act(self, world: object, turn: Turn) -> list[str] | None:
    """What the class itself answers. What it raises passes, and WrongResults."""
    found = own_code.call(self._inner.act, world, turn, limit_s=self._limit_s)
    if found is None:
      return None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
      raise WrongResults(f"act returned {_shown(found)}: must be a list of texts, or None")
    if not found or len(found) != len(turn.tool_calls):
      raise WrongResults(
        f"act returned {_shown(found)} for {len(turn.tool_calls)} calls: must be one text a call, or None"
      )
    return found


class WrongResults(TypeError):
  """`act` returned something else than None or one text for each call."""


def load_environment(spec: str, *, field: str, limit_s: float = LIMIT_S) -> Environment:
  """An instance of the class that `FILE.py:NAME` names; a call of its methods may take `limit_s` seconds.

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
  return OwnEnvironment(inner, where=f"{field}={spec!r}", limit_s=limit_s)


def try_environment(domain: Domain, row: Row, spec: str, *, field: str, place: str) -> None:
  """Starts the domain's own environment on a row, and gives it a turn without calls and one with a call.

  The call has no arguments, so it may raise what wrong arguments cause: LookupError, TypeError or ValueError.

  Args:
    spec: what `field` names, for messages. place: where the row stands.

  Raises:
    UserError: it raises, or returns what it must not; the message names file, class and row.
  """
  environment = domain.environment
  assert isinstance(environment, OwnEnvironment)
  name = next((tool.get("function", tool).get("name") for tool in prompt_tools(row)), "no_such_tool")
  try:
    environment.try_act(environment.try_start(row), Turn(None, "done", (), None, True))
    world = environment.try_start(row)
    try:
      environment.try_act(world, Turn(None, "", (ToolCall(str(name), {}),), None, True))
    except WrongResults:
      raise
    except (LookupError, TypeError, ValueError):
      pass
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
