"""A Hugging Face folder to a checkpoint of ours and back, streamed: no tensor is held whole.

Big matrices need no transposing. A chunk of our arrays holds its numbers in the reverse order of
the array's dimensions (zarr's order "F"), which for ours [in, out] is the order of theirs [out, in]:
the bytes of a chunk are the bytes of their tensor. Only attention's four matrices are rearranged.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from nemocascade import arrays, checksums
from nemocascade.arrays import Layout
from nemocascade.checkpoint import check
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model.hf import CONFIG, HEAD, Source
from nemocascade.model.hf_config import config_fields
from nemocascade.model.hf_layout import Named, Place, Tree, layout
from nemocascade.model.hybrid import init_params
from nemocascade.model.tensor_files import DTYPES, Stretch, finite, write_all, write_shards
from nemocascade.state_files import check_shape, parsed, read_state, read_text

# In a checkpoint's `model` folder, beside config.json and the tokenizer.
THEIR_CONFIG, RECORD = "hf_config.json", "hf.json"
OURS = (CONFIG, THEIR_CONFIG, RECORD, checksums.CHECKSUMS)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
AGAIN = "convert the folder again"
RECORD_SHAPE = {
  "type": "object",
  "required": ["tree", "dtypes"],
  "properties": {
    "tree": {
      "type": "object",
      "properties": {"prefix": {"enum": ["backbone", "model"]}, "stacked": {"type": "boolean"}},
      "additionalProperties": False,
    },
    "dtypes": {"type": "object", "additionalProperties": {"enum": list(DTYPES)}},
  },
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}  # paper.md 1.2
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def from_hf(source: Source, target: Path) -> None:
  """Writes `target/params` and `target/model`; numbers keep the width that the folder gives them.

  Raises:
    UserError: naming every tensor that holds NaN or infinity; nothing is left at the target.
  """
  layouts = _layouts(source)
  # Numbers are looked at beside the copying, which is the system's.
  with _whole_or_nothing(target) as partial, ThreadPoolExecutor(1) as beside:
    arrays.create(partial / "params", layouts)
    checks: dict[str, list[Future[bool]]] = {}
    for named in source.layout.values():
      if named.name == HEAD and source.config.tie_word_embeddings:
        continue  # The embedding again.
      own = source.names[named.name]
      for part, place in enumerate(named.parts):
        parts = _write_part(source, own, part, place, layouts[place.leaf], partial / "params", beside)
        checks.setdefault(own, []).extend(parts)
    if broken := _broken(checks):
      said = (f"{source.folder.tensors[own].file.name}: {own}" for own in broken)
      raise UserError(f"hf:{source.path}: NaN or infinity in {'; '.join(said)}")
    _write_model_files(source, layouts, partial / "model")
    checksums.write(partial)


def _layouts(source: Source) -> dict[str, Layout]:
  """Of each leaf: wide enough for all its tensors, in chunks of one matrix or of some rows of one."""
  template = jax.eval_shape(functools.partial(init_params, source.config), jax.random.key(0))
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(template)
  }
  found: dict[str, Layout] = {}
  for named in source.layout.values():
    dtype = DTYPES[source.folder.tensors[source.names[named.name]].dtype]
    for place in named.parts:
      if place.leaf in found:
        dtype = max(dtype, found[place.leaf].dtype, key=lambda d: d.itemsize)
      found[place.leaf] = _layout(shapes[place.leaf], place, dtype)
  return found


def _layout(shape: tuple[int, ...], place: Place, dtype: np.dtype) -> Layout:
  inner, ones = place.shape, (1,) * len(place.index)
  if not _same_bytes(place):
    return Layout(shape, dtype, (*ones, *inner), "C")
  rows = place.split[0]  # Of theirs: the slowest axis of both.
  rows = arrays.rows_within(rows, dtype.itemsize * int(np.prod(place.split[1:])))
  if len(inner) > 1 and place.axes[0] != 0:
    return Layout(shape, dtype, (*ones, *inner[:-1], rows), "F")
  return Layout(shape, dtype, (*ones, rows, *inner[1:]), "C")


def _same_bytes(place: Place) -> bool:
  """Whether theirs is ours in C or in F order."""
  n = len(place.axes)
  return place.axes in (tuple(range(n)), tuple(reversed(range(n))))


def _chunks(place: Place, layout: Layout) -> Iterator[tuple[tuple[int, ...], int, int]]:
  """(place of the chunk, its first number among theirs, how many) of one matrix, in their order."""
  inner = [0] * len(place.axes)
  axis = len(inner) - 1 if layout.order == "F" else 0
  chunk, total = int(np.prod(layout.chunks)), int(np.prod(place.shape))
  for i in range(-(-total // chunk)):
    inner[axis] = i
    yield (*place.index, *inner), i * chunk, min(chunk, total - i * chunk)


def _broken(checks: dict[str, list[Future[bool]]]) -> list[str]:
  """The tensors of which a part is not finite."""
  return [name for name, parts in checks.items() if not all([part.result() for part in parts])]


def _write_part(
  source: Source, own: str, part: int, place: Place, layout: Layout, params: Path, beside: ThreadPoolExecutor
) -> list[Future[bool]]:
  """One matrix of theirs to its chunks; whether the numbers of each are finite is known later."""
  dtype, checks = DTYPES[source.folder.tensors[own].dtype], []
  first = part * int(np.prod(place.split))  # Of this part's numbers in the tensor.
  for where, start, count in _chunks(place, layout):
    stretch = source.folder.stretch(own, (first + start) * dtype.itemsize, count * dtype.itemsize)
    checks.append(beside.submit(stretch.finite))
    with arrays.chunk_file(params, place.leaf, where).open("wb", buffering=0) as file:
      for piece in _as_ours(stretch, place, layout):
        write_all(file, piece)
      if count < int(np.prod(layout.chunks)):
        file.truncate(layout.chunk_bytes)  # The last chunk is filled up with zeros.
  return checks


def _as_ours(stretch: Stretch, place: Place, layout: Layout) -> Iterator[np.ndarray | Stretch]:
  """A chunk's numbers as they lie on disk."""
  if not _same_bytes(place):
    numbers = np.concatenate([block.copy() for block in stretch.blocks()])
    yield place.ours(numbers).astype(layout.dtype)
  elif stretch.dtype != layout.dtype:
    yield from (block.astype(layout.dtype) for block in stretch.blocks())
  else:
    yield stretch


