"""Runs untrusted programs without network, on a read-only system, with little time and memory."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import weakref
from collections.abc import Sequence

from nemocascade import errors
from nemocascade.sandbox.program import REPEATABLE, Limits, Program, Result
from nemocascade.sandbox.worker import Worker, ways

REMEMBERED = 1 << 14  # Results in the cache.
LONGEST_REMEMBERED = 10_000  # Results with more characters of stdout are not cached.
TOO_DEEP = Result("unstarted", reason="the arguments of a call are nested too deep")
PROBE = Program({"main.py": "import decimal, json, os; os.listdir('/usr/lib')"})


class Sandbox:
  """Runs programs in parallel, and caches repeatable results."""

  def __init__(self, *, workers: int = 2, **limits: float):
    """Starts the sandbox and checks that it works.

    Args:
      workers: programs that run at the same time.
      limits: fields of Limits.

    Raises:
      UserError: a setting is wrong, or programs cannot be confined on this machine.
    """
    for name in limits:
      if name not in Limits.__dataclass_fields__:
        raise errors.unknown("field of sandbox", name, ["workers", *vars(Limits())])
    for name, value in {"workers": workers, **limits}.items():
      if not value > 0:
        raise errors.UserError(f"sandbox.{name}={value!r} must be above 0")
    self.workers, self.limits = workers, Limits(**limits)  # type: ignore[arg-type]
    self._remembered: collections.OrderedDict[bytes, Result] = collections.OrderedDict()
    self._running: dict[bytes, concurrent.futures.Future[Result]] = {}  # By the program's digest.
    self._lock = threading.Lock()
    # Bubblewrap's --die-with-parent kills a confined process when the thread that started it ends.
    # So the threads must last as long as the sandbox.
    self._pool = concurrent.futures.ThreadPoolExecutor(workers)
    self._own = threading.local()
    self._workers: list[Worker] = []
    weakref.finalize(self, _close, self._pool, self._workers)
    self._probe()

  def run(self, program: Program) -> Result:
    return self.run_batch([program])[0]

  def run_batch(self, programs: Sequence[Program]) -> list[Result]:
    """Results in order. Equal programs run once, also across batches while one runs or if its result is cached."""
    digests = [_digest(program) for program in programs]
    with self._lock:
      asked = {
        digest: TOO_DEEP if digest is None else self._ask(digest, program)
        for digest, program in zip(digests, programs, strict=True)
      }
    known = {digest: x if isinstance(x, Result) else x.result() for digest, x in asked.items()}
    return [known[digest] for digest in digests]

  def _ask(self, digest: bytes, program: Program) -> Result | concurrent.futures.Future[Result]:
    """The cached result, or the run of an equal program, which starts here if there is none. Call it with the lock."""
    if digest in self._remembered:
      self._remembered.move_to_end(digest)
      return self._remembered[digest]
    if digest not in self._running:
      self._running[digest] = self._pool.submit(self._run_and_remember, digest, program)
    return self._running[digest]

  def _run_and_remember(self, digest: bytes, program: Program) -> Result:
    result = None
    try:
      result = self._run_twice(program)
      return result
    finally:
      with self._lock:
        self._running.pop(digest)
        if result is not None and result.status in REPEATABLE and len(result.stdout) <= LONGEST_REMEMBERED:
          self._remembered[digest] = result
        while len(self._remembered) > REMEMBERED:
          self._remembered.popitem(last=False)

  def session(self, limits: Limits) -> Worker:
    """A confined process for the caller, who calls `start` with one program, and `close`.

    It ends at the latest when the calling thread does.
    """
    return Worker(self._way, limits)

  def close(self) -> None:
    """Ends the processes. Garbage collection of the sandbox does the same."""
    _close(self._pool, self._workers)

  def _probe(self) -> None:
    """Finds a way to confine programs that works on this machine."""
    complaints = []
    for self._way in ways():
      result = self._pool.submit(self._run_twice, PROBE).result()
      if result.status == "passed":
        return
      complaints.append(result.reason)
      while self._workers:  # They were started in the way that failed.
        self._workers.pop().close()
    self.close()
    why = "; ".join(dict.fromkeys(complaints)) or "there is no bwrap for this system"
    raise errors.UserError(
      f"programs cannot be confined here ({why}): leave out the domains and tools that run code, or "
      "run on Linux (x86-64 or arm64) where user namespaces are permitted"
    )

  def _run_twice(self, program: Program) -> Result:
    """Runs the program, again if the sandbox itself failed, e.g. briefly on a busy machine."""
    result = self._run(program)
    return self._run(program) if result.status == "unstarted" else result

  def _run(self, program: Program) -> Result:
    try:
      worker = getattr(self._own, "worker", None)
      if worker is None or worker.ended():
        worker = self._own.worker = Worker(self._way, self.limits)
        with self._lock:
          self._workers[:] = [w for w in self._workers if not w.ended()] + [worker]
      return worker.run(program)
    except OSError as error:  # This machine failed, e.g. no space for a file; not the program.
      return Result("unstarted", reason=str(error))
    except (RecursionError, ValueError):  # Sending a program can fail at less depth than its digest.
      return TOO_DEEP


class Runner:
  """Runs programs in a sandbox, from any thread; None creates one on first use."""

  def __init__(self, sandbox: Sandbox | None = None):
    self.sandbox, self._lock = sandbox, threading.Lock()

  def run(self, programs: Sequence[Program]) -> list[Result]:
    if not programs:
      return []
    with self._lock:
      sandbox = self.sandbox = self.sandbox or Sandbox()
    return sandbox.run_batch(programs)


def _digest(program: Program) -> bytes | None:
  """The program's digest; None if the arguments of its calls are nested too deep for one."""
  try:
    return program.digest()
  except RecursionError:
    return None


def _close(pool: concurrent.futures.Executor, workers: list[Worker]) -> None:
  pool.shutdown()
  while workers:
    workers.pop().close()
