"""Rows of JSON lines files as the rows of a domain: an index of the files, and an order drawn from the seed.

Only the index is kept in memory, 36 bytes a row. A row is read from its file when it is drawn.
"""

from __future__ import annotations

import array
import dataclasses
import errno
import functools
import glob
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemocascade.data.sources import json_object
from nemocascade.domains.rows import check_prompt, make_rng, prompt_digest, split_of_digest
from nemocascade.errors import UserError, listed, short
from nemocascade.verifiers.verdict import Row

MOST_REASONS = 5  # That a message lists.
LONGEST_REASON = 160  # Characters of one.

# Says why a row is left out, in words that are counted; "" keeps it. It raises UserError for a malformed row.
Filter = Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Index:
  """Places of N rows in JSON lines files.

  Attributes:
    file_N: int32, index in `files`; offset_N, int64, byte at which the row's line begins; line_N, int32, number of
      the line from 1; digest_N, uint64 [N, 2], digests of the rows' prompts, whatever their form and white space;
      sum_N, uint32, CRC-32 of the lines.
    left_out: why rows are left out -> (how many, the place of the first).
  """

  files: tuple[Path, ...]
  file_N: np.ndarray
  offset_N: np.ndarray
  line_N: np.ndarray
  digest_N: np.ndarray
  sum_N: np.ndarray
  left_out: dict[str, tuple[int, str]]

  def __len__(self) -> int:
    return len(self.file_N)

  def take(self, keep) -> Index:
    """The index of the rows `keep`: indices or a mask."""
    arrays = {name: getattr(self, name)[keep] for name in ("file_N", "offset_N", "line_N", "digest_N", "sum_N")}
    return dataclasses.replace(self, **arrays)

  def place(self, i: int) -> str:
    """Where row i stands, for messages."""
    return f"{self.files[self.file_N[i]]}, line {self.line_N[i]}"

  def read(self, i: int) -> Row:
    """Row i as its file has it.

    Raises:
      OSError: the file has changed since it was indexed, or cannot be read.
    """
    try:
      with open(self.files[self.file_N[i]], "rb") as file:
        file.seek(self.offset_N[i])
        line = file.readline()
    except OSError as error:
      raise OSError(error.errno, error.strerror, self.place(i)) from error
    if _sum(line) != self.sum_N[i]:
      raise OSError(errno.EIO, "the file was changed while the run reads it", self.place(i))
    return json.loads(line)

  def summary(self) -> str:
    """What was left out, in one line; "" if nothing was."""
    parts = [f"{count} {why} (first: {place})" for why, (count, place) in self.left_out.items()]
    more = [f"{len(parts) - MOST_REASONS} more reasons"] if len(parts) > MOST_REASONS else []
    return "; ".join(parts[:MOST_REASONS] + more)


def find(pattern: str, field: str) -> tuple[Path, ...]:
  """The files that a path or glob names, sorted; a folder is all *.jsonl in it.

  Raises:
    UserError: there is none.
  """
  path = Path(pattern).expanduser()
  if path.is_dir():
    path = path / "*.jsonl"
  files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
  if not files:
    raise UserError(f"{field}={pattern!r}: no such file (from {Path.cwd()})")
  return tuple(files)


def index(files: tuple[Path, ...], left_out: Filter) -> Index:
  """Reads the files once and notes where the rows are that `left_out` keeps.

  Raises:
    UserError: a line is not a JSON object, or its prompt cannot be used; the message names file and line.
  """
  places, digests = array.array("q"), bytearray()
  counts: dict[str, tuple[int, str]] = {}
  for f, path in enumerate(files):
    for number, offset, line in _lines(path):
      where = f"{path}, line {number}"
      try:
        row = released_form(json_object(line))
        why = short(left_out(row), LONGEST_REASON)
        if not why:
          check_prompt(row)
      except UserError as error:
        raise UserError(f"{where}: {error}") from error
      except RecursionError as error:
        raise UserError(f"{where}: is nested too deep") from error
      if why:
        count, first = counts.get(why, (0, where))
        counts[why] = count + 1, first
        continue
      places.extend((f, offset, number, _sum(line)))
      digests += prompt_digest(row, spaced=False)
  file_N, offset_N, line_N, sum_N = np.array(places, np.int64).reshape(-1, 4).T
  digest_N = np.array(digests).view(np.uint64).reshape(-1, 2)
  return Index(
    files, file_N.astype(np.int32), offset_N.copy(), line_N.astype(np.int32), digest_N, sum_N.astype(np.uint32), counts
  )


def _sum(line: bytes) -> int:
  return zlib.crc32(line.strip())


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
  """(number from 1, byte offset, line) of every line that is not blank."""
  offset = 0
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield number, offset, line
        offset += len(line)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error


