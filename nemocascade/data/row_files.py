"""Random access to the rows of JSONL, Parquet and array_record files, and of TFDS datasets.

An object of these classes can be pickled: a copy opens its files again. Memory does not grow with the data: rows of
JSONL files are found by byte offsets in an index file, which is read through a memory map.
"""

import errno
import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from nemocascade.data.sources import Demonstrations, json_object
from nemocascade.data.tool_format import without_nulls
from nemocascade.errors import UserError, listed
from nemocascade.state_files import whole

SAMPLED = 1 << 26  # Bytes of a source's files that say whether its content is still the same.
SAMPLED_ROWS = 4096  # Rows of a TFDS dataset whose values are compared.
SUFFIXES = (".jsonl", ".parquet", ".array_record")
COLUMNS = ("messages", "tools")  # Columns of Parquet files that are read.
_BLOCK = 1 << 23  # Bytes of a JSONL file that are indexed at a time, up to the end of a line.
_WHITE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))  # Which bytes are white space.


class RowFiles(Sequence):
  """Rows of files by number.

  Attributes:
    files: paths, in the order of their rows.
    sizes: of the files when they were opened, in bytes.
    groups: None, or the cumulative numbers of rows that are cheap to read together, int64.
  """

  files: list[Path]
  sizes: list[int]
  groups: np.ndarray | None = None

  def __getitem__(self, place: int) -> dict[str, Any]:
    """The row as a dict. Raises UserError without its place if it is damaged or no object."""
    raise NotImplementedError

  def place(self, number: int) -> str:
    """The file of a row and its place in it, for messages."""
    raise NotImplementedError

  def check_unchanged(self) -> None:
    """Raises OSError if a file does not have the size that it was opened with."""
    for file, size in zip(self.files, self.sizes, strict=True):
      if not file.is_file() or file.stat().st_size != size:
        raise OSError(errno.EIO, f"the file was changed while the run reads it; it had {size} bytes", str(file))

  def identity(self) -> list:
    """JSON that changes if rows are added, removed or replaced, but not if the files move.

    Of data larger than SAMPLED only evenly spaced parts are compared, so a small change may go unnoticed.
    """
    sizes = [_size(path) for path in self.files]
    return [len(self), [[path.name, size] for path, size in zip(self.files, sizes)], digest(self.files, sizes)]


def open_rows(path: str, index: Path) -> RowFiles:
  """Opens a file, all files that match a pattern, or a folder of files of one kind or with a TFDS dataset.

  Args:
    path: the files' names end in one of SUFFIXES; TFDS adds a shard number to the last.
    index: folder for the index of JSONL files, which is written at the first call and then read.

  Raises:
    UserError: nothing is found, the files are of several kinds, or one is damaged or lacks the messages.
  """
  files, open_files = _found(path)
  return open_files(files) if open_files else JsonLines(files, index)


def first_rows(path: str, count: int) -> list[tuple[str, dict[str, Any] | UserError]]:
  """(place, row or what is wrong with it) of the first rows, at most `count`. No index is written.

  Raises:
    UserError: as open_rows.
  """
  files, open_files = _found(path)
  found: list[tuple[str, dict[str, Any] | UserError]] = []
  if open_files is None:
    for file in files:
      with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
          if len(found) == count:
            return found
          if len(line.strip()) > 0:
            found.append((f"{file}, line {number}", _or_error(lambda line=line: json_object(line))))
    return found
  rows = open_files(files)
  return [(rows.place(i), _or_error(lambda i=i: rows[i])) for i in range(min(count, len(rows)))]


def _or_error(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | UserError:
  try:
    return read()
  except UserError as error:
    return error


def _found(path: str) -> tuple[list[Path], Callable[[list[Path]], RowFiles] | None]:
  """(files, the class that opens them, or None for JSONL)"""
  root = Path(path)
  if root.is_dir():
    datasets = sorted(root.rglob("dataset_info.json"))
    if len(datasets) > 1:
      raise UserError(f"holds {len(datasets)} TFDS datasets; give the folder of one, such as {datasets[0].parent}")
    if datasets:
      return [datasets[0].parent], lambda folders: TfdsRows(folders[0])
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and _suffix(file)]
    if not files:
      raise UserError(f"the folder holds no file that ends in {', '.join(SUFFIXES)}")
  else:
    files = [Path(file) for file in sorted(glob.glob(path, recursive=True))]
    if not files:
      raise UserError(f"no file matches (from {Path.cwd()}); give a path or a pattern, such as 'chats/*.jsonl'")
  if wrong := [file for file in files if not _suffix(file)]:
    raise UserError(f"{wrong[0].name}: must end in {', '.join(SUFFIXES)}")
  kinds = sorted({_suffix(file) for file in files})
  if len(kinds) > 1:
    raise UserError(f"holds files of several kinds, {', '.join(kinds)}; give a pattern that takes one kind")
  return files, {".jsonl": None, ".parquet": ParquetRows, ".array_record": ArrayRecords}[kinds[0]]


