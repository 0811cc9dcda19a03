"""A checkpoint's arrays on disk: created without data, then written and read in pieces."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

PIECE_BYTES = 64 << 20  # Upper bound of a chunk's size, and so of the memory of one read or write.
ZARR_NAMES = {np.dtype(np.float32): "<f4", np.dtype(ml_dtypes.bfloat16): "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The storage format of an array: uncompressed chunks of equal shape; those at the end are padded."""

  shape: tuple[int, ...]
  dtype: np.dtype
  chunks: tuple[int, ...]
  order: str  # Order of the numbers in a chunk: "C", or "F" for all dimensions reversed.

  @property
  def chunk_bytes(self) -> int:
    return math.prod(self.chunks) * self.dtype.itemsize


def rows_within(rows: int, row_bytes: int) -> int:
  """Rows of a chunk of at most PIECE_BYTES: the largest divisor of `rows`, or the most rows if it is small."""
  most = max(1, min(rows, PIECE_BYTES // max(row_bytes, 1)))
  divisor = next(n for n in range(most, 0, -1) if rows % n == 0)
  return divisor if 2 * divisor > most else most  # A prime `rows` has no divisor but 1: a chunk for every row.


class _Empty(ocp.type_handlers.TypeHandler):
  """Lets Orbax save a Layout: it writes the metadata of an array and no chunks."""

  def typestr(self) -> str:
    return "np.ndarray"

  async def serialize(self, values: Sequence[Layout], infos, args=None):
    del args
    for layout, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      await ts.open(
        {
          "driver": "zarr",
          "kvstore": {"driver": "file", "path": f"{info.path}/"},
          "metadata": {
            "shape": layout.shape, "chunks": layout.chunks, "order": layout.order,
            "dtype": ZARR_NAMES[layout.dtype], "compressor": None, "fill_value": None,
          },
        },
        create=True,
      )  # fmt: skip
    return []

  async def metadata(self, infos):
    raise NotImplementedError

  async def deserialize(self, infos, args=None):
    raise NotImplementedError


def create(directory: Path, layouts: dict[str, Layout]) -> None:
  """Creates an Orbax checkpoint of parameters whose arrays have no data yet.

  Args:
    directory: must not exist.
    layouts: parameter path, such as "units_0/blocks_1/norm/weight" -> Layout.
  """
  tree: dict = {}
  for name, layout in layouts.items():
    *parents, leaf = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = layout
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry((Layout, _Empty())),
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(tree))


def chunk_file(directory: Path, name: str, place: tuple[int, ...]) -> Path:
  """The file of a chunk of an array from `create`; `place` is the chunk's index in each dimension."""
  return directory / name.replace("/", ".") / ".".join(map(str, place))


def stored_layout(directory: Path, name: str) -> Layout | None:
  """The layout of an array if its chunks are files of uncompressed fp32 or bf16 numbers, else None."""
  file = directory / name.replace("/", ".") / ".zarray"
  if not file.is_file():
    return None
  found = json.loads(file.read_text())
  dtypes = {zarr: dtype for dtype, zarr in ZARR_NAMES.items()}
  if found["compressor"] or found["filters"] or found["dtype"] not in dtypes:
    return None
  return Layout(tuple(found["shape"]), dtypes[found["dtype"]], tuple(found["chunks"]), found["order"])


def open_array(directory: Path, name: str) -> ts.TensorStore:
  """Opens an array of one of our checkpoints to read slices of it; the chunk cache holds at most 1 GiB."""
  directory, key = directory.resolve(), name.replace("/", ".")
  if (directory / "manifest.ocdbt").exists():
    kvstore = {"driver": "ocdbt", "base": f"file://{directory}/", "path": f"{key}/"}
  else:
    kvstore = {"driver": "file", "path": f"{directory / key}/"}
  zarr3 = json.loads((directory / "_METADATA").read_text()).get("use_zarr3")
  spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
  return ts.open(spec, open=True, read=True, context=_CONTEXT).result()


_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 30}})
