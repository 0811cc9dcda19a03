"""Opens a checkpoint, ours or a Hugging Face folder: its model config, tokenizer and parameters."""

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from nemocascade.config import ModelConfig
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.errors import UserError
from nemocascade.runtime.config_file import shown_path
from nemocascade.state_files import absolute, on_bucket, place, read_state, stands
from nemocascade.store import checkpoint as checkpoint_lib
from nemocascade.store import checksums, hf
from nemocascade.types import Params

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Found:
  """An opened checkpoint: its files exist and fit together. Its weights are not read yet."""

  config: ModelConfig
  tokenizer: object | None  # None if the folder has none.
  files: Path  # The folder of its model config and tokenizer.
  load: Callable[[Params], Params]  # Template (shapes, dtypes, shardings) -> parameters.
  check: Callable[[Params], None]  # Raises UserError if its arrays have other shapes than the template.


def find(checkpoint: str, field: str = "--checkpoint") -> Found:
  """Opens `hf:DIR` or a checkpoint directory of ours. `field` is its flag or config field, for errors.

  Raises:
    UserError: it does not exist, or its config, tensors and tokenizer do not fit together.
  """
  if checkpoint.startswith(hf.PREFIX):
    path = Path(checkpoint.removeprefix(hf.PREFIX))
    source = hf.open_source(path)
    return Found(
      source.config, tokenizer_of(path, source.config), path,
      load=lambda template: load(checkpoint, template),
      check=lambda template: hf.check_shapes(source, template),
    )  # fmt: skip
  files = model_files(checkpoint, field)
  config = read_config(files)
  return Found(
    config, tokenizer_of(files, config), files,
    load=lambda template: load(checkpoint, template),
    check=lambda template: checkpoint_lib.check_params(checkpoint, template),
  )  # fmt: skip


def is_checkpoint(name: str) -> bool:
  """Whether `name` is hf:DIR or a checkpoint directory, rather than the name of a stage."""
  return name.startswith(hf.PREFIX) or (place(name) / "params").is_dir()


def load(checkpoint: str, template: Params) -> Params:
  """Loads the parameters of `hf:DIR` or of a checkpoint of ours.

  Args:
    template: the shapes, dtypes and shardings of the result.

  Raises:
    UserError: it does not exist, is damaged, belongs to another model, or holds a value that is not finite.
  """
  if checkpoint.startswith(hf.PREFIX):
    params = hf.load_params(hf.open_source(checkpoint.removeprefix(hf.PREFIX)), template)
  else:
    params = checkpoint_lib.load_params(checkpoint, template)
  return finite(params, checkpoint)


def finite(tree, what: str):
  """Returns the tree unchanged. `what` names it in the error.

  Raises:
    UserError: an array holds a value that is not finite; the message names the first such array.
  """
  flags = jax.device_get(_finite(tree))
  for path, fine in jax.tree_util.tree_leaves_with_path(flags):
    if not fine:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise UserError(f"{what}: {name} holds values that are not finite; give another checkpoint")
  return tree


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda array: jnp.all(jnp.isfinite(array)), tree)


def model_files(checkpoint: str, field: str = "--checkpoint") -> Path:
  """The folder `model` of a checkpoint of ours, after a check of its files.

  It is inside the checkpoint. Those of earlier versions have it two levels above, in their stage.

  Raises:
    UserError: this is no checkpoint of ours, or its files are damaged.
  """
  path = absolute(checkpoint)
  for files in (path / "model", path.parent.parent / "model"):
    if checkpoint and (path / "params").is_dir() and stands(files / "config.json"):
      check_files(files)
      return files
  raise UserError(f"{field}={shown_path(checkpoint)!r}: {_no_checkpoint(checkpoint, path)}")


