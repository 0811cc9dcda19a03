"""A stream of packed rows: its share of a blend's conversations, read block by block."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain

from nemocascade.data import packing
from nemocascade.data.blend import Blend
from nemocascade.data.documents import Document
from nemocascade.data.reading import Read
from nemocascade.errors import StageStopped


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all streams of a run share.

  Attributes:
    T: tokens of a row.
    look_ahead: tokens of a block: its documents are packed together, and its rows are shuffled.
    seed: of the order of the rows of a block.
    max_bad_share: share of bad rows above which the run stops.
  """

  T: int
  look_ahead: int
  seed: int
  max_bad_share: float


@dataclasses.dataclass(frozen=True)
class Counts:
  """Totals since the beginning of the run."""

  rows: int = 0  # Conversations read.
  bad: int = 0
  long: int = 0  # Documents longer than a packed row.

  def with_read(self, read: Read) -> "Counts":
    return Counts(self.rows + 1, self.bad + bool(read.bad), self.long + read.long)


@dataclasses.dataclass(frozen=True)
class Start:
  """All that a block depends on, besides the data and the settings.

  Attributes:
    epoch, position: of its first new conversation; the position is in the blend's epoch.
    carried: (position, document of that conversation) of documents that the block before left over.
    counts: before the block.
  """

  epoch: int = 0
  position: int = 0
  carried: tuple[tuple[int, int], ...] = ()
  counts: Counts = Counts()


CHECKED = 1000  # Conversations after which the share of bad ones is checked within a block too.

# (source, row, document of that conversation) orders documents as in their files, then (position, tokens).
Placed = tuple[tuple[int, int, int], int, Document]