def _write_model_files(source: Source, layouts: dict[str, Layout], model: Path) -> None:
  """Our config, their config, what else the folder holds, and what is needed to write it back."""
  model.mkdir()
  for file in sorted(source.path.iterdir()):
    if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHTS):
      shutil.copyfile(file, model / (THEIR_CONFIG if file.name == CONFIG else file.name))
  _write_json(model / CONFIG, dataclasses.asdict(source.config))
  stored = {name: source.folder.tensors[own].dtype for name, own in source.names.items()}
  widened = {
    name: dtype
    for name, dtype in stored.items()
    if DTYPES[dtype] != layouts[source.layout[name].parts[0].leaf].dtype
  }
  _write_json(model / RECORD, {"tree": dataclasses.asdict(source.tree), "dtypes": widened})


def to_hf(checkpoint: Path, model: Path, config: ModelConfig, target: Path) -> None:
  """Writes a checkpoint of ours as a folder that transformers loads.

  Args:
    checkpoint: holds `params`.
    model: the folder with our config.json, the tokenizer and, of a converted model, its own files.
  Raises:
    UserError: naming every tensor that holds NaN or infinity; nothing is left at the target.
  """
  params = checkpoint / "params"
  check(checkpoint, "params")
  record = {"tree": dataclasses.asdict(Tree()), "dtypes": {}}
  if (model / RECORD).exists():
    record = read_state(model / RECORD, RECORD_SHAPE, remedy=AGAIN)
  tensors = layout(config, Tree(**record["tree"]))
  opened = functools.lru_cache(lambda leaf: arrays.open_array(params, leaf))
  dtype_of = lambda named: record["dtypes"].get(
    named.name, DTYPE_NAMES[np.dtype(opened(named.parts[0].leaf).dtype.numpy_dtype)]
  )
  specs = {named.name: (dtype_of(named), named.shape) for named in tensors.values()}
  checks: dict[str, list[Future[bool]]] = {name: [] for name in specs}
  beside = ThreadPoolExecutor(1)

  def pieces(name: str) -> Iterator[np.ndarray | Stretch]:
    dtype = DTYPES[specs[name][0]]
    for piece in _pieces(params, tensors[name], opened):
      look = piece.finite if isinstance(piece, Stretch) else functools.partial(finite, piece)
      checks[name].append(beside.submit(look))
      if piece.dtype == dtype:
        yield piece
      else:
        yield from (b.astype(dtype) for b in (piece.blocks() if isinstance(piece, Stretch) else [piece]))

  with _whole_or_nothing(target) as partial, beside:
    partial.mkdir()
    write_shards(partial, specs, pieces)
    if broken := _broken(checks):
      raise UserError(f"checkpoint {checkpoint}: NaN or infinity in {'; '.join(broken)}")
    _write_their_files(model, config, partial)


