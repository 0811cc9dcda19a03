"""Confined processes that run untrusted programs one after the other, and report their results."""

from __future__ import annotations

import contextlib
import dataclasses
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
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nemocascade.sandbox import confinement, launcher, seccomp
from nemocascade.sandbox.program import Limits, Program, Result, as_bytes

POLL_S = 0.05  # Interval between checks of the deadline.
MB = 1 << 20
STDERR_SHOWN = 2000  # Characters of stderr that are kept.
PENDING_SIGNALS = 64
ANSWER = 4  # Bytes of a wait status.

EXECUTABLE = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
# The launcher is passed as a marshalled code object: the sandbox runs this same interpreter, so it
# does not compile the launcher at every start.
_BOOT = (
  "import marshal, sys;"
  "code, *arguments = marshal.loads(open(int(sys.argv[1]), 'rb').read());"
  "names = {'__name__': 'launcher'}; exec(code, names);"
  "names['serve'](int(sys.argv[2]), *arguments)"
)
_LAUNCHER = compile(pathlib.Path(launcher.__file__).read_text(), "launcher.py", "exec")
_INTERPRETER = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT)


@dataclasses.dataclass(frozen=True)
class Way:
  """A way to confine programs."""

  prefix: tuple[str, ...]  # Bubblewrap and its arguments.
  other_user: bool  # Whether programs run as the user nobody outside the namespace too.


def ways() -> Iterator[Way]:
  """The ways to confine programs, safest first; none if there is no system call filter.

  If this process is root, the first ways run programs as another user of this machine. Without that,
  programs would own root's files, and the limit on the number of threads would not apply to them.
  """
  if seccomp.filter_program() is None:
    return
  seen = confinement.arguments(EXECUTABLE, folder_bytes=MB)
  # The launcher needs these to mount each program's folder and to become nobody. It drops them
  # before a program runs.
  for name in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"):
    seen += ["--cap-add", name]
  for other_user in (True, False) if os.getuid() == 0 else (False,):
    for bwrap in confinement.bubblewraps():
      yield Way((bwrap, *seen), other_user)


