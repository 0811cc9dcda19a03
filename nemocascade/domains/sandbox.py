"""Runs untrusted programs: no network, a read-only system, little time and little memory."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import marshal
import math
import os
import pathlib
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nemocascade import errors
from nemocascade.domains import confinement, launcher, seccomp

MODES = ("bubblewrap", "unconfined")
STATUSES = ("passed", "failed", "error", "timeout", "killed", "unstarted")
REPEATABLE = ("passed", "failed", "error")  # The others may depend on the machine's load.
REMEMBERED = 1 << 14  # Results of programs that were run before.
LONGEST_REMEMBERED = 10_000  # Characters of output.
POLL_S = 0.05
MB = 1 << 20
STDERR_SHOWN = 2000  # Characters.
ANSWER = 5  # Bytes: a wait status, and whether anything was left behind.

EXECUTABLE = os.path.realpath(sys._base_executable)
# The launcher comes as code of this very interpreter, so that it is compiled once.
_BOOT = (
  "import marshal, sys;"
  "code, *arguments = marshal.loads(open(int(sys.argv[1]), 'rb').read());"
  "names = {'__name__': 'launcher'}; exec(code, names);"
  "names['serve'](int(sys.argv[2]), *arguments)"
)
_LAUNCHER = compile(pathlib.Path(launcher.__file__).read_text(), "launcher.py", "exec")
_INTERPRETER = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT)


@dataclasses.dataclass(frozen=True)
class Call:
  """A function of one of the program's modules, and plain values to call it with."""

  module: str
  function: str
  arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
  """Files, and either a script among them with its arguments and stdin, or functions to call."""

  files: Mapping[str, str]
  argv: tuple[str, ...] = ("main.py",)
  stdin: str = ""
  calls: tuple[Call, ...] = ()

  def __post_init__(self):
    for path in self.files:
      pure = pathlib.PurePosixPath(path)
      if str(pure) != path or pure.is_absolute() or {"..", "."} & {*pure.parts, path}:
        raise ValueError(f"{path=} is not a path inside the program's folder")


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended, with what it wrote.

  passed: exit code 0. failed: another. error: an exception that nothing caught. timeout: out of
  CPU or wall time. killed: by a signal, or for writing too much. unstarted: the program was never
  reached, so nothing can be said of it.
  `returns` has one entry a call that came back: {"value": ...} or {"error": name}.
  """

  status: str
  stdout: str = ""
  stderr: str = ""
  reason: str = ""
  returns: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one program. `folder_mb` (all files together) holds in mode "bubblewrap" only."""

  cpu_s: float = 2  # Counted in whole seconds.
  wall_s: float = 6.0
  memory_mb: int = 256
  file_mb: int = 8
  folder_mb: int = 16
  output_kb: int = 1024
  open_files: int = 64
  threads: int = 32


