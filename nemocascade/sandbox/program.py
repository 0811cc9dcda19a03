"""The inputs and results of a sandbox: programs, limits, results."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

STATUSES = ("passed", "failed", "error", "timeout", "killed", "unstarted")
REPEATABLE = ("passed", "failed", "error")  # Cached; the others may depend on the machine's load.


@dataclasses.dataclass(frozen=True)
class Call:
  """A function of one of the program's modules, and plain values as its arguments."""

  module: str
  function: str
  arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
  """Files (path -> content), and either a script to run or functions to call.

  `argv` is the script's path and its arguments. With `calls`, no script runs.
  """

  files: Mapping[str, str]
  argv: tuple[str, ...] = ("main.py",)
  stdin: str = ""
  calls: tuple[Call, ...] = ()

  def __post_init__(self):
    for path in self.files:
      pure = pathlib.PurePosixPath(path)
      if str(pure) != path or pure.is_absolute() or {"..", "."} & {*pure.parts, path}:
        raise ValueError(f"{path=} is not a path inside the program's folder")

  def digest(self) -> bytes:
    """A SHA-256 digest: equal programs have equal digests, others differ."""
    parts = (sorted(self.files.items()), self.argv, self.stdin, self.calls)
    return hashlib.sha256(as_bytes(repr(parts))).digest()


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended, and what it wrote.

  `status` is one of:
    passed: exit code 0.
    failed: another exit code.
    error: an uncaught exception.
    timeout: over the limit of CPU or wall time.
    killed: by a signal, or because it wrote too much.
    unstarted: the program did not run, so the result says nothing about it.

  `returns` has one entry per finished call, in order: {"value": ...}, or {"error": name of the
  exception}.
  """

  status: str
  stdout: str = ""
  stderr: str = ""
  reason: str = ""
  returns: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of one program. A MB is 2^20 bytes, a KB 2^10."""

  cpu_s: float = 2  # Rounded up to whole seconds.
  wall_s: float = 6.0
  memory_mb: int = 256  # Address space.
  file_mb: int = 8  # One file.
  folder_mb: int = 16  # All files together, in addition to those of the Program.
  files: int = 4096  # Inodes in its folder.
  output_kb: int = 1024  # Each of stdout, stderr and the results of calls.
  open_files: int = 64
  threads: int = 32


def as_bytes(text: str) -> bytes:
  """Encodes any text, lone surrogates included, so that only the interpreter can reject a program."""
  return text.encode("utf-8", "surrogatepass")