def _suffix(file: Path) -> str:
  """The one of SUFFIXES that the file's name ends in, shard numbers aside; else ""."""
  found = file.suffix.split("-")[0]
  return found if found in SUFFIXES else ""


class JsonLines(RowFiles):
  """Rows of JSONL files, found by the byte offsets of their lines. Blank lines are no rows."""

  def __init__(self, files: Sequence[Path], index: Path):
    self.files = list(files)
    self.sizes = [_size(file) for file in self.files]
    self._starts = np.cumsum([0, *self.sizes])  # Of the files, laid end to end.
    stamp = json.dumps([[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files])
    self._index = index / f"{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.offsets"
    if not self._index.exists():
      _index_lines(self.files, self._starts, self._index)
    self._rows = self._index.stat().st_size // 8
    if not self._rows:
      raise UserError(f"{self.files[0]}: holds no rows")

  def __getstate__(self) -> dict:
    lazy = ("_offsets", "_handles")
    return {name: value for name, value in self.__dict__.items() if name not in lazy}

  @functools.cached_property
  def _offsets(self) -> np.ndarray:
    return np.memmap(self._index, "<i8", "r")

  @functools.cached_property
  def _handles(self) -> dict[int, int]:
    return {}

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, place: int) -> dict[str, Any]:
    start = int(self._offsets[place])
    file = self._file(start)
    stop = int(self._offsets[place + 1]) if place + 1 < self._rows else int(self._starts[-1])
    stop = min(stop, int(self._starts[file + 1]))
    if file not in self._handles:
      if len(self._handles) > 64:
        os.close(self._handles.pop(next(iter(self._handles))))
      self._handles[file] = os.open(self.files[file], os.O_RDONLY)
    return json_object(os.pread(self._handles[file], stop - start, start - int(self._starts[file])))

  def place(self, number: int) -> str:
    line = np.memmap(self._index.with_suffix(".lines"), "<u4", "r")[number]
    return f"{self.files[self._file(int(self._offsets[number]))]}, line {line}"

  def _file(self, offset: int) -> int:
    return int(np.searchsorted(self._starts, offset, side="right")) - 1


def _index_lines(files: Sequence[Path], starts: np.ndarray, path: Path) -> None:
  """Writes the offsets of all lines that are not blank, and their line numbers beside them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with whole(path) as offsets_path, whole(path.with_suffix(".lines")) as lines_path:
    with offsets_path.open("wb") as offsets, lines_path.open("wb") as lines:
      for file, base in zip(files, starts):
        for line_starts, numbers in _lines(file):
          offsets.write((line_starts + base).astype("<i8").tobytes())
          lines.write(numbers.astype("<u4").tobytes())


def _lines(file: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (offsets, line numbers from 1) of the lines that are not blank, a block of whole lines at a time."""
  number, at = 1, 0  # Number and offset of the block's first line.
  with file.open("rb") as data:
    while block := data.read(_BLOCK) + data.readline():
      bytes_ = np.frombuffer(block, np.uint8)
      ends = np.flatnonzero(bytes_ == ord("\n")) + 1
      if not len(ends) or ends[-1] < len(block):  # The file's last line may lack its end.
        ends = np.append(ends, len(block))
      begins = np.concatenate([[0], ends[:-1]])
      kept = np.ones(len(begins), bool)
      for i in np.flatnonzero(_WHITE[bytes_[begins]]):  # Rows seldom begin with white space.
        kept[i] = bool(block[begins[i] : ends[i]].strip())
      yield begins[kept] + at, np.flatnonzero(kept) + number
      number, at = number + len(ends), at + len(block)


