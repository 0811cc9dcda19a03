"""Checksums of a folder's files: written before the folder is committed, verified before it is read.

Those of a bucket's objects are the bucket's own, which it keeps with each object: no object is read for them.
"""

import base64
import errno
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemocascade.errors import UserError
from nemocascade.state_files import on_bucket, read_state, whole

CHECKSUMS = "checksums.json"  # {file: [bytes, crc32 of each PIECE_BYTES of it]}, or {object: [bytes, crc32c]}
# Files of a checkpoint in a bucket that Orbax writes after the checksums.
LATER = ("commit_success.txt", "_CHECKPOINT_METADATA")
PIECE_BYTES = 64 << 20  # Pieces of a large file are read in parallel.
BLOCK_BYTES = 1 << 22
THREADS = 16  # zlib and reads release the GIL, and network storage is faster with several reads at a time.
SHAPE = {
  "type": "object",
  "minProperties": 1,
  "additionalProperties": {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
  },
}
# Errors of the machine, not of the files: they are not reported as damage.
NOT_DAMAGE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Damage(ValueError):
  """A file is missing, changed or unexpected; the message is one line that names it."""


def write(folder: Path) -> None:
  """Writes checksums.json for all files of the folder; call it before the folder gets its final name."""
  if on_bucket(folder):
    with whole(folder / CHECKSUMS) as partial:
      partial.write_text(json.dumps(_objects(folder)))
    return
  names = sorted(_files(folder))
  sizes = [(folder / name).stat().st_size for name in names]
  sums = {name: [size] for name, size in zip(names, sizes, strict=True)}
  for name, crc32 in _sums(folder, dict(zip(names, sizes, strict=True))):
    sums[name].append(crc32)
  with whole(folder / CHECKSUMS) as partial:
    partial.write_text(json.dumps(sums))


def verify(folder: Path, part: str = "") -> None:
  """Compares all files of the folder, or of the folder `part` in it, with their checksums.

  Raises:
    Damage: checksums.json is missing or damaged; or the first file that is missing, changed or not listed.
    UserError: this user may not read a file.
  """
  try:
    _verify(folder, part)
  except OSError as error:
    if error.errno in NOT_DAMAGE:
      raise
    name = os.path.relpath(error.filename, folder) if error.filename else "a file"
    if isinstance(error, PermissionError):
      raise UserError(f"{folder}: {name}: {error.strerror}; let this user read it") from error
    raise Damage(f"{name}: {error.strerror}") from error


def _verify(folder: Path, part: str) -> None:
  try:
    # Unlike `exists`, lstat raises different errors for a missing file and for an unreachable one.
    if not on_bucket(folder):
      os.lstat(folder / CHECKSUMS)
    elif not (folder / CHECKSUMS).exists():
      raise FileNotFoundError
    sums = read_state(folder / CHECKSUMS, SHAPE, remedy="")
  except FileNotFoundError as error:
    raise Damage(f"{CHECKSUMS} is missing") from error
  except UserError as error:
    if isinstance(error.__cause__, OSError):
      raise error.__cause__ from error
    raise Damage(str(error).removeprefix(f"{folder}/")) from error
  wanted = {name: of for name, of in sums.items() if not part or name.startswith(part + "/")}
  if on_bucket(folder):
    return _compare(wanted, _objects(folder, part), part)
  for name in sorted(set(_files(folder, part)) - wanted.keys()):
    raise Damage(f"{name} is not one of its files")
  for name, (size, *crc32s) in wanted.items():
    if Path(name).is_absolute() or ".." in Path(name).parts:
      raise Damage(f"{CHECKSUMS} names {name}, outside it")
    if not (folder / name).is_file():
      raise Damage(f"{name} is missing")
    if (there := (folder / name).stat().st_size) != size:
      raise Damage(f"{name} has {there} bytes and was written with {size}")
    if len(crc32s) != _pieces(size):
      raise Damage(f"{CHECKSUMS} has {len(crc32s)} checksums of {name}, not {_pieces(size)}")
  if not wanted:
    raise Damage(f"{CHECKSUMS} names no file{f' of {part}' if part else ''}")
  expected = ((name, crc32) for name, (_, *crc32s) in wanted.items() for crc32 in crc32s)
  found = _sums(folder, {name: size for name, (size, *_) in wanted.items()})
  for (name, crc32), (_, now) in zip(expected, found, strict=True):
    if now != crc32:
      raise Damage(f"{name} has changed since it was written")


def _compare(wanted: dict[str, list[int]], found: dict[str, list[int]], part: str) -> None:
  """Raises Damage if the objects are not those that were written."""
  for name in sorted(found.keys() - wanted.keys()):
    raise Damage(f"{name} is not one of its files")
  if not wanted:
    raise Damage(f"{CHECKSUMS} names no file{f' of {part}' if part else ''}")
  for name, of in wanted.items():
    if name not in found:
      raise Damage(f"{name} is missing")
    if found[name] != of:
      raise Damage(f"{name} has changed since it was written")


def _objects(folder, part: str = "") -> dict[str, list[int]]:
  """Name relative to `folder` -> [bytes, crc32c], of all objects in it or in its part that checksums are of."""
  import fsspec  # Only a run in a bucket needs it.

  files = fsspec.filesystem("gcs")
  files.invalidate_cache()
  prefix = str(folder).removeprefix("gs://") + "/"
  listed = files.find(prefix + part, detail=True)
  names = {path.removeprefix("gs://").removeprefix(prefix): of for path, of in listed.items()}
  return {
    name: [of["size"], int.from_bytes(base64.b64decode(of["crc32c"]), "big")]
    for name, of in sorted(names.items())
    if name not in (CHECKSUMS, *LATER)
  }


def _files(folder: Path, part: str = "") -> Iterator[str]:
  """Names, relative to `folder`, of all files and links in it or in its part, except checksums.json."""
  for place, folders, files in os.walk(folder / part, onerror=_raise):
    links = [name for name in folders if os.path.islink(os.path.join(place, name))]
    for name in (*files, *links):
      relative = os.path.relpath(os.path.join(place, name), folder)
      if relative != CHECKSUMS:
        yield relative


def _raise(error: OSError) -> None:
  raise error


def _pieces(size: int) -> int:
  return max(1, -(-size // PIECE_BYTES))


def _sums(folder: Path, sizes: dict[str, int]) -> Iterator[tuple[str, int]]:
  """(file, crc32) for each piece of PIECE_BYTES of each file, in order."""
  places = [(name, i * PIECE_BYTES) for name, size in sizes.items() for i in range(_pieces(size))]
  with ThreadPoolExecutor(THREADS) as pool:
    of = pool.map(lambda place: _crc32(folder / place[0], place[1]), places)
    yield from zip((name for name, _ in places), of, strict=True)


def _crc32(file: Path, start: int) -> int:
  value, left = 0, PIECE_BYTES
  try:
    with file.open("rb", buffering=0) as source:
      source.seek(start)
      while left and (block := source.read(min(BLOCK_BYTES, left))):
        value, left = zlib.crc32(block, value), left - len(block)
  except OSError as error:  # An error of read() has no file name; this adds it.
    raise OSError(error.errno, error.strerror, str(file)) from error
  return value