class Stream:
  """Endless packed rows of stream `number` of `step`, which has every `step`-th conversation of each epoch.

  A block reads conversations until it has `look_ahead` tokens, or the epoch ends. It packs them best-fit, and gives
  the rows in an order drawn from the seed. The emptiest row of a block goes into the next block instead, except at
  the end of an epoch. So every document of an epoch is in one row of that epoch.
  """

  def __init__(
    self, blend: Blend, read: Callable[[Iterable[tuple[int, int]]], Iterator[Read]], settings: Settings, *,
    number: int = 0, step: int = 1, on_bad: Callable[[str], None] = lambda bad: None,
  ):  # fmt: skip
    """
    Args:
      read: reads (source, row) in order.
      on_bad: called with "FILE, line N: reason" of each bad row.
    """
    self._blend, self._read, self._settings = blend, read, settings
    self._number, self._step, self._on_bad = number, step, on_bad
    self._kept: dict[tuple[int, int], Read] = {}  # All conversations, if an epoch is one block.
    self._last_bad = ""
    self._go_to(Start(position=number), 0)

  def __next__(self) -> list[Document]:
    if self._rows is None:
      self._build()
    row = self._rows[self._given]
    self._given += 1
    if self._given == len(self._rows):
      self._start, self._given, self._rows = self._next, 0, None
    return row

  @property
  def epoch(self) -> int:
    """The epoch of the next row, from 0."""
    return self._start.epoch

  @property
  def counts(self) -> Counts:
    return self._start.counts if self._rows is None else self._next.counts

  def get_state(self) -> dict[str, Any]:
    """The position as JSON."""
    start = dataclasses.asdict(self._start) | {"carried": [list(pair) for pair in self._start.carried]}
    return {"start": start, "given": self._given}

  def set_state(self, state: Mapping[str, Any]) -> None:
    start = state["start"]
    carried = tuple((int(position), int(i)) for position, i in start["carried"])
    self._go_to(Start(start["epoch"], start["position"], carried, Counts(**start["counts"])), state["given"])

  def _go_to(self, start: Start, given: int) -> None:
    self._start, self._given, self._rows = start, given, None
    self._left: list[Placed] | None = None  # The carried documents, while they are in memory.
    self._reading = self._read_from(start.epoch, start.position)

  def _read_from(self, epoch: int, position: int) -> Iterator[tuple[tuple[int, int], Read]]:
    """Yields ((source, row), what it gave) from the position to the end of the epoch."""
    items, again = itertools.tee(self._blend.items(epoch, position, self._step))
    if self._kept:
      return ((item, self._kept[item]) for item in items)
    return zip(items, self._read(again))

  def _build(self) -> None:
    """Reads and packs the block at self._start; sets its rows and the start of the next block."""
    start = self._start
    while True:
      documents, following, ended = self._block(start)
      rows = packing.pack([len(document.tokens_T) for *_, document in documents], capacity=self._settings.T)
      self._left = []
      if not ended:
        tokens = [sum(len(documents[i][2].tokens_T) for i in row) for row in rows]
        emptiest = min(range(len(rows)), key=tokens.__getitem__)
        self._left = [documents[i] for i in rows.pop(emptiest)]
        carried = tuple((position, place[2]) for place, position, _ in self._left)
        following = dataclasses.replace(following, carried=carried)
      if rows:
        break
      start = self._after(following, start)
    self._start, self._next = start, following
    self._rows = [[documents[i][2] for i in rows[r]] for r in self._order(start, len(rows))]

  def _after(self, following: Start, start: Start) -> Start:
    """The start after a block without rows. Raises StageStopped if that block was a whole epoch."""
    if following.epoch > start.epoch and start.position == self._number and not start.carried:
      raise StageStopped(
        f"no document fits into a row of {self._settings.T} tokens: {following.counts.rows} conversations were read,"
        f" {following.counts.bad} of them are bad, and {following.counts.long} documents are longer than a row"
      )
    return following

  def _block(self, start: Start) -> tuple[list[Placed], Start, bool]:
    """(documents in the order of their files, start of the next block, whether the epoch has ended)"""
    documents = list(self._left if self._left is not None else self._carried(start))
    tokens = sum(len(document.tokens_T) for *_, document in documents)
    position, counts, reads = start.position, start.counts, {}
    while tokens < self._settings.look_ahead and position < self._blend.length:
      item, read = next(self._reading)
      documents += [((*item, i), position, document) for i, document in enumerate(read.documents)]
      tokens += sum(len(document.tokens_T) for document in read.documents)
      counts, position, reads[item] = counts.with_read(read), position + self._step, read
      if read.bad:
        self._last_bad = read.bad
        self._on_bad(read.bad)
      if counts.rows >= CHECKED:
        self._check(counts)
    self._check(counts)
    documents.sort(key=lambda placed: placed[0])
    if position < self._blend.length:
      return documents, Start(start.epoch, position, (), counts), False
    if start.position == self._number and self._step == 1 and self._blend.repeats:
      self._kept = reads
    following = Start(start.epoch + 1, self._number, (), counts)
    self._reading = self._read_from(following.epoch, following.position)
    return documents, following, True

  def _carried(self, start: Start) -> list[Placed]:
    """Reads again the documents that the block before left over."""
    found = []
    for position, i in start.carried:
      item = next(self._blend.items(start.epoch, position, 1))
      (read,) = self._read([item])
      found.append(((*item, i), position, read.documents[i]))
    return found

  def _check(self, counts: Counts) -> None:
    if counts.bad > self._settings.max_bad_share * counts.rows:
      raise StageStopped(
        f"{counts.bad} of {counts.rows} conversations are bad, more than max_bad_share={self._settings.max_bad_share};"
        f" such as {self._last_bad}"
      )

  def _order(self, start: Start, count: int) -> list[int]:
    """The order in which the block gives its rows."""
    first = start.position == self._number
    seed = (self._settings.seed + 7919 * self._number + (0 if first else 104_729 * start.position)) % 2**32
    shuffled = grain.MapDataset.range(count).seed(seed).shuffle()
    return [shuffled[start.epoch * count + i] for i in range(count)]
