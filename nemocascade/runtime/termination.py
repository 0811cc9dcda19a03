"""SIGTERM: the run saves at the end of the step that is under way, in all processes the same, and ends.

The signal is noticed at once, also while the main thread computes or compiles. If no step ends within the grace, or
none has begun, the run ends without saving; what it had saved before stays.
"""

import signal
import socket
import threading

from jax.experimental import multihost_utils

from nemocascade.errors import TERMINATED, Terminated
from nemocascade.runtime.ending import RESUME, Ending, end
from nemocascade.runtime.link import Link

GRACE_S = 20.0


class Termination:
  """What this process knows of SIGTERM."""

  def __init__(self) -> None:
    self.link: Link | None = None  # To the other processes, if there are any.
    self.saves = False  # Whether a loop runs that asks `stopping` after each step.
    self._grace_s = GRACE_S
    self._listens = False
    self._asked = threading.Event()
    self._timer: threading.Timer | None = None
    self._places = 0

  def listen(self, grace_s: float) -> None:
    """From now on SIGTERM is noticed. Call it from the main thread.

    Args:
      grace_s: time limit from the signal to the end of a step, in a run of one process. The hub has that of others.
    """
    self._grace_s = grace_s
    if self._listens:
      return
    self._listens = True
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def wait() -> None:
      while data := reading.recv(64):
        if signal.SIGTERM in data:
          self._act()

    # Python runs handlers in the main thread, between two bytecodes. The number of the signal is written at once.
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    threading.Thread(target=wait, name="sigterm", daemon=True).start()
    self.take_back()

  def take_back(self) -> None:
    """Takes the signal back from a library that has taken it, if `listen` was called."""
    if self._listens:
      signal.signal(signal.SIGTERM, lambda *_: None)
      signal.siginterrupt(signal.SIGTERM, False)  # System calls of other threads, such as gloo's, go on.

  def _act(self) -> None:
    if self.link is not None:
      self.link.terminated()
    elif not self.saves:
      end(Ending(f"stopped by SIGTERM before its first step; {RESUME}", TERMINATED))
    elif not self._asked.is_set():
      line = f"stopped by SIGTERM, and no step ended within {self._grace_s:g} s (--grace_s); {RESUME}"
      self._timer = threading.Timer(self._grace_s, end, [Ending(line, TERMINATED)])
      self._timer.daemon = True
      self._timer.start()
      self._asked.set()

  def stopping(self) -> bool:
    """Whether the caller must save now, and end.

    All processes must call it at the same places. They get the same answer.
    """
    if self.link is None:
      if self._asked.is_set() and self._timer is not None:
        self._timer.cancel()
      return self._asked.is_set()
    self._places += 1
    # Where a runtime gives notice of preemption by other means than SIGTERM, JAX agrees on a step.
    noticed = multihost_utils.reached_preemption_sync_point(self._places)
    return self.link.passing() or noticed


_this = Termination()
listen, take_back, stopping = _this.listen, _this.take_back, _this.stopping


def tell(link: Link) -> None:
  """From now on SIGTERM is told to the other processes."""
  _this.link = link


def saves_at_steps() -> None:
  """Says that a loop begins that asks `stopping` after each step. Before, SIGTERM ends the run at once."""
  _this.saves = True
  if _this.link is not None:
    _this.link.saves = True


def terminated(saved: object) -> Terminated:
  """The error to end the run with, after `stopping` and saving."""
  return Terminated(f"stopped by SIGTERM, saved in {saved}; {RESUME}")
