"""State files of a run, in a folder or a bucket: atomic writes, and reads that validate against a JSON schema."""

import contextlib
import errno
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jsonschema
from etils import epath

from nemocascade.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BUCKET = "gs://"
UPLOAD_S = 30.0  # Seconds after which an object that is appended to is uploaded again.


def place(path: str | os.PathLike) -> Any:
  """The path as an object with pathlib's methods: an epath.Path of a bucket (gs://), else a pathlib.Path.

  pathlib.Path itself would take gs://bucket for a relative path.
  """
  said = os.fspath(path)
  return epath.Path(said) if said.startswith(BUCKET) else Path(said)


def on_bucket(path: str | os.PathLike) -> bool:
  return os.fspath(path).startswith(BUCKET)


def absolute(path: str | os.PathLike) -> Any:
  """The absolute path, with links followed. Those of buckets are absolute."""
  return place(path) if on_bucket(path) else Path(path).resolve()


def stands(path: str | os.PathLike) -> bool:
  """Whether there is something at this path, which may be a broken link."""
  return place(path).exists() if on_bucket(path) else os.path.lexists(path)


def read_state(path: str | Path, shape: dict, *, remedy: str) -> Any:
  """Reads a JSON file and validates it.

  Args:
    shape: its JSON schema.
    remedy: what the user can do if the file is damaged, such as "remove it to start anew".

  Raises:
    UserError: the file is missing, not a regular file, not JSON, or does not match the schema. The message
      names the file, the place in it and the remedy.
  """
  path = place(path)
  value = parsed(read_text(path, remedy=remedy), path, remedy=remedy)
  check_shape(value, shape, path, remedy=remedy)
  return value


def read_text(path: Path, *, remedy: str) -> str:
  """The text of a regular file in UTF-8. Raises UserError if it cannot be read or is not such a file."""
  try:
    if path.exists() and not path.is_file():  # Opening a named pipe would block.
      raise refused(path, "not a file", remedy)
    return path.read_bytes().decode()
  except OSError as error:
    raise refused(path, error.strerror or type(error).__name__, remedy) from error
  except UnicodeDecodeError as error:
    raise refused(path, f"not UTF-8 text (byte {error.start})", remedy) from error


