"""What a sandbox is given, and what it answers with."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

STATUSES = ("passed", "failed", "error", "timeout", "killed", "unstarted")
REPEATABLE = ("passed", "failed", "error")  # The others may depend on the machine's load.


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

  def digest(self) -> bytes:
    """Equal for equal programs alone."""
    parts = (sorted(self.files.items()), self.argv, self.stdin, self.calls)
    return hashlib.sha256(as_bytes(repr(parts))).digest()


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
  """Of one program."""

  cpu_s: float = 2  # Counted in whole seconds.
  wall_s: float = 6.0
  memory_mb: int = 256
  file_mb: int = 8
  folder_mb: int = 16  # All files together, beside those that it came with.
  files: int = 4096
  output_kb: int = 1024
  open_files: int = 64
  threads: int = 32


def as_bytes(text: str) -> bytes:
  """Any text, halves of surrogate pairs included: whether it is a program is not for us to say."""
  return text.encode("utf-8", "surrogatepass")