def _pieces(params: Path, named: Named, opened) -> Iterator[np.ndarray | Stretch]:
  """A tensor of theirs in pieces, in C order: from plain files where the bytes are the same."""
  for place in named.parts:
    stored = arrays.stored_layout(params, place.leaf)
    if stored is not None and stored == _layout(stored.shape, place, stored.dtype) and _same_bytes(place):
      for where, _, count in _chunks(place, stored):
        file = arrays.chunk_file(params, place.leaf, where)
        yield Stretch(file, 0, count * stored.dtype.itemsize, stored.dtype)
      continue
    matrix = opened(place.leaf)[place.index] if place.index else opened(place.leaf)
    theirs = matrix.transpose(np.argsort(place.axes).tolist())
    rows, row_bytes = theirs.shape[0], matrix.dtype.numpy_dtype.itemsize * int(np.prod(theirs.shape[1:]))
    step = arrays.rows_within(rows, row_bytes)
    for start in range(0, rows, step):
      yield np.ascontiguousarray(theirs[start : min(start + step, rows)].read(order="C").result())


def _write_their_files(model: Path, config: ModelConfig, target: Path) -> None:
  original = None
  if (model / THEIR_CONFIG).exists():
    text = read_text(model / THEIR_CONFIG, remedy=AGAIN)
    original = parsed(text, model / THEIR_CONFIG, remedy=AGAIN)
    check_shape(original, {"type": "object"}, model / THEIR_CONFIG, remedy=AGAIN)
  fields = config_fields(config, original)
  if fields == original:  # Nothing to say anew: the file itself.
    (target / CONFIG).write_text(text)
  else:
    _write_json(target / CONFIG, fields)
  for file in sorted(model.iterdir()):
    if file.is_file() and file.name not in OURS:
      shutil.copyfile(file, target / file.name)
  if not (target / "generation_config.json").exists():
    _write_json(target / "generation_config.json", GENERATION)


def _write_json(path: Path, value) -> None:
  """In a folder that is renamed when it is whole: forcing one file to disk would wait for all."""
  path.write_text(json.dumps(value, indent=1) + "\n")


class _whole_or_nothing:
  """A path beside the target to write to, renamed to the target at the end, or removed on an error."""

  def __init__(self, target: Path):
    self.target = target
    self.partial = target.with_name(f".{target.name}.{os.getpid()}.partial")

  def __enter__(self) -> Path:
    self.target.parent.mkdir(parents=True, exist_ok=True)
    return self.partial

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self.partial.rename(self.target)
    else:
      shutil.rmtree(self.partial, ignore_errors=True)
