"""File locks for processes that share a work directory. A lock ends with the process that holds it."""

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
from nemocascade.state_files import on_bucket

LOCK = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
T = TypeVar("T")


def each(seeds: Sequence[int], directory: Callable[[int], Path], work: Callable[[int], T]) -> Iterator[dict[int, T]]:
  """Runs `work` on every seed. After each, yields {seed: result} of all seeds done, in the order of `seeds`.

  Several processes may do this in one work directory. Each takes a seed that no other process holds. At the
  end it waits for the seeds of the others and runs `work` on them too, which must reuse results on disk.

  Args:
    directory: seed -> its directory, which is locked during `work`.
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
  """Locks the directory inside the context. Yields whether the lock was acquired.

  The lock ends with the context, or with the process.

  Args:
    wait: whether to wait while another process holds the lock.
    name: the file name of the lock. Locks of different names are independent.
  """
  with _open(directory / name) as file:
    yield _locked(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


_owned: dict[Path, TextIO] = {}  # Locks that this process holds until it ends.


def own(directory: Path, *, shared: bool = False) -> None:
  """Makes this process the only writer of the directory until it ends, however it ends.

  Args:
    shared: other processes that also pass shared=True may write there too.

  Raises:
    UserError: another process writes there.
  """
  if on_bucket(directory):
    print(f"{directory}: a bucket has no locks: let no other run write there", file=sys.stderr)
    return
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
  """Opens the lock's file. Keeps its text, which names the last holder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  file = path.open("a+", encoding="utf-8", errors="replace")
  file.seek(0)
  return file


def _locked(file: TextIO, how: int) -> bool:
  """Whether the lock was acquired. It ends when the file is closed, or with the process.

  Also True, with a warning, on a file system without locks.
  """
  try:
    fcntl.flock(file, how)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
    print(f"{file.name}: this file system has no locks: let no other process write there", file=sys.stderr)
  return True
