"""One work directory and several processes on it: who is at what, by locks that end with their process."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from nemocascade.errors import UserError

LOCK = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
T = TypeVar("T")


def each(seeds: Sequence[int], directory: Callable[[int], Path], work: Callable[[int], T]) -> Iterator[dict[int, T]]:
  """Yields, after each seed that is done, the results of those that are, in the order of `seeds`.

  Processes on one work directory share the seeds: each takes one that no other is at, and waits for the
  others' at the end. `work` reads what is there and does the rest.
  """
  found: dict[int, T] = {}
  for wait in (False, True):
    for seed in seeds:
      if seed not in found:
        with held(directory(seed), wait=wait) as mine:
          if mine:
            found[seed] = work(seed)
        if mine:
          yield {seed: found[seed] for seed in seeds if seed in found}


@contextlib.contextmanager
def held(directory: Path, *, wait: bool, name: str = LOCK) -> Iterator[bool]:
  """Keeps other processes out of the directory, until this one ends at the latest; False where one is in it.

  Args:
    name: of the lock's file; locks of different names do not know each other.
  """
  with _open(directory / name) as file:
    yield _locked(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


_owned: dict[Path, TextIO] = {}  # Locks that this process keeps to its end.


def own(directory: Path, *, shared: bool = False) -> None:
  """Makes this process the only writer of the directory until it ends, however it ends.

  Args:
    shared: others that share it may write there too, but none that wants it alone.

  Raises:
    UserError: another process writes there.
  """
  path = Path(directory).resolve() / LOCK
  if path in _owned:
    return
  file = _open(path)
  if not _locked(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
    who = file.read().strip()
    file.close()
    raise UserError(
      f"--workdir {directory}: another process{f' ({who})' if who else ''} writes there;"
      " wait for its end, or choose another --workdir"
    )
  if not shared:
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
  _owned[path] = file


def _open(path: Path) -> TextIO:
  """The lock's file; what it says of its last holder is kept."""
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.open("a+", encoding="utf-8", errors="replace")
  file.seek(0)
  return file


def _locked(file: TextIO, how: int) -> bool:
  """Whether the lock could be had; it ends with the file, or with the process."""
  try:
    fcntl.flock(file, how)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
    print(f"{file.name}: this file system has no locks: let no other process write there", file=sys.stderr)
  return True