class ParquetRows(RowFiles):
  """Rows of Parquet files. A group of rows is decoded as a whole; the last one is kept."""

  def __init__(self, files: Sequence[Path]):
    self.files = list(files)
    self.sizes = [_size(file) for file in self.files]
    sizes, self._of = [], []  # Rows of each group; (file, group in it).
    for number, file in enumerate(self.files):
      metadata = self._open(number)
      names = metadata.schema_arrow.names
      if "messages" not in names:
        raise UserError(f"{file}: has no column 'messages', only {listed(names)}")
      for group in range(metadata.num_row_groups):
        sizes.append(metadata.metadata.row_group(group).num_rows)
        self._of.append((number, group))
    self.groups = np.cumsum(sizes)
    self._kept: tuple[int, Any] = (-1, None)
    if not len(self):
      raise UserError(f"{self.files[0]}: holds no rows")

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_kept": (-1, None)}

  def __len__(self) -> int:
    return int(self.groups[-1]) if len(self.groups) else 0

  def __getitem__(self, place: int) -> dict[str, Any]:
    group, row = self._find(place)
    if self._kept[0] != group:
      number, own = self._of[group]
      file = self._open(number)
      columns = [name for name in COLUMNS if name in file.schema_arrow.names]
      try:
        self._kept = group, file.read_row_group(own, columns=columns)
      except Exception as error:  # pyarrow has many exception types.
        raise UserError(f"the row group is damaged ({' '.join(str(error).split())[:80]})") from error
    return without_nulls(self._kept[1].slice(row, 1).to_pylist()[0])

  def place(self, number: int) -> str:
    group, _ = self._find(number)
    first = next(i for i, (file, _) in enumerate(self._of) if file == self._of[group][0])
    before = int(self.groups[first - 1]) if first else 0
    return f"{self.files[self._of[group][0]]}, row {number - before}"

  def _find(self, place: int) -> tuple[int, int]:
    """(group, row in it)"""
    group = int(np.searchsorted(self.groups, place, side="right"))
    return group, place - (int(self.groups[group - 1]) if group else 0)

  def _open(self, number: int):
    import pyarrow.parquet  # A dependency of tensorflow-datasets. The import takes 0.2 s.

    try:
      return pyarrow.parquet.ParquetFile(self.files[number])
    except Exception as error:
      raise UserError(f"{self.files[number]}: not a Parquet file, or damaged") from error


class ArrayRecords(RowFiles):
  """Rows of array_record files whose records are JSON objects."""

  def __init__(self, files: Sequence[Path]):
    self.files = list(files)
    self.sizes = [_size(file) for file in self.files]
    self._ends = np.cumsum([reader.num_records() for reader in self._readers])
    if not len(self):
      raise UserError(f"{self.files[0]}: holds no rows, or is no array_record file")

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name != "_readers"}

  @functools.cached_property
  def _readers(self) -> list:
    try:
      return [array_record_module.ArrayRecordReader(str(file)) for file in self.files]
    except Exception as error:  # The binding raises several exception types.
      raise UserError(f"{listed(map(str, self.files))}: is no array_record file, or damaged") from error

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, place: int) -> dict[str, Any]:
    file, row = self._find(place)
    try:
      (record,) = self._readers[file].read([row])
    except Exception as error:
      raise UserError("the record is damaged") from error
    return json_object(record)

  def place(self, number: int) -> str:
    file, row = self._find(number)
    return f"{self.files[file]}, record {row}"

  def _find(self, place: int) -> tuple[int, int]:
    file = int(np.searchsorted(self._ends, place, side="right"))
    return file, place - (int(self._ends[file - 1]) if file else 0)


class TfdsRows(RowFiles):
  """Rows of a TFDS dataset in array_record format."""

  def __init__(self, directory: Path):
    self._directory = directory
    self.files = self._dataset.files
    self.sizes = [_size(file) for file in self.files]

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name != "_dataset"}

  @functools.cached_property
  def _dataset(self) -> Demonstrations:
    return Demonstrations(self._directory)

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, place: int) -> dict[str, Any]:
    return self._dataset[place]

  def place(self, number: int) -> str:
    return f"{self._directory}, example {number}"

  def identity(self) -> list:
    """As above, but of the values of SAMPLED_ROWS rows: a dataset that is written again has other bytes."""
    digest = hashlib.sha256()
    for i in sorted({*range(0, len(self), max(1, len(self) // SAMPLED_ROWS)), len(self) - 1}):
      digest.update(json.dumps(self[i], sort_keys=True).encode())
    return [len(self), digest.hexdigest()]


def digest(files: Sequence[Path], sizes: Sequence[int], most: int = SAMPLED, part: int = 1 << 14) -> str:
  """SHA-256 of the files' content: all of it, or parts with equal gaps of about `most` bytes together."""
  digest = hashlib.sha256()
  step = part * max(1, -(-sum(sizes) // most))
  for file, size in zip(files, sizes):
    try:
      with file.open("rb", buffering=0) as data:
        for start in [*range(0, size, step), max(0, size - part)]:
          digest.update(os.pread(data.fileno(), part, start))
    except OSError as error:
      raise UserError(f"{file}: {error.strerror or error}") from error
  return digest.hexdigest()


def _size(file: Path) -> int:
  try:
    return file.stat().st_size
  except OSError as error:
    raise UserError(f"{file}: {error.strerror or error}") from error
