"""The input pipeline: batches of packed rows, read as they are needed, sharded by host and resumed exactly."""

import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemocascade.data import packing, reading
from nemocascade.data.blend import Blend
from nemocascade.data.documents import LONG
from nemocascade.data.stream import Counts, Settings, Stream
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError, unknown
from nemocascade.types import Batch

AHEAD = 2  # Batches that are made ahead, if processes read the data.


def check(*, T: int, B: int, look_ahead: int, streams: int) -> None:
  """Raises UserError if streams do not divide the B rows, or look less than two rows of T tokens ahead."""
  if B % streams:
    raise UserError(f"streams={streams}: must divide rows={B}")
  if look_ahead // streams < 2 * T:
    raise UserError(
      f"look_ahead={look_ahead}: must be at least {2 * T * streams}, 2 rows of row_tokens={T} for each of {streams} streams"
    )


class Loader:
  """An endless iterator over batches of B packed rows of T tokens; close it to end its processes.

  Row b of every batch comes from stream b // (B / streams). The streams do not depend on the number of hosts: a
  host runs those of its own rows, and all hosts together get the batches that a single host would get.

  Memory: about 10 bytes a token of look_ahead, plus AHEAD batches. It does not grow with the data.

  Attributes:
    own: the rows of a batch that are this host's.
  """

  def __init__(
    self, blend: Blend, tokenizer: Tokenizer, *, T: int, B: int, seed: int, look_ahead: int, streams: int = 1,
    long_documents: str = "drop", max_bad_share: float = 0.0, workers: int = 0, own: Iterable[int] | None = None,
    on_bad: Callable[[str], None] = lambda bad: None,
    gather: Callable[[Any], list] = lambda value: [value],
  ):  # fmt: skip
    """
    Args:
      look_ahead: tokens that are read ahead and packed together; each stream has an equal part.
      streams: parts of the data that are packed apart; divides B.
      long_documents: what happens to a document longer than T; one of documents.LONG.
      max_bad_share: share of bad conversations above which UserError is raised.
      workers: processes that read and tokenize; 0 reads in this one.
      own: the rows of a batch that this host needs; the others stay empty. By default all.
      on_bad: called with "FILE, line N: reason" of each bad conversation.
      gather: JSON of this host -> the list of all hosts' JSON.

    Raises:
      UserError: as `check`; or an epoch has fewer conversations than there are streams.
    """
    if long_documents not in LONG:
      raise unknown("long_documents", long_documents, LONG)
    check(T=T, B=B, look_ahead=look_ahead, streams=streams)
    if blend.length < streams:
      raise UserError(f"streams={streams}: an epoch has only {blend.length} conversations; give at most that")
    self._T, self._B, self._each = T, B, B // streams
    self._epoch = blend.length / streams  # Conversations of an epoch in a stream.
    self.own = sorted(range(B) if own is None else own)
    self._gather = gather
    self._fingerprint = _fingerprint(
      [[source.name, source.count, source.rows.identity()] for source in blend.sources], tokenizer.fingerprint,
      [T, B, seed, look_ahead, streams, long_documents],
    )  # fmt: skip
    rows = tuple(source.rows for source in blend.sources)
    self._reader = reading.start(reading.Reader(rows, tokenizer, T, long_documents), workers)
    settings = Settings(T, look_ahead // streams, seed, max_bad_share)
    self._streams = {
      number: Stream(blend, self._reader.read, settings, number=number, step=streams, on_bad=on_bad)
      for number in sorted({row // self._each for row in self.own})
    }
    self._state, self._counts = self._position(), Counts()  # After the last batch that was given.
    self._ahead = _Ahead(self._make) if workers else None

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> Batch:
    """The next batch. Rows that are not this host's are padding."""
    batch, self._state, self._counts = self._ahead.get() if self._ahead else self._make()
    return batch

  @property
  def counts(self) -> Counts:
    """Totals of the streams of this host, up to the blocks that the last batch came from."""
    return self._counts

  @property
  def epochs(self) -> float:
    """How often this host's share of the conversations has been read, up to the same blocks."""
    return self._counts.rows / (self._epoch * len(self._streams))

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch, as JSON; the same on every host. All hosts must call it together."""
    streams = {}
    for state in self._gather(self._state):
      streams |= state
    return {"streams": streams, "fingerprint": self._fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from a saved position. Raises UserError if the data or the settings have changed."""
    if state.get("fingerprint") != self._fingerprint:
      raise UserError(
        "sources: their files, tokenizer, rows, row_tokens, seed, look_ahead, streams or long_documents have changed"
        " since the checkpoint; restore them, or start in another --workdir"
      )
    if self._ahead:
      self._ahead.stop()
    for number, stream in self._streams.items():
      stream.set_state(state["streams"][str(number)])
    self._state = self._position()
    if self._ahead:
      self._ahead = _Ahead(self._make)

  def close(self) -> None:
    """Ends the processes that read the data."""
    self._reader.close()
    if self._ahead:
      self._ahead.stop()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _make(self) -> tuple[Batch, dict, Counts]:
    rows: list[Sequence] = [()] * self._B
    own = set(self.own)
    for number, stream in self._streams.items():
      for row in range(number * self._each, (number + 1) * self._each):
        documents = next(stream)  # Rows of other hosts are taken too: they are part of the stream's order.
        rows[row] = documents if row in own else ()
    counts = [dataclasses.astuple(stream.counts) for stream in self._streams.values()]
    return packing.fill(rows, T=self._T), self._position(), Counts(*map(sum, zip(*counts)))

  def _position(self) -> dict[str, Any]:
    return {str(number): stream.get_state() for number, stream in self._streams.items()}


class _Ahead:
  """A thread that makes AHEAD items ahead. An exception is raised where its item would be given."""

  def __init__(self, make: Callable[[], Any]):
    self._made: queue.Queue = queue.Queue(AHEAD)
    self._make, self._stopped = make, False
    self._thread: threading.Thread | None = None

  def get(self) -> Any:
    if self._thread is None:  # Started with the first item, so that a position can be set before.
      self._thread = threading.Thread(target=self._run, daemon=True)
      self._thread.start()
    made = self._made.get()
    if isinstance(made, BaseException):
      raise made
    return made

  def stop(self) -> None:
    """Ends the thread after the item that it is making."""
    self._stopped = True
    while self._thread is not None and self._thread.is_alive():
      while not self._made.empty():
        self._made.get()
      self._thread.join(0.05)

  def _run(self) -> None:
    while not self._stopped:
      try:
        made = self._make()
      except BaseException as error:  # noqa: BLE001  Raised in `get`.
        made = error
      self._made.put(made)
      if isinstance(made, BaseException):
        return


def _fingerprint(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
