"""Work beside decoding: tools and verifiers run in threads while the devices decode."""

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

SHORT_S = 0.1  # A function that runs longer seems to wait for something.


class TookTooLong(Exception):
  """A piece of work met its time limit. Its thread is left behind, and what it returns is dropped."""


@dataclasses.dataclass(eq=False)
class _Work:
  name: Hashable
  call: Callable[[], Any]
  limit_s: float
  began: float = 0.0  # Once it runs.

  @property
  def deadline(self) -> float:
    return self.began + self.limit_s


class Beside:
  """Runs functions in threads and hands out their results in the order in which they end. Threads are
  daemons: one that hangs does not keep the process from ending.

  Args:
    at_once: functions that run at a time; others wait. One that met its limit does not count.
    at_first: so many of them may be at their first SHORT_S; 0 allows all. Short functions, of which Python runs one
      at a time, then do not keep the main thread waiting. Those that wait for something get more and more threads.
  """

  def __init__(self, at_once: int, at_first: int = 0):
    self.at_once, self.at_first = at_once, at_first or at_once
    self._ended: queue.SimpleQueue[tuple[_Work, Any, Exception | None, float]] = queue.SimpleQueue()
    self._lock = threading.Lock()  # It guards the next two.
    self._waiting: collections.deque[_Work] = collections.deque()
    self._running: set[_Work] = set()
    self._open: set[Hashable] = set()  # Names whose results were not handed out.

  def __len__(self) -> int:
    """The number of pieces of work whose results were not handed out."""
    return len(self._open)

  def start(self, name: Hashable, call: Callable[[], Any], limit_s: float) -> None:
    """Queues `call`, to run for at most `limit_s` seconds. The next call of `ended` starts threads for what is queued.

    Short functions then share a few threads. When each verdict started a thread, the host's part of a step of the tiny
    multi-domain RL took 117 ms instead of 63.

    Args:
      name: no other piece of work has it now.
    """
    self._open.add(name)
    with self._lock:
      self._waiting.append(_Work(name, call, limit_s))

  def _go_on(self) -> None:
    while (work := self._next()) is not None:
      threading.Thread(target=self._run, args=(work,), daemon=True).start()

  def _next(self) -> _Work | None:
    """The next piece of work, which begins now, if there is one and not too many run."""
    with self._lock:
      now = time.monotonic()
      long = sum(now - work.began > SHORT_S for work in self._running)
      room = min(self.at_once, long + max(self.at_first, long))  # The number that runs may double each SHORT_S.
      if not self._waiting or len(self._running) >= room:
        return None
      work = self._waiting.popleft()
      work.began = now
      self._running.add(work)
      return work

  def _stop(self, work: _Work) -> bool:
    """Notes that the work does not run any more; False if that was known."""
    with self._lock:
      known = work not in self._running
      self._running.discard(work)
      return not known

  def _run(self, work: _Work | None) -> None:
    """Runs pieces of work until none is left, or until one has met its limit."""
    while work is not None:
      began = time.monotonic()
      try:
        result, error = work.call(), None
      except (Exception, SystemExit) as raised:  # noqa: BLE001  Handed to the caller of `ended`.
        result, error = None, raised if isinstance(raised, Exception) else RuntimeError("SystemExit")
      if not self._stop(work):  # It was left behind.
        return
      self._ended.put((work, result, error, time.monotonic() - began))
      work = self._next()

  def ended(self, wait_s: float = 0.0) -> list[tuple[Hashable, Any, Exception | None, float]]:
    """(name, result, error, seconds) of what has ended since the last call; error is None if the function returned.

    Args:
      wait_s: waits so long for the first one, if something runs; less where something waits to run.
    """
    self._go_on()
    found: list[tuple[Hashable, Any, Exception | None, float]] = []
    wait = bool(self._open) and wait_s > 0
    with contextlib.suppress(queue.Empty):
      while True:
        work, result, error, seconds = self._ended.get(wait, max(min(wait_s, self._soonest()), 1e-3) if wait else None)
        wait = False
        found.append((work.name, result, error, seconds))
    with self._lock:
      late = [work for work in self._running if time.monotonic() > work.deadline]
    for work in late:
      if self._stop(work):
        found.append((work.name, None, TookTooLong(f"no result within {work.limit_s:g} s"), work.limit_s))
    self._open -= {name for name, *_ in found}
    self._go_on()
    return found

  def _soonest(self) -> float:
    """Seconds until the first piece of work that runs meets its limit, or, while others wait, until more may run."""
    with self._lock:
      limit = min((work.deadline for work in self._running), default=0.0) - time.monotonic()
      return min(limit, SHORT_S) if self._waiting else limit