def _no_checkpoint(given: str, path: Path) -> str:
  """Why `given` is no checkpoint, and what to give instead."""
  allowed = "give STAGE/checkpoints/STEP of a work directory, a converted one, or hf:DIR"
  if not path.exists():
    return f"there is no such folder; {allowed}"
  if on_bucket(path):
    return f"not a checkpoint of ours; {allowed}"
  if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
    return f"not a checkpoint of ours; give hf:{given} for a Hugging Face folder"
  saved = [found.parent for depth in ("", "*/", "*/*/") for found in path.glob(f"{depth}[0-9]*/params")]
  if saved:
    latest = max(saved, key=lambda folder: (folder.stat().st_mtime_ns, len(folder.name), folder.name))
    return f"not a checkpoint of ours; it holds some, such as {Path(given) / latest.relative_to(path)}"
  return f"not a checkpoint of ours; {allowed}"


def check_files(files: Path) -> None:
  """Raises UserError if a file of a folder `model` does not have its checksum."""
  # A stage has the checksums in this folder, a converted checkpoint one level up.
  if (files / checksums.CHECKSUMS).exists():
    try:
      checksums.verify(files)
    except checksums.Damage as error:
      raise UserError(f"{files}/{error}; restore it, or give another checkpoint") from error
  elif (files.parent / checksums.CHECKSUMS).exists():
    checkpoint_lib.check(files.parent, files.name)


def read_config(files: Path) -> ModelConfig:
  fields = read_state(files / "config.json", SHAPE, remedy="give another checkpoint")
  return ModelConfig.from_fields(fields)


def _shape(kind) -> dict:
  """The JSON schema of a type annotation of ModelConfig."""
  if isinstance(kind, types.UnionType):
    return {"anyOf": [_shape(choice) for choice in typing.get_args(kind)]}
  if typing.get_origin(kind) is tuple:
    parts = typing.get_args(kind)
    bound = {"type": ["number", "infinite"]}  # The tuple is the limits of dt, of which the upper one may be infinite.
    return {"type": "array", "items": bound, "minItems": len(parts), "maxItems": len(parts)}
  names = {int: "integer", float: "number", bool: "boolean", str: "string", types.NoneType: "null"}
  return {"type": names[kind]}


SHAPE = {
  "type": "object",
  "properties": {name: _shape(kind) for name, kind in typing.get_type_hints(ModelConfig).items()},
}


def tokenizer_beside(checkpoint: str, field: str = "--checkpoint") -> Tokenizer | None:
  """The tokenizer of a checkpoint of ours or an `hf:DIR`; None if it has none."""
  files = _folder(checkpoint, field)
  return load_tokenizer(files) if has_tokenizer(files) else None


def same_tokenizer(name: str, checkpoint: str, tokenizer: Tokenizer | None, remedy: str = "") -> None:
  """Raises UserError if a checkpoint has another tokenizer than the run.

  Args:
    name: the field or flag that names the checkpoint.
    tokenizer: the run's; None if the run has yet to train it.
    remedy: the message's advice, instead of naming the checkpoint's tokenizer in the config.
  """
  other = tokenizer_beside(checkpoint, name)
  if other is None or (tokenizer is not None and other.fingerprint == tokenizer.fingerprint):
    return
  raise UserError(
    f"{name}={shown_path(checkpoint, 40)}: its tokenizer ({other.fingerprint[:12]}) is not this run's"
    f" ({tokenizer.fingerprint[:12] if tokenizer else 'yet to be trained'}):"
    f" {remedy or f'give --config.tokenizer.path={_folder(checkpoint)}'}"
  )


def _folder(checkpoint: str, field: str = "--checkpoint") -> Path:
  return (
    Path(checkpoint.removeprefix(hf.PREFIX)) if checkpoint.startswith(hf.PREFIX) else model_files(checkpoint, field)
  )


def tokenizer_of(files: Path, config: ModelConfig):
  """The tokenizer of a folder, or None. Raises UserError if it has more ids than the embedding has rows."""
  if not has_tokenizer(files):
    return None
  tokenizer = load_tokenizer(files)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"{files}: the tokenizer has {tokenizer.vocab_size} tokens, more than the {config.vocab_size} rows of"
      " the embedding (vocab_size of config.json)"
    )
  return tokenizer


def has_tokenizer(files: Path) -> bool:
  """Whether the folder has a tokenizer."""
  return any(stands(files / name) for name in TOKENIZER_FILES)