class Sandbox:
  """Runs programs side by side, and remembers what the repeatable ones did."""

  def __init__(self, mode: str = "bubblewrap", *, workers: int = 2, **limits: float):
    """`limits` are fields of Limits."""
    if mode not in MODES:
      raise errors.unknown("sandbox.mode", mode, MODES)
    for name in limits:
      if name not in Limits.__dataclass_fields__:
        raise errors.unknown("field of sandbox", name, ["mode", "workers", *vars(Limits())])
    for name, value in {"workers": workers, **limits}.items():
      if not value > 0:
        raise errors.UserError(f"sandbox.{name}={value!r} must be above 0")
    self.mode, self.workers, self.limits = mode, workers, Limits(**limits)
    self._remembered: collections.OrderedDict[bytes, Result] = collections.OrderedDict()
    self._lock = threading.Lock()
    # A confined process dies with the thread that started it, so the threads must stay.
    self._pool = concurrent.futures.ThreadPoolExecutor(workers)
    self._own = threading.local()
    self._workers: list[_Worker] = []
    weakref.finalize(self, _close, self._pool, self._workers)
    if mode == "unconfined":
      warnings.warn(
        "sandbox.mode='unconfined': model-written programs can read and write whatever this user "
        "can; only their time, memory and size of files are limited", RuntimeWarning, stacklevel=2,
      )  # fmt: skip
    self._probe()

  def run(self, program: Program) -> Result:
    return self.run_batch([program])[0]

  def run_batch(self, programs: Sequence[Program]) -> list[Result]:
    """Results in order. Equal programs run once, now or in an earlier batch."""
    digests = [_digest(program) for program in programs]
    known: dict[bytes, Result] = {}
    with self._lock:
      for digest in digests:
        if digest in self._remembered:
          self._remembered.move_to_end(digest)
          known[digest] = self._remembered[digest]
    fresh = {d: p for d, p in zip(digests, programs, strict=True) if d not in known}
    known.update(zip(fresh, self._run_in_pool(fresh.values()), strict=True))
    with self._lock:
      for digest in fresh:
        if known[digest].status in REPEATABLE and len(known[digest].stdout) <= LONGEST_REMEMBERED:
          self._remembered[digest] = known[digest]
      while len(self._remembered) > REMEMBERED:
        self._remembered.popitem(last=False)
    return [known[digest] for digest in digests]

  def session(self, limits: Limits) -> _Worker:
    """A confined process for the caller alone, to `start` one program in and to `close`."""
    return _Worker(self._prefix, self._filter, limits)

  def close(self) -> None:
    """Ends the processes; at the latest this happens when the sandbox goes."""
    _close(self._pool, self._workers)

  def _probe(self) -> None:
    """Finds a way to confine programs that works here."""
    code = seccomp.filter_program()
    if self.mode == "unconfined":
      ways = [([], code), ([], None)]
    else:
      seen = confinement.arguments(EXECUTABLE, folder_bytes=int(self.limits.folder_mb * MB))
      ways = [([bwrap, *seen], code) for bwrap in confinement.bubblewraps()]
    complaints = []
    for self._prefix, self._filter in ways:
      result = self._run_in_pool([Program({"main.py": ""})])[0]
      if result.status == "passed":
        return
      complaints.append(result.reason)
    self.close()
    raise errors.UserError(
      f"sandbox.mode={self.mode!r} does not work here ({'; '.join(complaints) or 'no bwrap found'}): "
      "run where user namespaces are permitted, leave out the domains that run code, or set "
      "sandbox.mode='unconfined' (limits on resources only)"
    )

  def _run_in_pool(self, programs: Iterable[Program]) -> list[Result]:
    return list(self._pool.map(self._run_twice, programs))

  def _run_twice(self, program: Program) -> Result:
    """Once more where the sandbox itself failed, as it may for a moment on a busy machine."""
    result = self._run(program)
    return self._run(program) if result.status == "unstarted" else result

  def _run(self, program: Program) -> Result:
    try:
      worker = getattr(self._own, "worker", None)
      if worker is None or worker.ended():
        worker = self._own.worker = _Worker(self._prefix, self._filter, self.limits)
        with self._lock:
          self._workers[:] = [w for w in self._workers if not w.ended()] + [worker]
      return worker.run(program)
    except OSError as error:  # Of this machine, such as no room for a file; never the program's.
      return Result("unstarted", reason=str(error))