class Worker:
  """A confined launcher process, which forks for each program (see `launcher`)."""

  def __init__(self, way: Way, limits: Limits):
    self.limits = limits
    self._most = int(limits.output_kb * 1024)
    self._socket, theirs = socket.socketpair()
    self._errors = _holding(b"")
    size = int(limits.folder_mb * MB), int(limits.files)
    boot = (_LAUNCHER, _resource_limits(limits), seccomp.filter_program(), *size)
    with theirs, _holding(marshal.dumps(boot)) as file:
      self._process = _start(way, (file.fileno(), theirs.fileno()), self._errors)

  def ended(self) -> bool:
    return self._process.poll() is not None

  def close(self) -> str:
    """Ends the process and all that it started. Returns its stderr; "" if already closed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    if self._errors.closed:
      return ""
    self._errors.seek(0)
    with self._socket, self._errors:
      return self._errors.read(STDERR_SHOWN).decode("utf-8", "replace")

  def run(self, program: Program) -> Result:
    """Runs the program and reads its output until it ends, or exceeds a limit and is killed."""
    deadline = time.monotonic() + self.limits.wall_s
    pipes = [os.pipe() for _ in range(3)]
    try:
      with contextlib.suppress(ConnectionError):  # The launcher has died; the reason is read below.
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
    if len(answer) == ANSWER:
      code = os.waitstatus_to_exitcode(int.from_bytes(answer, "little"))
      status, reason = self._status(code, started == b"+", b"!" in lines, result.stderr)
      if status == "unstarted":
        self.close()
    else:
      late = time.monotonic() > deadline
      status, reason = self._unanswered(reason, started=started == b"+", late=late)
    return dataclasses.replace(result, status=status, reason=reason)

  def _unanswered(self, reason: str, *, started: bool, late: bool) -> tuple[str, str]:
    """Ends the processes of a program without an answer. Returns its (status, reason)."""
    why = _last_line(self.close())
    if reason:
      return "killed", reason
    if not started:
      return "unstarted", why or "the sandbox did not start in time"
    if late:
      return "timeout", f"over {self.limits.wall_s:g} s of wall time"
    return "killed", why or "the sandbox's process ended"

  def _send(self, program: Program, fds: list[int]) -> None:
    """Sends the program with its ends of the pipes, and closes these ends here."""
    try:
      self.start(program, fds)
    finally:
      for fd in fds:
        os.close(fd)

  def start(self, program: Program, fds: Sequence[int], stdin: int | None = None) -> None:
    """Starts the program.

    Args:
      fds: descriptors that become its stdout, stderr and control.
      stdin: a descriptor for its stdin; None: it reads `program.stdin`.
    """
    files = [(path, as_bytes(content)) for path, content in program.files.items()]
    calls = [dataclasses.astuple(call) for call in program.calls]
    given, fds = (as_bytes(program.stdin), fds) if stdin is None else (None, (stdin, *fds))
    with _holding(marshal.dumps((files, program.argv, calls, given))) as file:
      socket.send_fds(self._socket, [b"p"], [file.fileno(), *fds])

  def _read(self, fds: Sequence[int], deadline: float) -> tuple[list[bytes], str]:
    """Reads the pipes until they close or the deadline passes.

    Returns:
      (the bytes of each pipe, "" or the reason why the program must be killed).
    """
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
    """The wait status that the attendant sends; b"" if it is late or the connection fails."""
    self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
    try:
      return self._socket.recv(ANSWER)
    except OSError:
      return b""

  def _status(self, code: int, started: bool, raised: bool, stderr: str) -> tuple[str, str]:
    """(one of STATUSES, reason) of a program that has ended.

    Args:
      code: its exit code, negative for a signal.
      started: whether it reached its first line.
      raised: whether it ended by an uncaught exception.
      stderr: what it wrote there.
    """
    if not started:
      return "unstarted", _last_line(stderr) or f"exit code {code}"
    if code == 0:
      return "passed", ""
    if code == -signal.SIGXCPU:
      return "timeout", f"over {self.limits.cpu_s} s of CPU time"
    if code < 0:
      return "killed", f"signal {-code}"
    return ("error", _last_line(stderr)) if raised else ("failed", f"exit code {code}")


def _start(way: Way, fds: tuple[int, ...], stderr: Any) -> subprocess.Popen:
  """Starts bubblewrap with the interpreter that runs the launcher.

  Args:
    fds: descriptors of the launcher's code and of its socket, which it inherits.
  """

  def start(*options: str, more: tuple[int, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
      [*way.prefix, *options, EXECUTABLE, *_INTERPRETER, *map(str, fds)],
      stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=(*fds, *more),
      env={"PYTHONHASHSEED": "0", "HOME": confinement.WORK}, start_new_session=True,
    )  # fmt: skip

  if not way.other_user:
    return start()
  with contextlib.ExitStack() as stack:
    ends = [open(fd, mode, 0) for _ in range(2) for fd, mode in zip(os.pipe(), ("rb", "wb"))]
    told, tell, wait, go = (stack.enter_context(end) for end in ends)
    names = ("--unshare-user", "--info-fd", str(tell.fileno()), "--userns-block-fd", str(wait.fileno()))
    process = start(*names, more=(tell.fileno(), wait.fileno()))
    tell.close()
    try:
      confinement.map_users(told)
    except OSError:
      process.kill()
      process.wait()
      raise
    go.write(b"g")
  return process


def _resource_limits(limits: Limits) -> list[tuple[str, int]]:
  """(name, value) of each resource limit that is set on a program."""
  return [
    ("RLIMIT_CPU", math.ceil(limits.cpu_s)),
    ("RLIMIT_AS", int(limits.memory_mb * MB)),
    ("RLIMIT_FSIZE", int(limits.file_mb * MB)),
    ("RLIMIT_NOFILE", limits.open_files),
    # It counts all processes of the namespace, among them the launcher and up to two attendants.
    ("RLIMIT_NPROC", limits.threads + 3),
    *((name, 0) for name in ("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE")),
    ("RLIMIT_SIGPENDING", PENDING_SIGNALS),
  ]


def _holding(data: bytes) -> Any:
  """An in-memory file with the data. Unlike a pipe, it never blocks the writer."""
  file = os.fdopen(os.memfd_create("program"), "w+b", 0)
  file.write(data)
  file.seek(0)
  return file


def _returned(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
  """The results of calls, up to the first malformed line."""
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
