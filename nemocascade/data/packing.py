"""Best-fit packing of documents into rows of T tokens."""

import bisect
from collections.abc import Sequence

import numpy as np

from nemocascade.data.documents import Document
from nemocascade.errors import UserError
from nemocascade.types import Batch


def pack(lengths: Sequence[int], *, capacity: int, window: int = 65_536) -> list[list[int]]:
  """Best-fit packing: the document numbers of each row; the lengths of a row sum to at most `capacity`.

  Within each window of documents the longest comes first; each goes into the fullest row that still
  has room for it.

  Args:
    lengths: tokens of each document; at least 1.
    capacity: tokens of a row.
    window: number of documents that are sorted together.

  Raises:
    UserError: a document is empty, or longer than `capacity`.
  """
  lengths = np.asarray(lengths, dtype=np.int64)
  if np.any(lengths < 1):
    raise UserError(f"document {int(np.argmax(lengths < 1))} is empty")
  if np.any(lengths > capacity):
    i = int(np.argmax(lengths > capacity))
    raise UserError(f"document {i} has {lengths[i]} tokens, a row holds {capacity}: lengthen the rows")

  rows: list[list[int]] = []
  open_rows: list[tuple[int, int]] = []  # (tokens left, row number), sorted.
  for start in range(0, len(lengths), window):
    block = lengths[start : start + window]
    for i in start + np.argsort(-block, kind="stable"):
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


def fill(rows: Sequence[Sequence[Document]], *, T: int) -> Batch:
  """Fills rows into numpy arrays of shape [len(rows), T]: the documents from left to right, then padding.

  Rows without documents take no memory until they are read.
  """
  B = len(rows)  # PAD is 0.
  tokens_BT = np.zeros((B, T), np.int32)
  segment_ids_BT = np.zeros((B, T), np.int32)
  loss_mask_BT = np.zeros((B, T), bool)
  for b, row in enumerate(rows):
    start = 0
    for segment, document in enumerate(row, start=1):
      stop = start + len(document.tokens_T)
      if stop > T:
        raise UserError(f"row {b} holds {stop} tokens or more, T={T}")
      tokens_BT[b, start:stop] = document.tokens_T
      segment_ids_BT[b, start:stop] = segment
      loss_mask_BT[b, start:stop] = document.loss_mask_T
      start = stop
  return Batch(tokens_BT, segment_ids_BT, loss_mask_BT)
