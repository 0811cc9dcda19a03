"""Converts a Hugging Face folder to one of our checkpoints and back, in pieces: no tensor is in memory whole.

In this file "ours" is our checkpoint and "theirs" is the Hugging Face folder.
Large matrices are not transposed. Ours are [in, out] and theirs [out, in]. Our chunks use zarr's order "F",
which stores the dimensions reversed, so a chunk has the same bytes as the part of their tensor. Only
attention's four matrices are rearranged.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from nemocascade.config import ModelConfig
from nemocascade.data import chat_template
from nemocascade.data.tokenizer import TOKENIZERS
from nemocascade.errors import UserError
from nemocascade.model.hybrid import init_params
from nemocascade.state_files import check_shape, own_name, parsed, read_state, read_text
from nemocascade.store import arrays, checksums
from nemocascade.store.arrays import Layout
from nemocascade.store.checkpoint import check
from nemocascade.store.hf import CONFIG, HEAD, Source
from nemocascade.store.hf_config import config_fields
from nemocascade.store.hf_layout import Named, Place, Tree, layout
from nemocascade.store.tensor_files import DTYPES, Stretch, finite, write_all, write_shards

# Files in a checkpoint's `model` folder, next to config.json and the tokenizer: their config.json, and the
# record that `to_hf` needs to write the folder back.
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
# Token ids of the family's generation_config.json (Hugging Face: nvidia/Nemotron-Cascade-2-30B-A3B).
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
TOKENIZER = {
  "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>",
  "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def from_hf(source: Source, target: Path) -> None:
  """Writes a Hugging Face folder as a checkpoint: `target/params` and `target/model`; dtypes are kept.

  Raises:
    UserError: tensors hold NaN or infinity (all are named); then nothing is left at the target.
  """
  layouts = _layouts(source)
  # A second thread checks the numbers while the operating system copies.
  with _whole_or_nothing(target) as partial, ThreadPoolExecutor(1) as beside:
    arrays.create(partial / "params", layouts)
    checks: dict[str, list[Future[bool]]] = {}
    for named in source.layout.values():
      if named.name == HEAD and source.config.tie_word_embeddings:
        continue  # The head is the embedding.
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
  """The layout of each leaf: the widest dtype of its tensors; a chunk is one matrix or some rows of one."""
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
  rows = place.split[0]  # The rows of their matrix, which vary slowest in both byte orders.
  rows = arrays.rows_within(rows, dtype.itemsize * int(np.prod(place.split[1:])))
  if len(inner) > 1 and place.axes[0] != 0:
    return Layout(shape, dtype, (*ones, *inner[:-1], rows), "F")
  return Layout(shape, dtype, (*ones, rows, *inner[1:]), "C")


def _same_bytes(place: Place) -> bool:
  """Whether their matrix has the bytes of ours, in C or in F order."""
  n = len(place.axes)
  return place.axes in (tuple(range(n)), tuple(reversed(range(n))))


def _chunks(place: Place, layout: Layout) -> Iterator[tuple[tuple[int, ...], int, int]]:
  """The chunks of one matrix in their order: (chunk index, its first number in theirs, how many numbers)."""
  inner = [0] * len(place.axes)
  axis = len(inner) - 1 if layout.order == "F" else 0
  chunk, total = int(np.prod(layout.chunks)), int(np.prod(place.shape))
  for i in range(-(-total // chunk)):
    inner[axis] = i
    yield (*place.index, *inner), i * chunk, min(chunk, total - i * chunk)


def _broken(checks: dict[str, list[Future[bool]]]) -> list[str]:
  """Names of the tensors that have a part with NaN or infinity."""
  return [name for name, parts in checks.items() if not all([part.result() for part in parts])]


def _write_part(
  source: Source, own: str, part: int, place: Place, layout: Layout, params: Path, beside: ThreadPoolExecutor
) -> list[Future[bool]]:
  """Writes one of their matrices to its chunks; returns a future for each chunk: whether it is finite."""
  dtype, checks = DTYPES[source.folder.tensors[own].dtype], []
  first = part * int(np.prod(place.split))  # Index in the tensor of this part's first number.
  for where, start, count in _chunks(place, layout):
    stretch = source.folder.stretch(own, (first + start) * dtype.itemsize, count * dtype.itemsize)
    checks.append(beside.submit(stretch.finite))
    with arrays.chunk_file(params, place.leaf, where).open("wb", buffering=0) as file:
      for piece in _as_ours(stretch, place, layout):
        write_all(file, piece)
      if count < int(np.prod(layout.chunks)):
        file.truncate(layout.chunk_bytes)  # Pads the last chunk with zeros.
  return checks


def _as_ours(stretch: Stretch, place: Place, layout: Layout) -> Iterator[np.ndarray | Stretch]:
  """A chunk's numbers in the order and dtype of our file."""
  if not _same_bytes(place):
    numbers = np.concatenate([block.copy() for block in stretch.blocks()])
    yield place.ours(numbers).astype(layout.dtype)
  elif stretch.dtype != layout.dtype:
    yield from (block.astype(layout.dtype) for block in stretch.blocks())
  else:
    yield stretch


