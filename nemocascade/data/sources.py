"""Conversations on disk: TFDS datasets in array_record format, and JSON lines."""

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from nemocascade.errors import UserError
from nemocascade.state_files import named, own_name, place

SPLIT = "train"
_BLOCK = 4096  # Examples passed to the writer at a time.


def write_demonstrations(
  examples: Iterable[Mapping[str, Any]],
  directory: str | os.PathLike,
  *,
  name: str,
  version: str = "1.0.0",
  examples_per_shard: int = 65_536,
) -> pathlib.Path:
  """Writes a TFDS dataset in array_record format; on an error nothing new is left at `directory`.

  All examples have the keys and types of the first. Values are str, bool, int or float; lists and dicts
  (messages, tools) are stored as JSON. An older dataset at `directory` is replaced.

  Raises:
    UserError: `directory` holds other files, there are no examples, a value cannot be stored, or an
      example differs from the first in its keys or types.
    OSError: the disk is full.
  """
  import tensorflow_datasets as tfds  # The import takes half a second, so only writing and reading do it.

  directory = pathlib.Path(directory)
  is_dataset = (directory / "dataset_info.json").exists()
  if directory.exists() and not is_dataset and not _is_empty_folder(directory):
    raise UserError(f"{directory}: exists and is no dataset; give another place")

  examples = map(_storable, examples)
  first = next(examples, None)
  if first is None:
    raise UserError(f"{directory}: there are no examples to write")
  features = tfds.features.FeaturesDict({key: _feature(key, first[key]) for key in first})

  partial = directory.with_name(f".{directory.name}.{own_name()}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name, version=tfds.core.Version(version), data_dir=str(partial), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=examples_per_shard, file_format="array_record")
    writer.initialize_splits([SPLIT])
    numbered = enumerate(itertools.chain([first], examples))
    checked = (_alike(example, first, place) for place, example in numbered)
    with named(directory):
      while block := list(itertools.islice(checked, _BLOCK)):
        writer.add_examples({SPLIT: block})
      writer.close_all()
      _move_into_place(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return directory


def read_demonstrations(directory: str | os.PathLike) -> "Demonstrations":
  """Opens a dataset that `write_demonstrations` or TFDS wrote; examples are read by index."""
  return Demonstrations(directory)


class Demonstrations(Sequence):
  """Random access to a TFDS dataset in array_record format.

  Opening it checks that every shard is there and has the expected number of examples.

  Raises:
    UserError: the dataset or a shard is missing or damaged; also on reading a damaged example.
  """

  def __init__(self, directory: str | os.PathLike):
    import tensorflow_datasets as tfds

    directory = pathlib.Path(directory)
    if not directory.is_dir():
      raise UserError(f"{directory}: no such dataset")
    info, features = directory / "dataset_info.json", directory / "features.json"
    # TFDS raises many exception types for valid JSON that is not its metadata.
    _read_json(features)
    try:
      self._features = tfds.features.FeaturesDict.from_config(str(directory))
    except Exception as error:
      raise UserError(f"{features}: not the features of a TFDS dataset") from error
    names = [split.get("name") for split in _entries(_read_json(info), "splits")]
    if SPLIT not in names:
      raise UserError(f"{info}: has no split {SPLIT!r}, only {names}")
    try:
      split = tfds.builder_from_directory(directory).info.splits[SPLIT]
      self.files = [pathlib.Path(path) for path in split.filepaths]
      self._ends = np.cumsum([0, *split.shard_lengths])
      kind = split.filename_template.filetype_suffix if split.filename_template else "array_record"
    except Exception as error:
      raise UserError(f"{info}: not the description of a TFDS dataset") from error
    if kind != "array_record":
      raise UserError(
        f"{info}: is written as {kind}; write it with file_format='array_record', which is read by number"
      )
    self._readers = [_open_shard(file, length) for file, length in zip(self.files, split.shard_lengths, strict=True)]

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, place: int) -> dict[str, Any]:
    if not 0 <= place < len(self):
      raise IndexError(f"example {place} of {len(self)}")
    shard = int(np.searchsorted(self._ends, place, side="right")) - 1
    try:
      (record,) = self._readers[shard].read([int(place - self._ends[shard])])
      example = self._features.deserialize_example_np(record)
    except Exception as error:  # array_record and protobuf share no exception type.
      raise UserError(f"{self.files[shard]}: example {place} is damaged") from error
    return _plain(self._features, example)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The objects of a JSON lines file, without blank lines. Raises UserError on the first bad line."""
  rows = []
  for number, row in numbered_jsonl(path):
    if isinstance(row, UserError):
      raise UserError(f"{path}, line {number}: {row}") from row
    rows.append(row)
  return rows


def numbered_jsonl(path: str | os.PathLike) -> list[tuple[int, dict[str, Any] | UserError]]:
  """For each line that is not blank: (line number from 1, its object or a UserError that names the fault)."""
  path = place(path)
  rows: list[tuple[int, dict[str, Any] | UserError]] = []
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or type(error).__name__}") from error
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      rows.append((number, json_object(line)))
    except UserError as error:
      rows.append((number, error))
  return rows


def json_object(line: bytes) -> dict[str, Any]:
  """The object of a line of JSON. Raises UserError if it is not JSON, or no object."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:  # Invalid JSON or invalid UTF-8.
    raise UserError(f"not JSON ({error})") from error
  if not isinstance(row, dict):
    raise UserError(f"must be an object, is {type(row).__name__}")
  return row


def _open_shard(file: pathlib.Path, length: int):
  if not file.is_file():
    raise UserError(f"{file}: shard is missing")
  try:
    reader = array_record_module.ArrayRecordReader(str(file))
    found = reader.num_records()
  except Exception as error:  # The binding raises several exception types for a truncated file.
    raise UserError(f"{file}: shard is cut short or damaged") from error
  if found != length:
    raise UserError(f"{file}: holds {found} examples, dataset_info.json says {length}")
  return reader


def _is_empty_folder(path: pathlib.Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def _storable(example: Mapping[str, Any]) -> dict[str, Any]:
  return {
    key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    for key, value in example.items()
  }


def _feature(key: str, value: Any):
  import tensorflow_datasets as tfds

  if isinstance(value, str):
    return tfds.features.Text()
  for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
    if isinstance(value, kind):
      return tfds.features.Scalar(dtype=dtype)
  raise UserError(f"field {key!r} of an example: cannot store a {type(value).__name__}")


def _alike(example: dict[str, Any], first: dict[str, Any], place: int) -> dict[str, Any]:
  for key in sorted(first.keys() | example.keys()):
    kinds = [type(e[key]).__name__ if key in e else "absent" for e in (first, example)]
    if kinds[0] != kinds[1]:
      raise UserError(f"field {key!r} of example {place}: is {kinds[1]}, in the first {kinds[0]}")
  return example


def _plain(feature: Any, value: Any) -> Any:
  """The value of a TFDS feature as Python objects. TFDS gives a sequence of dicts as a dict of sequences."""
  if isinstance(value, dict) and not hasattr(feature, "feature"):
    return {key: _plain(feature[key], part) for key, part in value.items()}
  if isinstance(value, dict):  # Of a sequence of dicts, whose `feature` is that of one of them.
    count = max((len(part) for part in value.values()), default=0)
    parts = [{key: part[i] for key, part in value.items()} for i in range(count)]
    return [_plain(feature.feature, part) for part in parts]
  if isinstance(value, bytes):
    return value.decode("utf-8")
  value = np.asarray(value).tolist() if not isinstance(value, list) else value
  return [_plain(None, part) for part in value] if isinstance(value, list) else value


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  except ValueError as error:
    raise UserError(f"{path}: not JSON, cut short or damaged ({error})") from error


def _entries(metadata: Any, key: str) -> list[dict]:
  entries = metadata.get(key) if isinstance(metadata, dict) else None
  entries = entries if isinstance(entries, list) else []
  return [entry for entry in entries if isinstance(entry, dict)]


def _move_into_place(partial: pathlib.Path, directory: pathlib.Path) -> None:
  """Replaces `directory` by `partial` in two renames: one rename cannot replace a folder that has files."""
  old = directory.with_name(f".{directory.name}.{own_name()}.old")
  shutil.rmtree(old, ignore_errors=True)
  if directory.exists():
    os.rename(directory, old)
  os.rename(partial, directory)
  shutil.rmtree(old, ignore_errors=True)
