"""A run that starts from a checkpoint has the checkpoint's model, and the tokenizer of a Hugging Face folder."""

import dataclasses

from ml_collections import ConfigDict

from nemocascade.config import SET_BY_PROGRAMS, ModelConfig
from nemocascade.runtime import loading
from nemocascade.state_files import place
from nemocascade.store import hf

# How a run computes rather than what it computes: these fields stay those of the config.
HOW = ("dtype", "param_dtype", "remat", "chunk_size", "sequence_parallel", "sampling_weights", *SET_BY_PROGRAMS)


def take_model(c: ConfigDict) -> None:
  """Gives `c` the model of the checkpoint that its first stage starts from, so that nobody copies its fields.

  The fields of `model` but HOW become the checkpoint's. `tokenizer.path` becomes its folder if it has a
  tokenizer, unless a single stage has the path "": that stage takes the tokenizer of its start anyway. Without
  such a checkpoint, or if it isn't there, nothing changes.

  Raises:
    UserError: the checkpoint is there, and its files don't fit together.
  """
  begin = next((name for name in _starts(c) if _is_there(name)), None)
  if begin is None:
    return
  found = loading.find(begin, "init_from")
  fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)} | c.model.to_dict()
  with c.unlocked(), c.ignore_type():
    for name, value in dataclasses.asdict(found.config).items():
      if name not in HOW and _plain(fields[name]) != _plain(value):
        c.model[name] = value
    if found.tokenizer is not None and (c.tokenizer.path or "stages" in c):
      c.tokenizer.path = str(found.files)


def _starts(c: ConfigDict) -> list[str]:
  """What the stages of a config start from, in their order; names that are no stages are refused later."""
  return [c.stages[name].init_from for name in c.order if name in c.stages] if "stages" in c else [c.init_from]


def _is_there(name: str) -> bool:
  return loading.is_checkpoint(name) and place(name.removeprefix(hf.PREFIX)).is_dir()


def _plain(value):
  return list(value) if isinstance(value, tuple | list) else value