def _write_model_files(source: Source, layouts: dict[str, Layout], model: Path) -> None:
  """Writes our config, their config, the folder's other files without weights, and the record for `to_hf`."""
  model.mkdir()
  for file in sorted(source.path.iterdir()):
    if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHTS):
      shutil.copyfile(file, model / (THEIR_CONFIG if file.name == CONFIG else file.name))
  _write_json(model / CONFIG, dataclasses.asdict(source.config))
  stored = {name: source.folder.tensors[own].dtype for name, own in source.names.items()}
  widened = {
    name: dtype for name, dtype in stored.items() if DTYPES[dtype] != layouts[source.layout[name].parts[0].leaf].dtype
  }
  _write_json(model / RECORD, {"tree": dataclasses.asdict(source.tree), "dtypes": widened})


def to_hf(checkpoint: Path, model: Path, config: ModelConfig, target: Path) -> None:
  """Writes one of our checkpoints as a folder that transformers can load.

  Args:
    checkpoint: the folder that holds `params`.
    model: the folder with our config.json, the tokenizer and, after `from_hf`, their other files.
    config: the model's config.
    target: the folder to write.

  Raises:
    UserError: tensors hold NaN or infinity (all are named), or the checkpoint is damaged; then nothing is left
      at the target.
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
  """One of their tensors in pieces, in C order; read directly from chunk files if the bytes are the same."""
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
  if fields == original:  # Nothing has changed, so the file's own text is kept.
    (target / CONFIG).write_text(text)
  else:
    _write_json(target / CONFIG, fields)
  for file in sorted(model.iterdir()):
    if file.is_file() and file.name not in OURS:
      shutil.copyfile(file, target / file.name)
  if not (target / "generation_config.json").exists():
    _write_json(target / "generation_config.json", GENERATION)
  _write_template(target)


def _write_template(target: Path) -> None:
  """Adds the chat template, and the words that transformers needs of a tokenizer, where the folder lacks them."""
  words = target / "tokenizer_config.json"
  if any((target / kind.file_name).exists() for kind in TOKENIZERS) and not words.exists():
    _write_json(words, TOKENIZER)
  own = words.exists() and "chat_template" in parsed(read_text(words, remedy=AGAIN), words, remedy=AGAIN)
  if not own and not (target / chat_template.FILE).exists():
    (target / chat_template.FILE).write_text(chat_template.jinja())


def _write_json(path: Path, value) -> None:
  """Writes JSON without fsync, which would wait for all the weights; the folder is renamed once complete."""
  path.write_text(json.dumps(value, indent=1) + "\n")


class _whole_or_nothing:
  """Context manager: a temporary path next to the target, renamed to it at the end or removed on an error."""

  def __init__(self, target: Path):
    self.target = target
    self.partial = target.with_name(f".{target.name}.{own_name()}.partial")

  def __enter__(self) -> Path:
    self.target.parent.mkdir(parents=True, exist_ok=True)
    return self.partial

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self.partial.rename(self.target)
    else:
      shutil.rmtree(self.partial, ignore_errors=True)
