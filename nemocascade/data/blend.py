"""The order of the rows of several sources: a function of the seed, the epoch and the position in it.

Memory does not grow with the data: an epoch is cut into windows of about WINDOW positions. A window has the same
share of each source, rounded, and is shuffled. A source's rows are drawn without replacement, in an order that
differs from pass to pass.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from grain.experimental import index_shuffle

from nemocascade.data.row_files import RowFiles
from nemocascade.errors import UserError

WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows, and how many of them an epoch takes. More than there are repeats them; fewer takes others each epoch."""

  name: str
  rows: RowFiles
  count: int


def counts(sizes: Mapping[str, int], fields: Mapping[str, Mapping]) -> dict[str, int]:
  """The rows of each source in an epoch.

  With weights, an epoch ends where the first source would repeat a row. With neither weight nor count, an epoch has
  all rows of the source.

  Args:
    sizes: source -> its rows.
    fields: source -> its fields, which may have "weight" or "count".

  Raises:
    UserError: a source has a weight and a count, or some sources have weights and others have not.
  """
  weighted = [name for name in sizes if fields[name].get("weight") is not None]
  for name in weighted:
    if fields[name].get("count") is not None:
      raise UserError(f"sources.{name} has a weight and a count; give one of them")
  if not weighted:
    return {name: fields[name].get("count") or size for name, size in sizes.items()}
  if other := [name for name in sizes if name not in weighted]:
    raise UserError(f"sources.{other[0]} has no weight, and {weighted[0]} has one; give every source a weight, or none")
  weights = {name: Fraction(str(fields[name]["weight"])) for name in weighted}  # Exact: floats round and overflow.
  unit = min(sizes[name] / weights[name] for name in weighted)
  return {name: max(1, int(weights[name] * unit)) for name in weighted}


class Blend:
  """The rows of an epoch, in order.

  Attributes:
    sources: at least one.
    length: rows of an epoch.
    repeats: whether every epoch has the same rows.
  """

  def __init__(self, sources: Sequence[Source], seed: int):
    self.sources, self._seed = tuple(sources), seed
    self._counts = np.array([source.count for source in sources], np.int64)
    self.length = int(self._counts.sum())
    self.repeats = all(source.count == len(source.rows) for source in sources)
    self._windows = -(-self.length // WINDOW)

  def items(self, epoch: int, start: int, step: int) -> Iterator[tuple[int, int]]:
    """Yields (source, row) at the positions start, start + step, ... of an epoch, to its end."""
    position = start
    while position < self.length:
      window = min(position * self._windows // self.length, self._windows - 1)
      while self._start(window + 1) <= position:
        window += 1
      while self._start(window) > position:
        window -= 1
      items = self._window(epoch, window)
      first, stop = self._start(window), self._start(window + 1)
      for at in range(position, stop, step):
        source, taken = items[at - first]
        yield int(source), self._row(int(source), epoch * int(self._counts[source]) + int(taken))
        position = at + step

  def _start(self, window: int) -> int:
    """The first position of a window."""
    return int(self._before(window).sum())

  def _before(self, window: int) -> np.ndarray:
    """The rows of each source before a window, int64."""
    return self._counts * window // self._windows

  def _window(self, epoch: int, window: int) -> np.ndarray:
    """(source, rows of it taken before) of each position of a window, int64 of shape [positions, 2]."""
    pairs = [
      np.stack([np.full(stop - start, source), np.arange(start, stop)], axis=1)
      for source, (start, stop) in enumerate(zip(self._before(window), self._before(window + 1)))
    ]
    return np.random.default_rng([self._seed, epoch, window]).permutation(np.concatenate(pairs))

  def _row(self, source: int, taken: int) -> int:
    """The row that comes after `taken` others of the source, counted from the first epoch on."""
    rows = self.sources[source].rows
    pass_, place = divmod(taken, len(rows))
    if rows.groups is None:
      return self._shuffled(place, len(rows), source, pass_)
    order, stops, starts = self._groups(source, pass_)
    at = int(np.searchsorted(stops, place, side="right"))
    begin = int(stops[at - 1]) if at else 0
    group = int(order[at])
    return int(starts[group]) + self._shuffled(place - begin, int(stops[at]) - begin, source, pass_ + group)

  def _shuffled(self, place: int, size: int, source: int, pass_: int) -> int:
    seed = (self._seed + 7919 * source + 104_729 * pass_) % 2**32
    return index_shuffle(place, max_index=size - 1, seed=seed, rounds=4) if size > 1 else place

  @functools.lru_cache(maxsize=64)  # noqa: B019  One blend lives as long as its run.
  def _groups(self, source: int, pass_: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(groups in the order of this pass, the places where each ends, the first row of each group)"""
    ends = self.sources[source].rows.groups
    sizes = np.diff(ends, prepend=0)
    order = np.random.default_rng([self._seed, source, pass_]).permutation(len(sizes))
    return order, np.cumsum(sizes[order]), ends - sizes
