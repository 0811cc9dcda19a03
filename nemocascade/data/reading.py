"""Reads, renders and tokenizes rows, in this process or in processes of its own; results come in order."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection

from nemocascade.data.documents import Document, fitted, to_documents
from nemocascade.data.row_files import RowFiles
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError

TASK = 16  # Rows that a process reads at a time.
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from nemocascade.data.reading import serve; serve()"


@dataclasses.dataclass(frozen=True)
class Read:
  """What one row gave."""

  documents: tuple[Document, ...] = ()
  long: int = 0  # Documents that were longer than a packed row.
  bad: str = ""  # "FILE, line N: reason" of a bad row.


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads rows of the sources as documents of at most T tokens. It can be pickled."""

  rows: tuple[RowFiles, ...]
  tokenizer: Tokenizer
  T: int
  long_documents: str  # One of documents.LONG.

  def __call__(self, items: Sequence[tuple[int, int]]) -> list[Read]:
    """Reads rows given as (source, row); those of a source are read in the order of its files.

    Raises:
      OSError: a row is bad because its file has changed since it was opened.
    """
    read = {item: self._read(*item) for item in sorted(set(items))}
    return [read[item] for item in items]

  def _read(self, source: int, row: int) -> Read:
    try:
      documents, long = fitted(to_documents(self.rows[source][row], self.tokenizer), self.T, self.long_documents)
      return Read(tuple(documents), long)
    except UserError as error:
      self.rows[source].check_unchanged()
      return Read(bad=f"{self.rows[source].place(row)}: {error}")


class Here:
  """Reads in this process."""

  def __init__(self, reader: Reader):
    self._reader = reader

  def read(self, items: Iterable[tuple[int, int]]) -> Iterator[Read]:
    for item in items:
      yield from self._reader([item])

  def close(self) -> None:
    pass


class Processes:
  """Reads in `count` processes; each imports neither JAX nor the caller's main module."""

  def __init__(self, reader: Reader, count: int):
    self._reader, self._count = pickle.dumps(reader), count
    self._pool = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="reading")
    self._own = threading.local()  # Each thread of the pool has a process.
    self._started: list[_Process] = []

  def read(self, items: Iterable[tuple[int, int]]) -> Iterator[Read]:
    """Yields the results in order. At most two tasks more than there are processes are ahead of the caller."""
    items = iter(items)
    tasks = iter(lambda: list(itertools.islice(items, TASK)), [])
    pending = collections.deque(self._pool.submit(self._ask, task) for task in itertools.islice(tasks, self._count + 2))
    while pending:
      read = pending.popleft().result()
      pending.extend(self._pool.submit(self._ask, task) for task in itertools.islice(tasks, 1))
      yield from read

  def close(self) -> None:
    """Ends the processes."""
    self._pool.shutdown(wait=False, cancel_futures=True)
    for process in self._started:
      process.stop()

  def _ask(self, task: list[tuple[int, int]]) -> list[Read]:
    process = getattr(self._own, "process", None)
    if process is None:
      process = self._own.process = _Process(self._reader)
      self._started.append(process)
    return process.ask(task)


def start(reader: Reader, workers: int) -> Here | Processes:
  """Reads in that many processes; 0 reads in this one."""
  return Processes(reader, workers) if workers else Here(reader)


class _Process:
  def __init__(self, reader: bytes):
    ours, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
      )  # fmt: skip
    self._channel = Connection(ours.detach())
    self._channel.send_bytes(reader)

  def ask(self, task: list[tuple[int, int]]) -> list[Read]:
    try:
      self._channel.send(task)
      reply = self._channel.recv()
    except (EOFError, OSError) as error:
      raise RuntimeError("a process that reads the data has ended; it may have had too little memory") from error
    if isinstance(reply, Exception):
      raise reply
    return reply

  def stop(self) -> None:
    self._process.kill()
    self._process.wait()


def serve() -> None:
  """Answers tasks until the other end closes the channel, whose descriptor is the last argument of the process."""
  channel = Connection(int(sys.argv[-1]))
  reader = pickle.loads(channel.recv_bytes())  # noqa: S301  From the process that started this one.
  with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
    while True:
      task = channel.recv()
      try:
        reply = reader(task)
      except OSError as error:
        reply = error
      except Exception as error:  # noqa: BLE001  Raised again in the other process.
        reply = RuntimeError(f"{type(error).__name__}: {error}")
      channel.send(reply)
