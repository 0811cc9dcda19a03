"""One work directory and several processes on it: who is at what, by locks that end with their process."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

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
def held(directory: Path, *, wait: bool) -> Iterator[bool]:
  """Keeps other processes out of the directory, until this one ends at the latest; False where one is in it."""
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
    else:
      yield True
