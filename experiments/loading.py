"""What a --checkpoint names, ours or a Hugging Face folder: its model, its tokenizer, its parameters."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from experiments.config_file import shown_path
from nemocascade import checkpoint as checkpoint_lib
from nemocascade.config import ModelConfig
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.errors import UserError
from nemocascade.model import hf
from nemocascade.types import Params

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint whose files are there and agree with each other; its weights are not read yet."""

  config: ModelConfig
  tokenizer: object | None  # None where the folder has none.
  files: Path  # Where its model and tokenizer stand.
  load: Callable[[Params], Params]  # Template (shapes, dtypes, shardings) -> parameters.
  check: Callable[[Params], None]  # Raises UserError where its arrays are not of the template's shapes.


def find(checkpoint: str, field: str = "--checkpoint") -> Found:
  """Opens `hf:DIR`, or a checkpoint directory of ours; errors name the flag or field that names it.

  Raises:
    UserError: there is none, or its config, tensors and tokenizer do not agree.
  """
  if checkpoint.startswith(hf.PREFIX):
    path = Path(checkpoint.removeprefix(hf.PREFIX))
    source = hf.open_source(path)
    return Found(
      source.config, tokenizer_of(path, source.config), path,
      load=lambda template: hf.load_params(source, template),
      check=lambda template: hf.check_shapes(source, template),
    )  # fmt: skip
  files = model_files(checkpoint, field)
  config = read_config(files)
  return Found(
    config, tokenizer_of(files, config), files,
    load=lambda template: checkpoint_lib.load_params(checkpoint, template),
    check=lambda template: checkpoint_lib.check_params(checkpoint, template),
  )  # fmt: skip


def is_checkpoint(name: str) -> bool:
  """Whether the name is of something to load, and not of a stage."""
  return name.startswith(hf.PREFIX) or (Path(name) / "params").is_dir()


def load(checkpoint: str, template: Params) -> Params:
  """The parameters of `hf:DIR` or of a checkpoint of ours, for a model that is known already."""
  if checkpoint.startswith(hf.PREFIX):
    return hf.load_params(hf.open_source(checkpoint.removeprefix(hf.PREFIX)), template)
  return checkpoint_lib.load_params(checkpoint, template)


def model_files(checkpoint: str, field: str) -> Path:
  """The folder `model` of a checkpoint: inside one that was converted, beside a stage's."""
  path = Path(checkpoint).resolve()
  for files in (path / "model", path.parent.parent / "model"):
    if checkpoint and (path / "params").is_dir() and (files / "config.json").exists():
      return files
  raise UserError(
    f"{field}={shown_path(checkpoint)!r}: not a checkpoint of ours; give STAGE/checkpoints/STEP of a work"
    " directory, a converted one, or hf:DIR"
  )


def read_config(files: Path) -> ModelConfig:
  return ModelConfig.from_fields(json.loads((files / "config.json").read_text()))


def tokenizer_of(files: Path, config: ModelConfig):
  """The tokenizer of a folder, or None; its ids must be rows of the model's embedding."""
  if not any((files / name).exists() for name in TOKENIZER_FILES):
    return None
  tokenizer = load_tokenizer(files)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"{files}: the tokenizer has {tokenizer.vocab_size} tokens, more than the {config.vocab_size} rows of"
      " the embedding (vocab_size of config.json)"
    )
  return tokenizer
