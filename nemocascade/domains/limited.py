"""Grading with a time limit: pure functions, run in confined processes that can be killed.

What a model wrote may take a grader any time: a schema's pattern that backtracks, an expression
that does not simplify. `call` runs such a grader in a process of its own and ends that process at
the limit. The grader never evaluates what it reads; the confinement is a second wall.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nemocascade.domains import confinement

LIMIT_S = 5.0  # Of one question, in wall time.
START_S = 60.0  # For a process to start and to import the grader's module.
MEMORY_BYTES = 4 << 30
MAX_REPLY_BYTES = 1 << 20
FOLDER_BYTES = 1 << 20  # What a confined process may write to its empty folder.
WORKERS = 2
HARMLESS = ("error", "evaluation")  # Causes after which a process may go on.
# Libraries that write code of their own, from nothing but numbers and their own fields' names.
GENERATORS = ("collections", "dataclasses", "sympy.polys.monomials")

_ROOT = str(pathlib.Path(__file__).resolve().parents[2])
_BOOT = (
  "import json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]);"
  "from nemocascade.domains import limited; limited.serve(*arguments)"
)


class NoAnswer(Exception):
  """The grader gave no answer, for a reason that says nothing about what was graded.

  Attributes:
    cause: "time" (over the limit), "memory", "crash" (the process ended or did not start), or
      "error" (the grader raised), "evaluation" (it was about to run what it read). Masked samples
      are counted by it.
  """

  def __init__(self, cause: str, text: str):
    super().__init__(text)
    self.cause = cause


def call(function: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S) -> Any:
  """`function(*arguments)`, computed in another process.

  Args:
    function: of a module's top level. The module is imported there before the clock starts, so
      its slow imports belong at its top or in a function named `prepare`, which is called once.
    arguments: plain JSON values; so is what the function returns.
    limit_s: wall time for this question.

  Raises:
    NoAnswer: there is none. Nothing is remembered here, so the same question may succeed later;
      a cache around `call` (functools.lru_cache) keeps answers only, for an exception is none.
  """
  return _pool().submit(_ask, _name(function), arguments, limit_s).result()


def _name(function: Callable[..., Any]) -> tuple[str, str]:
  if "." in function.__qualname__ or function.__module__ == "__main__":
    raise ValueError(f"{function.__qualname__} is not at the top level of an importable module")
  return function.__module__, function.__qualname__


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  # A confined process dies with the thread that started it, so each thread has its own process.
  pool = concurrent.futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="grader")
  atexit.register(_stop_all)
  return pool


_own = threading.local()
_running: set[_Worker] = set()


def _stop_all() -> None:
  for worker in list(_running):
    worker.stop()


def _ask(name: tuple[str, str], arguments: Sequence[Any], limit_s: float) -> Any:
  """Runs in a thread of the pool, with the thread's process for that module."""
  module, function = name
  workers = vars(_own).setdefault("workers", {})
  worker = workers.get(module)
  if worker is None or worker.process.poll() is not None:
    if worker is not None:
      worker.stop()
    worker = workers[module] = _start(module)
  try:
    return worker.ask(function, arguments, limit_s)
  except NoAnswer as error:
    if error.cause not in HARMLESS:  # After the others, nobody knows what the process would say next.
      worker.stop()
    raise


def _start(module: str) -> _Worker:
  """A process that has imported the module, confined by the first way that works here.

  Without bubblewrap the limits on memory and CPU time remain, and the filter of system calls where
  the kernel has it.
  """
  complaints = []
  for prefix in _prefixes(module):
    try:
      worker = _Worker(prefix, module)
    except OSError as error:
      complaints.append(str(error))
      continue
    try:
      worker.greet()
      return worker
    except NoAnswer as error:
      worker.stop()
      complaints.append(str(error))
      if error.cause in ("time", "error"):  # Confined or not, it would be no better.
        break
  raise NoAnswer("crash", f"the grader's process does not start: {'; '.join(complaints)}")


@functools.cache
def _prefixes(module: str) -> list[list[str]]:
  """The ways to confine a process. It sees this package, the module's, and what is installed."""
  packages = [*_source(module), *_source(__name__), *_packages()]
  seen = confinement.arguments(_executable(), folder_bytes=FOLDER_BYTES, packages=packages)
  return [*([bwrap, *seen] for bwrap in confinement.bubblewraps()), []]


def _source(module: str) -> list[str]:
  """The file, or the folder of the package, that a module of this process is part of."""
  top = sys.modules.get(module.split(".")[0])
  if top is None:
    return []
  path = os.path.abspath(top.__file__)
  return [os.path.dirname(path) if os.path.basename(path) == "__init__.py" else path]


def _executable() -> str:
  return os.path.realpath(sys._base_executable)


def _path(module: str) -> list[str]:
  """Where the process finds modules: the grader's and this package, the standard library, and what
  is installed. Not the folder of a script or of the caller, which may hold anything.
  """
  bases = (sys.base_prefix, sys.base_exec_prefix)
  standard = [path for path in sys.path if path.startswith(bases) and path not in _packages()]
  own = [os.path.dirname(path) for path in _source(module)]
  return [*own, _ROOT, *standard, *_packages()]


def _packages() -> list[str]:
  return [
    os.path.abspath(path)
    for path in sys.path
    if os.path.basename(path) in ("site-packages", "dist-packages") and os.path.isdir(path)
  ]


