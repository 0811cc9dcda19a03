"""A folder of safetensors files: checks all headers first, reads slices of tensors, writes shards.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes, little-endian, in C order.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from nemocascade.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5_000_000_000
BLOCK = 1 << 18  # Bytes per block of numbers; fits in the processor's cache.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where the bytes of a tensor are."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  start: int  # Offset of its first byte in the file.
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Stretch:
  """Bytes of a file to be written unchanged: the operating system copies them from file to file (sendfile)."""

  file: Path
  start: int
  nbytes: int
  dtype: np.dtype

  def blocks(self) -> Iterator[np.ndarray]:
    """Yields the numbers in blocks; each block overwrites the previous one.

    Raises:
      OSError: the file ends early.
    """
    left, buffer = self.nbytes, np.empty(min(BLOCK, self.nbytes) // self.dtype.itemsize, self.dtype)
    with self.file.open("rb", buffering=0) as source:
      source.seek(self.start)
      while left:
        block = buffer[: left // self.dtype.itemsize]
        got = source.readinto(block.view(np.uint8).data)
        if got != block.nbytes:
          raise OSError(f"{self.file} ended {left - (got or 0)} bytes early")
        yield block
        left -= block.nbytes

  def finite(self) -> bool:
    return all([finite(block) for block in self.blocks()])


class Folder:
  """The tensors of a folder, by name.

  Raises:
    UserError: names every file that is missing, damaged or different from the index.
  """

  def __init__(self, path: Path):
    self.path = path
    self.tensors: dict[str, Tensor] = {}
    wrong: list[str] = []
    files, promised = self._listing()
    for name in files:
      if not (path / name).is_file():
        told = [tensor for tensor, file in promised.items() if file == name]
        wrong.append(f"{name} is missing (the index has {', '.join(told)} in it)" if told else f"{name} is missing")
        continue
      try:
        found = read_header(path / name)
      except ValueError as error:
        wrong.append(f"{name} {error}")
        continue
      wrong += [
        f"{name}: {tensor} is in {self.tensors[tensor].file.name} too" for tensor in found if tensor in self.tensors
      ]
      wrong += [
        f"{name}: {tensor} is not in it, though the index says so"
        for tensor, file in promised.items()
        if file == name and tensor not in found
      ]
      wrong += [
        f"{name}: {tensor} is {t.dtype}, allowed: {', '.join(DTYPES)}"
        for tensor, t in found.items()
        if t.dtype not in DTYPES
      ]
      self.tensors |= found
    if wrong:
      raise UserError(f"hf:{path}: {'; '.join(wrong)}")

  def _listing(self) -> tuple[list[str], dict[str, str]]:
    """(names of the files, tensor -> file by the index; empty without an index)."""
    if (self.path / INDEX).is_file():
      try:
        promised = json.loads((self.path / INDEX).read_text())["weight_map"]
        return sorted(set(promised.values())), promised
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"hf:{self.path}: {INDEX} is not an index of tensors ({error!r})") from error
    if (self.path / SINGLE).is_file():
      return [SINGLE], {}
    raise UserError(f"hf:{self.path}: has neither {SINGLE} nor {INDEX}")

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A copy of a tensor, or of its part at `index`; reads only that part."""
    t = self.tensors[name]
    dtype = DTYPES[t.dtype]
    if not t.shape or not t.nbytes:
      return np.fromfile(t.file, dtype, t.nbytes // dtype.itemsize, offset=t.start).reshape(t.shape)
    mapped = np.memmap(t.file, np.dtype(f"u{dtype.itemsize}"), "r", t.start, t.shape)
    return np.array(mapped[index]).view(dtype)

  def stretch(self, name: str, start: int, nbytes: int) -> Stretch:
    """The `nbytes` bytes of a tensor that begin at its byte `start`."""
    t = self.tensors[name]
    return Stretch(t.file, t.start + start, nbytes, DTYPES[t.dtype])


def finite(block: np.ndarray) -> bool:
  """Whether all numbers are finite; makes two passes over their bits and no copy."""
  bits = block.reshape(-1)
  if not bits.size:
    return True
  half = block.dtype.itemsize == 2
  top = 0x7F80 if half else 0x7F800000  # The bits of +infinity; those of NaNs are larger.
  sign = 0x8000 if half else 0x80000000
  unsigned, signed = (np.uint16, np.int16) if half else (np.uint32, np.int32)
  return bool(bits.view(unsigned).max() < (sign | top) and bits.view(signed).max() < top)


def read_header(file: Path) -> dict[str, Tensor]:
  """The tensors of one file, by name.

  Raises:
    ValueError: the file is damaged; the message says how, without the file's name.
  """
  size = file.stat().st_size
  with file.open("rb") as source:
    length = int.from_bytes(source.read(8), "little")
    if size < 8 or length > size - 8:
      raise ValueError(f"is cut short: {size} bytes, too few for its header")
    try:
      header = json.loads(source.read(length))
      header.pop("__metadata__", None)
      tensors = {
        name: Tensor(
          file, t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0],
          t["data_offsets"][1] - t["data_offsets"][0],
        )
        for name, t in header.items()
      }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
      raise ValueError(f"is not a safetensors file ({error!r})") from error
  end = max((t.start + t.nbytes for t in tensors.values()), default=0)
  if end > size:
    raise ValueError(f"is cut short: {size} bytes of {end}")
  for name, t in tensors.items():
    if t.dtype in DTYPES and t.nbytes != DTYPES[t.dtype].itemsize * int(np.prod(t.shape)):
      raise ValueError(f"gives {name} {t.nbytes} bytes for shape {t.shape} of {t.dtype}")
  return tensors


