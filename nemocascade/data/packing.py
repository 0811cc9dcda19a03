"""Best-fit packing of documents into rows of T tokens."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from nemocascade.data.tokenizer import PAD
from nemocascade.errors import UserError, unknown
from nemocascade.types import Batch

OVERLONG = ("error", "drop")  # Choices for a document longer than a row.


@dataclasses.dataclass(frozen=True)
class Document:
  """A tokenised conversation with its loss mask."""

  tokens_T: np.ndarray  # int32
  loss_mask_T: np.ndarray  # bool; true on the tokens that are trained on.


def pack(lengths: Sequence[int], *, capacity: int, overlong: str = "error", window: int = 65_536) -> list[list[int]]:
  """Best-fit packing: the document numbers of each row; the lengths of a row sum to at most `capacity`.

  Within each window of documents the longest comes first; each goes into the fullest row that still
  has room for it.

  Args:
    lengths: tokens of each document; at least 1.
    capacity: tokens of a row.
    overlong: "drop" leaves out documents longer than `capacity`; "error" refuses them.
    window: number of documents that are sorted together.

  Raises:
    UserError: a document is empty, or longer than `capacity` under overlong="error".
  """
  if overlong not in OVERLONG:
    raise unknown("overlong", overlong, OVERLONG)
  lengths = np.asarray(lengths, dtype=np.int64)
  if np.any(lengths < 1):
    raise UserError(f"document {int(np.argmax(lengths < 1))} is empty")
  fits = lengths <= capacity
  if overlong == "error" and not fits.all():
    i = int(np.argmin(fits))
    raise UserError(
      f'document {i} has {lengths[i]} tokens, a row holds {capacity}: lengthen the rows, or say overlong="drop"'
    )

  rows: list[list[int]] = []
  open_rows: list[tuple[int, int]] = []  # (tokens left, row number), sorted.
  for start in range(0, len(lengths), window):
    block = lengths[start : start + window]
    for i in start + np.argsort(-block, kind="stable"):
      if not fits[i]:
        continue
      length = int(lengths[i])
      place = bisect.bisect_left(open_rows, (length, -1))
      if place == len(open_rows):
        left, row = capacity, len(rows)
        rows.append([])
      else:
        left, row = open_rows.pop(place)
      rows[row].append(int(i))
      if left > length:
        bisect.insort(open_rows, (left - length, row))
  return rows


def fill(documents: Sequence[Document], rows: Sequence[Sequence[int]], *, T: int) -> Batch:
  """Fills rows into numpy arrays of shape [len(rows), T]: the documents from left to right, then padding."""
  B = len(rows)
  tokens_BT = np.full((B, T), PAD, np.int32)
  segment_ids_BT = np.zeros((B, T), np.int32)
  loss_mask_BT = np.zeros((B, T), bool)
  for b, row in enumerate(rows):
    start = 0
    for segment, i in enumerate(row, start=1):
      document = documents[i]
      stop = start + len(document.tokens_T)
      if stop > T:
        raise UserError(f"row {b} holds {stop} tokens or more, T={T}")
      tokens_BT[b, start:stop] = document.tokens_T
      segment_ids_BT[b, start:stop] = segment
      loss_mask_BT[b, start:stop] = document.loss_mask_T
      start = stop
  return Batch(tokens_BT, segment_ids_BT, loss_mask_BT)