class _Worker:
  """One process that answers questions, one at a time, over a socket of its own."""

  def __init__(self, prefix: Sequence[str], module: str):
    self._ids = itertools.count(1)
    self._socket, theirs = socket.socketpair()
    with theirs:
      arguments = json.dumps([_path(module), theirs.fileno(), module])
      try:
        self.process = subprocess.Popen(
          [*prefix, _executable(), "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, arguments],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
          pass_fds=[theirs.fileno()], env={"HOME": confinement.WORK, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
      except OSError:
        self._socket.close()
        raise
    _running.add(self)

  def stop(self) -> None:
    _running.discard(self)
    with contextlib.suppress(ProcessLookupError):
      self.process.kill()
    self.process.wait()
    self._socket.close()

  def greet(self) -> None:
    """Waits until the module is imported, outside the limit of any question."""
    self._exchange({}, START_S)

  def ask(self, function: str, arguments: Sequence[Any], limit_s: float) -> Any:
    return self._exchange({"function": function, "arguments": arguments}, limit_s)

  def _exchange(self, request: dict[str, Any], limit_s: float) -> Any:
    place = next(self._ids)
    message = json.dumps({"id": place, "limit_s": limit_s, **request}).encode() + b"\n"
    deadline = time.monotonic() + limit_s
    try:
      self._socket.settimeout(max(limit_s, 1e-3))
      self._socket.sendall(message)
      line = self._line(deadline)
    except TimeoutError:
      raise NoAnswer("time", f"over {limit_s:g} s") from None
    except OSError as error:
      raise NoAnswer("crash", f"the grader's process ended: {error}") from None
    reply = json.loads(line) if line else {}
    if reply.get("id") != place:
      raise NoAnswer("crash", "the grader's process ended without an answer")
    if "cause" in reply:
      raise NoAnswer(reply["cause"], reply["text"])
    return reply["value"]

  def _line(self, deadline: float) -> bytes:
    """The next line; empty where the other end has closed or says too much."""
    data = b""
    while not data.endswith(b"\n"):
      left = deadline - time.monotonic()
      if left <= 0:
        raise TimeoutError
      self._socket.settimeout(left)
      more = self._socket.recv(1 << 16)
      if not more or len(data) > MAX_REPLY_BYTES:
        return b""
      data += more
    return data


# ---- in the process


def serve(fd: int, name: str) -> None:
  """Answers questions until the socket closes. Only this function holds the socket."""
  import logging
  import resource

  logging.disable(logging.CRITICAL)
  _limit(resource.RLIMIT_AS, MEMORY_BYTES)
  _limit(resource.RLIMIT_CORE, 0)
  with socket.socket(fileno=fd) as channel, channel.makefile("rb") as lines:
    failure = None
    try:
      module = importlib.import_module(name)
      getattr(module, "prepare", lambda: None)()
    except Exception as error:  # noqa: BLE001
      failure = _failure("error", error)
    # Libraries may do on import what these deny, so they come after.
    _filter()
    sys.addaudithook(_refuse_evaluation)
    for line in lines:
      request = json.loads(line)
      reply = failure or _answer(module, request)
      channel.sendall(json.dumps({"id": request["id"], **reply}).encode() + b"\n")


def _answer(module: Any, request: dict[str, Any]) -> dict[str, Any]:
  import resource

  if "function" not in request:
    return {"value": None}
  used = resource.getrusage(resource.RUSAGE_SELF)
  # The parent's clock is the limit; this one holds where the parent is gone.
  cpu_s = math.ceil(used.ru_utime + used.ru_stime + request["limit_s"]) + 1
  _, most = resource.getrlimit(resource.RLIMIT_CPU)
  soft = cpu_s if most == resource.RLIM_INFINITY else min(cpu_s, most)
  resource.setrlimit(resource.RLIMIT_CPU, (soft, most))
  try:
    value = getattr(module, request["function"])(*request["arguments"])
    json.dumps(value)
    return {"cause": "evaluation", "text": _refused[0]} if _refused else {"value": value}
  except MemoryError as error:
    return _failure("memory", error)
  except Exception as error:  # noqa: BLE001  Whatever a text provokes, the next one is judged.
    return _failure("evaluation" if _refused else "error", error)
  finally:
    _refused.clear()


_refused: list[str] = []  # Since the question came.


def _refuse_evaluation(event: str, arguments: tuple[Any, ...]) -> None:
  """Stops eval, exec and unpickling, however a library comes to them; imports of files go on.

  The library may catch what is raised here, so it is noted too.
  """
  if event == "exec":
    caller = sys._getframe(1).f_globals.get("__name__")
    if os.path.isabs(arguments[0].co_filename) or caller in GENERATORS or _importing():
      return
  elif event != "pickle.find_class":
    return
  _refused.append(f"the grader would have evaluated what it read ({event})")
  raise RuntimeError(_refused[-1])


def _importing() -> bool:
  frame = sys._getframe()
  while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
    frame = frame.f_back
  return frame is not None


def _failure(cause: str, error: Exception) -> dict[str, Any]:
  return {"cause": cause, "text": f"{type(error).__name__}: {error}"[:500]}


def _limit(kind: int, amount: int) -> None:
  import resource

  _, most = resource.getrlimit(kind)
  amount = amount if most == resource.RLIM_INFINITY else min(amount, most)
  with contextlib.suppress(ValueError, OSError):  # macOS refuses some.
    resource.setrlimit(kind, (amount, amount))


def _filter() -> None:
  """No new processes, programs or sockets from here on, where the kernel can hold that."""
  import ctypes

  from nemocascade.domains import launcher, seccomp

  code = seccomp.filter_program()
  if code is not None:
    with contextlib.suppress(OSError):
      launcher.install_filter(ctypes.CDLL(None, use_errno=True), code)