class _Worker:
  """One confined process that forks for each program: see the launcher."""

  def __init__(self, prefix: Sequence[str], code: bytes | None, limits: Limits):
    self.limits = limits
    self._most = int(limits.output_kb * 1024)
    self._folder = None if prefix else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    self._socket, theirs = socket.socketpair()
    self._errors = tempfile.TemporaryFile()
    resources = _resource_limits(limits, confined=bool(prefix), filtered=code is not None)
    with theirs, _holding(marshal.dumps((_LAUNCHER, resources, code))) as boot:
      fds = (boot.fileno(), theirs.fileno())
      self._process = subprocess.Popen(
        [*prefix, EXECUTABLE, *_INTERPRETER, *map(str, fds)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors, pass_fds=fds,
        cwd=None if self._folder is None else self._folder.name, start_new_session=True,
        env={"PYTHONHASHSEED": "0", "HOME": confinement.WORK},
      )  # fmt: skip

  def ended(self) -> bool:
    return self._process.poll() is not None

  def close(self) -> str:
    """Ends the process, and with it all that it started. Returns what it complained of."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    if self._errors.closed:
      return ""
    self._errors.seek(0)
    with self._socket, self._errors, self._folder or contextlib.nullcontext():
      return self._errors.read(STDERR_SHOWN).decode("utf-8", "replace")

  def run(self, program: Program) -> Result:
    """Hands the program over and reads what it writes until it ends, or must be ended."""
    deadline = time.monotonic() + self.limits.wall_s
    pipes = [os.pipe() for _ in range(3)]
    try:
      with contextlib.suppress(ConnectionError):  # It ended already: below is read why.
        self._send(program, [end for _, end in pipes])
      written, reason = self._read([start for start, _ in pipes], deadline)
    finally:
      for start, _ in pipes:
        os.close(start)
    stdout, stderr, told = written
    started, *lines = told.split(b"\n")
    result = Result(
      "unstarted",
      stdout=stdout[: self._most].decode("utf-8", "replace"),
      stderr=stderr[-STDERR_SHOWN:].decode("utf-8", "replace"),
      returns=tuple(_returned(lines)),
    )
    answer = b"" if reason else self._answer(deadline)
    if len(answer) != ANSWER:  # Without one, nothing is known of what the process may yet do.
      why = _last_line(self.close())
      late = time.monotonic() > deadline
      if reason:
        return dataclasses.replace(result, status="killed", reason=reason)
      if late:
        reason = f"over {self.limits.wall_s:g} s of wall time"
        return dataclasses.replace(result, status="timeout", reason=reason)
      status = "killed" if started == b"+" else "unstarted"
      return dataclasses.replace(result, status=status, reason=why or "the sandbox's process ended")
    code = os.waitstatus_to_exitcode(int.from_bytes(answer[:-1], "little"))
    status, reason = self._status(code, started == b"+", b"!" in lines, result.stderr)
    if answer[-1] or status == "unstarted":
      self.close()
    return dataclasses.replace(result, status=status, reason=reason)

  def _send(self, program: Program, fds: list[int]) -> None:
    """Sends the program with its ends of the pipes, and lets go of these."""
    try:
      with _holding(_bytes(program.stdin)) as stdin:
        self.start(program, [stdin.fileno(), *fds])
    finally:
      for fd in fds:
        os.close(fd)

  def start(self, program: Program, fds: Sequence[int]) -> None:
    """Begins the program; `fds` become its stdin, stdout, stderr and control."""
    files = [(path, _bytes(content)) for path, content in program.files.items()]
    calls = [dataclasses.astuple(call) for call in program.calls]
    with _holding(marshal.dumps((files, program.argv, calls))) as file:
      socket.send_fds(self._socket, [b"p"], [file.fileno(), *fds])

  def _read(self, fds: Sequence[int], deadline: float) -> tuple[list[bytes], str]:
    """What came through the pipes, and what was too much of it; at the deadline it stops."""
    written = {fd: b"" for fd in fds}
    with selectors.DefaultSelector() as selector:
      for fd in fds:
        selector.register(fd, selectors.EVENT_READ)
      while selector.get_map() and time.monotonic() < deadline:
        for key, _ in selector.select(POLL_S):
          data = os.read(key.fd, 1 << 16)
          written[key.fd] += data
          if not data:
            selector.unregister(key.fd)
          if len(written[key.fd]) > self._most:
            return list(written.values()), f"wrote over {self._most} bytes"
    return list(written.values()), ""

  def _answer(self, deadline: float) -> bytes:
    """The launcher's answer; nothing where it is late, or will not come."""
    self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
    try:
      return self._socket.recv(ANSWER)
    except OSError:
      return b""

  def _status(self, code: int, started: bool, raised: bool, stderr: str) -> tuple[str, str]:
    """A process's end in one of STATUSES, and the reason."""
    if not started:
      return "unstarted", _last_line(stderr) or f"exit code {code}"
    if code == 0:
      return "passed", ""
    if code == -signal.SIGXCPU:
      return "timeout", f"over {self.limits.cpu_s} s of CPU time"
    if code < 0:
      return "killed", f"signal {-code}"
    return ("error", _last_line(stderr)) if raised else ("failed", f"exit code {code}")


def _close(pool: concurrent.futures.Executor, workers: list[_Worker]) -> None:
  pool.shutdown()
  while workers:
    workers.pop().close()


def _resource_limits(limits: Limits, *, confined: bool, filtered: bool) -> list[tuple]:
  """(name, soft, hard) of each limit that a process takes on."""
  both = {
    "RLIMIT_AS": int(limits.memory_mb * MB),
    "RLIMIT_FSIZE": int(limits.file_mb * MB),
    "RLIMIT_NOFILE": limits.open_files,
    "RLIMIT_CORE": 0,
  }
  # Counted per namespace; per user where there is none, and then it is of use only at zero.
  if confined or not filtered:
    both["RLIMIT_NPROC"] = limits.threads if confined else 0
  # A signal that tells of its reason, then one that none outlives.
  cpu_s = math.ceil(limits.cpu_s)
  cpu = ("RLIMIT_CPU", cpu_s, cpu_s + 1)
  return [cpu, *((name, limit, limit) for name, limit in both.items())]


def _bytes(text: str) -> bytes:
  """Any text, halves of surrogate pairs included: whether it is a program is not for us to say."""
  return text.encode("utf-8", "surrogatepass")


def _digest(program: Program) -> bytes:
  parts = (sorted(program.files.items()), program.argv, program.stdin, program.calls)
  return hashlib.sha256(_bytes(repr(parts))).digest()


@contextlib.contextmanager
def _holding(data: bytes) -> Iterator[Any]:
  """A file without a name that holds the data; unlike a pipe, it never makes a writer wait."""
  with tempfile.TemporaryFile() as file:
    file.write(data)
    file.flush()
    file.seek(0)
    yield file


def _returned(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
  """The results of calls as they were told, up to the first that makes no sense."""
  for line in lines:
    try:
      told = json.loads(line)
    except (ValueError, RecursionError):
      return
    if not isinstance(told, dict):
      return
    yield told


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or [""])[-1][:200]