def released_form(row: dict[str, Any]) -> Row:
  """The row in the form of the released data.

  A row may have `messages` (and `tools`) or `prompt`, a text, in place of `responses_create_params`. Fields under
  `verifier_metadata` are also given at the top, unless a field there has the name.
  """
  metadata = row.get("verifier_metadata")
  row = {**metadata, **row} if isinstance(metadata, dict) else dict(row)
  if "responses_create_params" not in row:
    if "messages" in row:
      params = {"input": row["messages"], **({"tools": row["tools"]} if row.get("tools") else {})}
    elif "prompt" in row:
      params = {"input": row["prompt"]}
    else:
      raise UserError(f"has none of responses_create_params, messages and prompt, only {listed(sorted(row), 80)}")
    row["responses_create_params"] = params
  agent = row.get("agent_ref") or {}
  if not isinstance(agent, dict) or not isinstance(agent.get("name") or "", str):
    raise UserError(f"agent_ref: must be an object with a name, is {short(repr(row['agent_ref']))}")
  return row


def agent_of(row: Row) -> str | None:
  """The name of the agent that a row in the released form has; None if it has none."""
  return (row.get("agent_ref") or {}).get("name") or None


@dataclasses.dataclass(frozen=True)
class FileRows:
  """The Rows of a domain, from files. The training list is a new permutation of the rows in every epoch.

  Attributes:
    name: the domain's name, which every row gets as `agent_ref.name`; the released name is kept as
      `agent_ref.agent`.
  """

  name: str
  training: Index
  held: Index

  @functools.cached_property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.training.digest_N.tobytes() + self.training.sum_N.tobytes()).hexdigest()[:16]

  def train(self, seed: int, number: int) -> Row:
    epoch, place = divmod(number, len(self.training))
    return self._row(self.training, _order(self.name, "train", seed, epoch, len(self.training))[place])

  def heldout(self, seed: int, start: int, count: int) -> list[Row]:
    order = _order(self.name, "heldout", seed, 0, len(self.held))
    return [self._row(self.held, i) for i in order[start : start + count]]

  def in_file_order(self, i: int) -> Row:
    """Row i to train on, in the files' order."""
    return self._row(self.training, i)

  def spread(self, count: int) -> list[tuple[Row, str]]:
    """(row, where it stands) of `count` rows to train on and as many held-out ones, taken evenly over the files."""
    return [
      (self._row(rows, i), rows.place(i))
      for rows in (self.training, self.held)
      for i in sorted({n * len(rows) // count for n in range(count)})
    ]

  def _row(self, rows: Index, i: int) -> Row:
    row = released_form(rows.read(int(i)))
    agent = agent_of(row)
    row["agent_ref"] = {"type": "responses_api_agents", "name": self.name, **({"agent": agent} if agent else {})}
    return row


def open_rows(
  name: str, rows: str, heldout: str, *, left_out: Filter, left_out_of_heldout: Filter, field: str
) -> FileRows:
  """Indexes a domain's files.

  Args:
    rows, heldout: paths or globs. Without held-out files, one prompt in HELDOUT_SHARE of `rows` is held out, by the
      hash of its text.
    left_out, left_out_of_heldout: the filters of `rows` and of `heldout`.
    field: the config section of the domain, for messages.

  Raises:
    UserError: no file is found, a row is malformed, no row is left, or a held-out prompt is also trained on.
  """
  everything = index(find(rows, f"{field}.rows"), left_out)
  if not len(everything):
    raise UserError(f"{field}.rows={rows!r}: no row is left: {everything.summary() or 'the files are empty'}")
  if heldout:
    training, held = everything, index(find(heldout, f"{field}.heldout"), left_out_of_heldout)
    if not len(held):
      raise UserError(f"{field}.heldout={heldout!r}: no row is left: {held.summary() or 'the files are empty'}")
    check_apart(training, held, f"{field}.rows", f"{field}.heldout")
  else:
    first_byte_N = everything.digest_N.view(np.uint8).reshape(-1, 16)[:, 0]
    held_N = np.array([split_of_digest(bytes([byte])) == "heldout" for byte in range(256)])[first_byte_N]
    training, held = everything.take(~held_N), everything.take(held_N)
    if not len(training) or not len(held):
      raise UserError(
        f"{field}.heldout='': of the {len(everything)} rows of {rows!r} the hash of the prompt holds {len(held)} out;"
        f" give {field}.heldout, a file of other prompts"
      )
  return FileRows(name, training, held)


def check_apart(training: Index, held: Index, training_field: str, held_field: str) -> None:
  """Raises UserError if a prompt of `held` is one of `training` too. The fields are those of the files, for messages."""
  trained_N, held_N = (np.ascontiguousarray(index.digest_N).view("S16").ravel() for index in (training, held))
  shared = np.flatnonzero(np.isin(held_N, trained_N))
  if len(shared):
    first = np.flatnonzero(trained_N == held_N[shared[0]])[0]
    raise UserError(
      f"{held_field}: {len(shared)} of its {len(held)} prompts are in {training_field} too, such as that of"
      f" {held.place(shared[0])}, which is that of {training.place(first)}; remove them from one"
    )


@functools.lru_cache(maxsize=64)
def _order(name: str, split: str, seed: int, epoch: int, count: int) -> np.ndarray:
  return make_rng(seed, name, split, epoch).permutation(count)
