"""Verdicts beside decoding: completions are judged in threads as soon as their episodes have ended."""

from collections.abc import Mapping
from typing import Any

from nemocascade.domains.domain import Domain, Failed
from nemocascade.rollout.beside import Beside, TookTooLong
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

AT_ONCE = 64  # Completions that are judged at the same time,
AT_FIRST = 2  # and of those whose judging has just begun.
VERDICT_S = 3600.0

Place = tuple[int, int]  # (q, g)


class Judging:
  """Judges completions one at a time, in the order in which they come. A verdict depends on its completion alone.

  A verifier that raises, or takes too long, gives its completion a masked verdict.

  Args:
    limit_s: time limit of a verdict.

  Attributes:
    early: verdicts that were given before `wait` was called.
    seconds: time that verdicts have taken, summed over them.
  """

  def __init__(self, limit_s: float = VERDICT_S):
    self.limit_s, self.early, self.seconds = limit_s, 0, 0.0
    self._beside = Beside(AT_ONCE, AT_FIRST)
    self._given: dict[Any, Verdict] = {}  # By (q, g).

  def start(self, place: Place, domain: Domain, row: Row, completion: Completion) -> None:
    """Judges the completion in a thread. `domain.beside` must be true."""
    if isinstance(completion.world, Failed):
      self._given[place] = no_verdict("error", completion.world.reason)
    else:
      self._beside.start(place, lambda: domain.verify([row], [completion])[0], self.limit_s)

  def look(self, wait_s: float = 0.0) -> None:
    """Takes the verdicts that have been given, and leaves those behind that took too long."""
    for place, verdict, error, seconds in self._beside.ended(wait_s):
      self.seconds += seconds
      if error is not None:
        cause = "time" if isinstance(error, TookTooLong) else "error"
        verdict = no_verdict(cause, f"verifier failed: {type(error).__name__}: {error}")
      self._given[place] = verdict

  def end_of_decoding(self) -> None:
    """Counts the verdicts that are `early`."""
    self.look()
    self.early = len(self._given)

  def wait(self) -> Mapping[Place, Verdict]:
    """All verdicts by (q, g)."""
    while len(self._beside):
      self.look(1.0)
    return self._given