def parsed(text: str, where: str | Path, *, remedy: str) -> Any:
  """Parses JSON text. Raises UserError, which names `where` the text comes from."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    why = "it is empty" if not text.strip() else str(error)
    raise refused(where, f"not JSON ({why})", remedy) from error


def check_shape(value: Any, shape: dict, where: str | Path, *, remedy: str) -> None:
  """Raises UserError if the value does not match the JSON schema `shape`; it names the place in the value.

  It is stricter than JSON schema: a number is finite, and a whole number has no decimal point. Besides JSON schema's
  types it knows "path", a text that can name a file: one that can be encoded and has no null character, and "infinite".
  Other texts may be what a model wrote, and have any characters. The keyword "sameShape" lists fields of an object that
  hold the rows of tables: all rows have one length, and all fields the same number of rows.
  """
  error = jsonschema.exceptions.best_match(_Strict(shape).iter_errors(value))
  if error is not None:
    place = error.json_path.removeprefix("$").removeprefix(".")
    raise refused(where, f"{place + ': ' if place else ''}{_said(error)}", remedy)


def _is_number(_, value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_infinite(_, value: Any) -> bool:
  return isinstance(value, float) and math.isinf(value)


def _is_whole(_, value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_path(_, value: Any) -> bool:
  return isinstance(value, str) and not any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in value)


def _same_shape(_, names: list[str], value: Any, schema: dict) -> Iterator[jsonschema.ValidationError]:
  del schema
  tables = {name: value[name] for name in names if isinstance(value, dict) and name in value}
  if all(isinstance(table, list) and all(isinstance(row, list) for row in table) for table in tables.values()):
    shapes = {name: [len(row) for row in table] for name, table in tables.items()}
    lengths = {length for shape in shapes.values() for length in shape}
    if len(lengths) > 1 or len({len(shape) for shape in shapes.values()}) > 1:
      yield jsonschema.ValidationError(f"rows of {' and '.join(names)} differ in number or length")


_Strict: Any = jsonschema.validators.extend(
  jsonschema.Draft202012Validator,
  {"sameShape": _same_shape},
  type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
    {"number": _is_number, "infinite": _is_infinite, "integer": _is_whole, "path": _is_path}
  ),
)


def _said(error: jsonschema.ValidationError) -> str:
  """The validation error in one short line, whatever the size of the value."""
  instance: Any = error.instance
  wanted: Any = error.validator_value
  value = json.dumps(instance)
  value = value if len(value) <= 40 else value[:37] + "..."
  if error.validator == "required":
    lacking = [name for name in wanted if name not in instance]
    return f"lacks {', '.join(lacking)}"
  if error.validator == "type":
    wanted = "string" if wanted == "path" and not isinstance(instance, str) else wanted
    return f"is {value}, must be of type {_words(wanted)}"
  if error.validator == "sameShape":
    return error.message
  if error.validator == "enum":
    return f"is {value}, must be one of {_words(wanted)}"
  return f"is {value}: {error.validator} {json.dumps(wanted)[:40]}"


def _words(choices: str | list) -> str:
  return choices if isinstance(choices, str) else ", ".join(map(str, choices))


def refused(where: str | Path, why: str, remedy: str) -> UserError:
  return UserError(f"{where} is damaged: {why}{'; ' if remedy else ''}{remedy}")


def write_json(path: str | Path, value: Any) -> None:
  """Writes a JSON file atomically: under a temporary name, with fsync, then renamed."""
  path = place(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
    file.write(json.dumps(value, indent=1) + "\n")
    file.flush()
    os.fsync(file.fileno())


def own_name() -> str:
  """A word for temporary names that no other process has: in containers, processes of several hosts have one number."""
  return f"{socket.gethostname()[:32]}.{os.getpid()}"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """Context manager: a temporary path next to `path`, renamed to it at the end or removed on an error.

  That of a bucket's object is a local file: an object is written whole or not at all.
  """
  if on_bucket(path):
    with tempfile.TemporaryDirectory() as folder, named(path):
      yield (local := Path(folder) / "object")
      path.write_bytes(local.read_bytes())
    return
  partial = path.with_name(f"{path.name}.{own_name()}.tmp")
  try:
    with named(path):
      yield partial
      partial.rename(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def append_to(path: str | os.PathLike, mode: str = "a") -> "IO[Any] | Appended":
  """Opens a file, or an object of a bucket, to append to it; UTF-8. The mode is "a" or "ab"."""
  return Appended(place(path)) if on_bucket(path) else Path(path).open(mode, encoding=None if "b" in mode else "utf-8")


class Appended:
  """An object of a bucket that is appended to. Objects can't be: all of it is kept, and uploaded now and then."""

  def __init__(self, path: epath.Path):
    self.name, self._path = str(path), path
    self._data = bytearray(path.read_bytes() if path.exists() else b"")
    self._uploaded, self._at = len(self._data), time.monotonic()

  def write(self, data: str | bytes) -> None:
    self._data += data.encode() if isinstance(data, str) else data

  def flush(self) -> None:
    """Uploads the object if it has not been for UPLOAD_S seconds."""
    if time.monotonic() - self._at >= UPLOAD_S:
      self.upload()

  def upload(self) -> None:
    if self._uploaded < len(self._data) or not self._data:
      self._path.write_bytes(bytes(self._data))
    self._uploaded, self._at = len(self._data), time.monotonic()

  def close(self) -> None:
    self.upload()

  def __enter__(self) -> "Appended":
    return self

  def __exit__(self, *_) -> None:
    self.close()


@contextlib.contextmanager
def named(path: Path, needed: int | None = None) -> Iterator[None]:
  """Context manager for writing: errors get the path's name and, on a full disk, the sizes needed and free.

  Args:
    needed: bytes that will be written, for the message.

  Raises:
    OSError: replaces an OSError without a file name, and every error of a full disk.
  """
  try:
    yield
  except OSError as error:
    if error.errno is None or (error.filename and error.errno not in FULL):
      raise
    raise _told(error, error.errno, path, needed) from error
  except Exception as error:  # TensorStore and Orbax raise ValueErrors that hold the system's message.
    number = next((n for n in FULL if os.strerror(n) in str(error)), None)
    if number is None:
      raise
    raise _told(error, number, path, needed) from error


def _told(error: Exception, number: int, path: Path, needed: int | None) -> OSError:
  if number not in FULL:
    return OSError(number, os.strerror(number), str(path))
  there = next(p for p in (path, *path.parents) if p.exists())
  size = f"{needed / 1e6:.1f} MB are needed and " if needed is not None else ""
  why = f"{os.strerror(number)}: {size}{shutil.disk_usage(there).free / 1e6:.1f} MB are free"
  return OSError(number, f"{why}; make room and run again, what was written before stays", str(path))
