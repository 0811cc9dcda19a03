"""Loads a Hugging Face folder: reads its config, checks its tensors, places the parameters on a mesh."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, first_of
from nemocascade.model.hybrid import init_params
from nemocascade.store.hf_config import model_config
from nemocascade.store.hf_layout import Named, Place, Tree, layout, tree_of, usual
from nemocascade.store.tensor_files import Folder, finite
from nemocascade.types import Params

PREFIX = "hf:"
CONFIG = "config.json"
HEAD = "lm_head.weight"
IGNORED = "mtp."  # Multi-token prediction heads; transformers ignores them too.


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder whose tensors have exactly the names and shapes that `config` requires."""

  path: Path
  fields: dict[str, Any]  # The contents of config.json.
  config: ModelConfig
  tree: Tree
  folder: Folder
  names: dict[str, str]  # Usual name (see hf_layout.usual) -> name in the folder.
  layout: dict[str, Named]  # By usual name; only tensors that are in the folder.

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The tensor with this usual name, or its part at `index`."""
    return self.folder.read(self.names[name], index)


def read_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
  """(fields of config.json, ModelConfig) of a folder.

  Raises:
    UserError: config.json cannot be read, is not a JSON object, or describes an unsupported model.
  """
  try:
    fields = json.loads((path / CONFIG).read_text())
  except OSError as error:
    raise UserError(f"hf:{path}: {CONFIG}: {error.strerror or error}") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"hf:{path}: {CONFIG} is not JSON ({error})") from error
  if not isinstance(fields, dict):
    raise UserError(f"hf:{path}: {CONFIG} is {str(fields):.40}, must be an object")
  return fields, model_config(fields, f"hf:{path}: {CONFIG}")


def open_source(path: str | Path) -> Source:
  """Checks a folder by its config and its files' headers; reads no weights (except in `_tied`).

  Raises:
    UserError: names every file and tensor that is missing, unexpected or of the wrong shape.
  """
  path = Path(path).resolve()
  fields, config = read_config(path)
  folder = Folder(path)
  names = {usual(name): name for name in folder.tensors if not name.startswith(IGNORED)}
  if left_out := len(folder.tensors) - len(names):
    print(f"hf:{path}: {left_out} tensors of multi-token prediction are left out", file=sys.stderr)
  tree = tree_of(names)
  config = dataclasses.replace(config, tie_word_embeddings=_tied(folder, names, config, tree))
  expected = layout(config, tree)
  if config.tie_word_embeddings and HEAD not in names:
    del expected[HEAD]

  wrong = [f"{name} is missing" for name in expected if name not in names]
  for name, own in names.items():
    t = folder.tensors[own]
    if name not in expected:
      wrong.append(f"{t.file.name}: {own} is not a tensor of this model")
    elif t.shape != expected[name].shape:
      wrong.append(f"{t.file.name}: {own} has shape {t.shape}, must have {expected[name].shape}")
  if wrong:
    raise UserError(f"hf:{path}: {'; '.join(wrong)}")
  return Source(path, fields, config, tree, folder, names, expected)


def _tied(folder: Folder, names: dict[str, str], config: ModelConfig, tree: Tree) -> bool:
  """Whether the head is the embedding: the config says so, and a head in the folder equals the embedding.

  transformers uses the head that is in the folder. So does this loader: if that head differs from the
  embedding, it prints a warning and returns False.
  """
  embedding = names.get(f"{tree.prefix}.embeddings.weight")
  if not config.tie_word_embeddings or HEAD not in names or embedding is None:
    return config.tie_word_embeddings
  one, other = folder.tensors[embedding], folder.tensors[names[HEAD]]
  same = (one.dtype, one.shape) == (other.dtype, other.shape) and all(
    np.array_equal(a.view(np.uint8), b.view(np.uint8))
    for a, b in zip(
      folder.stretch(embedding, 0, one.nbytes).blocks(),
      folder.stretch(names[HEAD], 0, other.nbytes).blocks(),
      strict=True,
    )
  )
  if not same:
    print(
      f"hf:{folder.path}: {HEAD} is not the embedding, though tie_word_embeddings is true: kept apart", file=sys.stderr
    )
  return same


def load_params(source: Source, template: Params) -> Params:
  """Loads the parameters with the template's dtypes and shardings; each process reads only its own shards.

  Args:
    template: tree of shapes and dtypes; an array without a sharding goes to the first local device.

  Raises:
    UserError: the template is of another model, or tensors that were read hold NaN or infinity; names
      every such array or tensor.
  """
  check_shapes(source, template)
  by_leaf: dict[str, list[tuple[str, int, Place]]] = {}
  for named in source.layout.values():
    if named.name == HEAD and source.config.tie_word_embeddings:
      continue
    for part, place in enumerate(named.parts):
      by_leaf.setdefault(place.leaf, []).append((named.name, part, place))
  broken: set[str] = set()
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def load(path, leaf):
    pieces = by_leaf[jax.tree_util.keystr(path, simple=True, separator="/")]
    sharding = leaf.sharding if leaf.sharding is not None else device
    shard = lambda index: _shard(source, pieces, leaf, index, broken)
    return jax.make_array_from_callback(leaf.shape, sharding, shard)

  params = jax.tree_util.tree_map_with_path(load, template)
  if broken:
    raise UserError(f"hf:{source.path}: NaN or infinity in {'; '.join(sorted(broken))}")
  return params


def check_shapes(source: Source, template: Params) -> None:
  """Raises UserError if the template is of another model; names the first array whose shape differs."""
  there = jax.eval_shape(functools.partial(init_params, source.config), jax.random.key(0))
  there, here = (
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (there, template)
  )
  different = [
    f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if different:
    raise UserError(f"hf:{source.path} is of another model: {first_of(different)}")


def _shard(source: Source, pieces, leaf, index: tuple[slice, ...], broken: set[str]) -> np.ndarray:
  """leaf[index], assembled from its tensors; adds the tensors that hold NaN or infinity to `broken`."""
  index = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
  out = np.empty([s.stop - s.start for s in index], leaf.dtype)
  for name, part, place in pieces:
    lead = len(place.index)
    if all(s.start <= i < s.stop for s, i in zip(index, place.index)):
      numbers = _part(source, name, part, place, index[lead:])
      if not finite(numbers):
        t = source.folder.tensors[source.names[name]]
        broken.add(f"{t.file.name}: {source.names[name]}")
      out[tuple(i - s.start for s, i in zip(index, place.index))] = numbers
  return out


def _part(source: Source, name: str, part: int, place: Place, want: tuple[slice, ...]) -> np.ndarray:
  """leaf[place.index][want], reading only the rows and columns that it needs.

  If our leaf splits a dimension of the tensor into several axes, reading is limited only along the
  slowest of them; the others are sliced after reading.
  """
  named = source.layout[name]
  shape = named.shape[1:] if len(named.parts) > 1 else named.shape
  per_split = [want[place.axes.index(axis)] for axis in range(len(place.split))]
  cuts, rest, axis = [], [], 0
  for n in shape:
    if n == 1 and (axis == len(place.split) or place.split[axis] != 1):
      cuts.append(slice(None))  # The middle dimension of the convolution's [C, 1, W], which our leaf drops.
      continue
    inner = place.split[axis]
    first, stop = axis, axis + 1
    while inner < n:
      inner, stop = inner * place.split[stop], stop + 1
    step = n // place.split[first]
    cuts.append(slice(per_split[first].start * step, per_split[first].stop * step))
    rest += [slice(None), *per_split[first + 1 : stop]]
    axis = stop
  if len(named.parts) > 1:
    cuts.insert(0, slice(part, part + 1))
  theirs = source.read(name, tuple(cuts))
  sizes = [per_split[i].stop - per_split[i].start if rest[i] == slice(None) else n for i, n in enumerate(place.split)]
  return theirs.reshape(sizes)[tuple(rest)].transpose(place.axes)
