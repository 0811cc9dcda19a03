"""A scheduler in a thread of its own, which answers the requests of many threads."""

import contextlib
import queue
import threading
from collections.abc import Generator

from nemocascade.errors import UserError
from nemocascade.rollout.scheduler import Request, Scheduler

WAIT_S = 0.25  # A stream without new tokens yields after this time, so that its reader may end it.

_Given = queue.SimpleQueue  # A stream gets lists of new tokens from it, an exception, or None at the end.


class Service:
  """Answers requests of any thread; several are decoded together. Close it, or use it in a `with` statement.

  Args:
    scheduler: used by nobody else.

  Attributes:
    room: the most tokens of a request, new ones included.
  """

  def __init__(self, scheduler: Scheduler):
    self.scheduler, self.room = scheduler, scheduler.engine.T
    self._asked: queue.SimpleQueue[tuple[Request | None, _Given] | None] = queue.SimpleQueue()
    self._open: dict[_Given, tuple[int, int]] = {}  # Of each stream: the request's number, the tokens that were given.
    self._error: Exception | None = None  # What has ended the thread.
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def __enter__(self) -> "Service":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the thread; streams that are open end."""
    self._asked.put(None)
    self._thread.join()

  def stream(self, request: Request) -> Generator[list[int], None, None]:
    """Yields the new tokens as they come, and an empty list where none has come for a while.

    Closing it, e.g. because its reader has left, cancels the request, whether it is decoded or waits.

    Raises:
      UserError: what is asked for cannot be, which is raised before the first item; or the logits are not finite.
      RuntimeError: an error has ended the thread.
    """
    self.scheduler.check(request)
    return self._stream(request)

  def _stream(self, request: Request) -> Generator[list[int], None, None]:
    given: _Given = _Given()
    self._asked.put((request, given))
    try:
      while self._thread.is_alive() or not given.empty():
        try:
          told = given.get(timeout=WAIT_S)
        except queue.Empty:
          told = []
        if told is None:
          return
        if isinstance(told, Exception):
          raise told
        yield told
      self.check()
    finally:
      self._asked.put((None, given))

  def check(self) -> None:
    """Raises RuntimeError if an error has ended the thread."""
    if self._error is not None:
      raise RuntimeError(f"answering requests has failed: {self._error}") from self._error

  def _run(self) -> None:
    try:
      while self._take():
        self.scheduler.step()
        self._tell()
    except Exception as error:  # noqa: BLE001  The streams raise it.
      self._error = error
    else:
      for given in self._open:
        given.put(None)

  def _take(self) -> bool:
    """Takes what has been asked, waits for it if nothing is to be decoded; False if the service is closed."""
    with contextlib.suppress(queue.Empty):
      while True:
        asked = self._asked.get(block=not self.scheduler.open)
        if asked is None:
          return False
        request, given = asked
        if request is not None:
          self._open[given] = self.scheduler.submit(request), 0
        elif given in self._open:
          self.scheduler.forget(self._open.pop(given)[0])
    return True

  def _tell(self) -> None:
    """Gives the streams their new tokens, and ends those whose requests have ended."""
    for given, (number, before) in list(self._open.items()):
      answer = self.scheduler.answer(number)
      if new := answer.tokens[before:]:
        given.put(new)
      self._open[given] = number, len(answer.tokens)
      if answer.finish_reason:
        given.put(UserError("the model's logits are not finite") if answer.finish_reason == "error" else None)
        self.scheduler.forget(self._open.pop(given)[0])