def write_shards(
  path: Path,
  specs: dict[str, tuple[str, tuple[int, ...]]],
  blocks: Callable[[str], Iterable[np.ndarray | Stretch]],
  limit: int = SHARD_BYTES,
) -> None:
  """Writes tensors as one file, or as shards of at most `limit` bytes with an index.

  Args:
    specs: name -> (key of DTYPES, shape), in the order in which shards are filled.
    blocks: name -> the tensor's numbers in C order, in pieces of any size.

  Raises:
    ValueError: the pieces of a tensor have the wrong number of bytes.
  """
  nbytes = {n: DTYPES[dtype].itemsize * int(np.prod(shape)) for n, (dtype, shape) in specs.items()}
  shards: list[list[str]] = [[]]
  for name in specs:
    if shards[-1] and sum(nbytes[n] for n in shards[-1]) + nbytes[name] > limit:
      shards.append([])
    shards[-1].append(name)
  files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
  for file, names in zip(files if len(shards) > 1 else [SINGLE], shards, strict=True):
    _write_file(path / file, {name: specs[name] for name in names}, nbytes, blocks)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(nbytes.values())},
      "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, specs, nbytes, blocks) -> None:
  # Wider dtypes first, so that each tensor starts at a multiple of its item size.
  names = sorted(specs, key=lambda name: -DTYPES[specs[name][0]].itemsize)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  at = 0
  for name in names:
    dtype, shape = specs[name]
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes[name]]}
    at += nbytes[name]
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with file.open("wb", buffering=0) as target:
    target.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      written = 0
      for block in blocks(name):
        written += write_all(target, block)
      if written != nbytes[name]:
        raise ValueError(f"{name}: {written} bytes written of {nbytes[name]}")


def write_all(target: BinaryIO, piece: np.ndarray | Stretch) -> int:
  """Writes all bytes of a piece, in C order, to an unbuffered file; returns their number.

  Raises:
    OSError: the file of a Stretch ends early.
  """
  if isinstance(piece, Stretch):
    with piece.file.open("rb", buffering=0) as source:
      at, end = piece.start, piece.start + piece.nbytes
      while at < end:
        sent = os.sendfile(target.fileno(), source.fileno(), at, end - at)
        if not sent:
          raise OSError(f"{piece.file} ended {end - at} bytes early")
        at += sent
  else:
    left = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    while left:
      left = left[target.write(left) :]
  return piece.nbytes
