"""Grading with a time limit: runs pure functions in confined processes that can be killed.

Grading a model's text may take arbitrarily long, e.g. if a regular expression backtracks or an
expression does not simplify. `call` runs the grader in another process and kills that process at the
limit. Graders must never evaluate the text; the confinement is a second line of defence.
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

from nemocascade.sandbox import confinement

LIMIT_S = 5.0  # Wall time of one call.
START_S = 60.0  # Wall time for a process to start and to import the grader's module.
MEMORY_BYTES = 4 << 30  # Address space of one process.
MAX_REPLY_BYTES = 1 << 20
FOLDER_BYTES = 1 << 20  # Size of a confined process's writable folder.
WORKERS = 2  # Threads, each with one process per module.
HARMLESS = ("error", "evaluation")  # Causes after which the process is kept.
# Modules that may call exec: they generate code only from numbers and their own fields' names.
GENERATORS = ("collections", "dataclasses", "sympy.polys.monomials")

_ROOT = str(pathlib.Path(__file__).resolve().parents[2])
_BOOT = (
  "import json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]);"
  "from nemocascade.sandbox import limited; limited.serve(*arguments)"
)


class NoAnswer(Exception):
  """The grader gave no answer, which says nothing about the graded text.

  Attributes:
    cause: "time" (over the limit), "memory", "crash" (the process ended or did not start), "error"
      (the grader raised) or "evaluation" (it tried to run the text as code). Masked samples are
      counted per cause.
  """

  def __init__(self, cause: str, text: str):
    super().__init__(text)
    self.cause = cause


def call(function: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S) -> Any:
  """Returns `function(*arguments)`, computed in another process.

  Args:
    function: a function at the top level of a module. The process imports the module before the
      clock starts, so slow imports belong at the module's top or in its function `prepare`, which
      is called once after the import.
    arguments: plain JSON values. The function must return one too.
    limit_s: wall time of this call.

  Raises:
    NoAnswer: the function gave no result. Failures are not cached, so the same call may succeed
      later. A functools.lru_cache around `call` does not cache them either.
  """
  return _pool().submit(_ask, _name(function), arguments, limit_s).result()


def _name(function: Callable[..., Any]) -> tuple[str, str]:
  if "." in function.__qualname__ or function.__module__ == "__main__":
    raise ValueError(f"{function.__qualname__} is not at the top level of an importable module")
  return function.__module__, function.__qualname__


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  # Bubblewrap's --die-with-parent kills a process when the thread that started it ends. So each
  # thread of a lasting pool owns its processes.
  pool = concurrent.futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="grader")
  atexit.register(_stop_all)
  return pool


_own = threading.local()
_running: set[_Worker] = set()


def _stop_all() -> None:
  for worker in list(_running):
    worker.stop()


def _ask(name: tuple[str, str], arguments: Sequence[Any], limit_s: float) -> Any:
  """Asks the calling pool thread's process for that module, and starts it if needed."""
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
    if error.cause not in HARMLESS:  # The process may be broken: its next reply cannot be trusted.
      worker.stop()
    raise


def _start(module: str) -> _Worker:
  """Starts a process that has imported the module, confined by the first way that works here.

  If bubblewrap does not work, what remains are the limits on memory and CPU time, and the system
  call filter if the kernel supports it.
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
      if error.cause in ("time", "error"):  # Another way to confine would not help.
        break
  raise NoAnswer("crash", f"the grader's process does not start: {'; '.join(complaints)}")


@functools.cache
def _prefixes(module: str) -> list[list[str]]:
  """Command prefixes that confine a process, best first; the last one, [], confines nothing.

  A confined process sees this package, the package of the module, and the installed packages.
  """
  packages = [*_source(module), *_source(__name__), *_packages()]
  seen = confinement.arguments(_executable(), folder_bytes=FOLDER_BYTES, packages=packages)
  return [*([bwrap, *seen] for bwrap in confinement.bubblewraps()), []]


def _source(module: str) -> list[str]:
  """The file or package folder of an imported module's top-level package; [] if not imported."""
  top = sys.modules.get(module.split(".")[0])
  if top is None or top.__file__ is None:
    return []
  path = os.path.abspath(top.__file__)
  return [os.path.dirname(path) if os.path.basename(path) == "__init__.py" else path]


def _executable() -> str:
  return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


def _path(module: str) -> list[str]:
  """`sys.path` of the process: the grader's package, this package, the standard library, and the
  installed packages. The folder of the script or of the caller is excluded; it may hold anything.
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
  """One process that answers requests over its own socket, one at a time."""

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
    """Waits until the module is imported. This does not count against a call's limit."""
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
    """Reads a line; returns b"" if the other end has closed, or the line exceeds MAX_REPLY_BYTES."""
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


# ---- runs in the grading process


def serve(fd: int, name: str) -> None:
  """Answers requests until the socket closes. Only this function has access to the socket.

  Args:
    fd: descriptor of the socket.
    name: the grader's module.
  """
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
    # These come after the import, which may need what they deny.
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
  # The parent enforces the wall time. This CPU limit ends the process if the parent has died.
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
  except Exception as error:  # noqa: BLE001  No text may prevent the grading of the next one.
    return _failure("evaluation" if _refused else "error", error)
  finally:
    _refused.clear()


_refused: list[str] = []  # Evaluations refused during the current request.


def _refuse_evaluation(event: str, arguments: tuple[Any, ...]) -> None:
  """An audit hook that blocks eval, exec and unpickling, also within libraries, but not imports.

  A library may catch the exception raised here, so the refusal is also recorded in `_refused`.
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
  """Denies new processes, programs and sockets by a seccomp filter, if the kernel supports it."""
  import ctypes

  from nemocascade.sandbox import launcher, seccomp

  code = seccomp.filter_program()
  if code is not None:
    with contextlib.suppress(OSError):
      launcher.install_filter(ctypes.CDLL(None, use_errno=True), code)
