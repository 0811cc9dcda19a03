"""Converts a Hugging Face folder to a checkpoint of ours, and back.

  python -m experiments.convert --source=hf:DIR --target=CKPT
  python -m experiments.convert --source=CKPT --target=hf:DIR

Tensors are streamed, so memory does not grow with the model. Every tensor keeps its values and dtype.
config.json, the generation config and the tokenizer are copied too; a folder without a chat template gets ours
(chat_template.jinja). The target must not exist, or be an empty folder.
"""

import functools
import time
from pathlib import Path

from nemocascade.errors import UserError
from nemocascade.fields import text
from nemocascade.runtime.launch import launch, writable_folder
from nemocascade.runtime.loading import model_files, read_config, tokenizer_of
from nemocascade.state_files import named, on_bucket
from nemocascade.store import conversion, hf


def run(source: str, target: str) -> None:
  inward, outward = (name.startswith(hf.PREFIX) for name in (source, target))
  if not source or not target or inward == outward:
    raise UserError(f"--source={source!r} --target={target!r}: one of them must be hf:DIR")
  for flag, name in (("--source", source), ("--target", target)):
    if on_bucket(name.removeprefix(hf.PREFIX)):
      raise UserError(f"{flag}={name!r}: is in a bucket; give a folder of this machine, and copy it from or to there")
  into = Path(target.removeprefix(hf.PREFIX)).resolve()
  if into.exists() and (not into.is_dir() or any(into.iterdir())):
    raise UserError(f"--target={target}: is there already; remove it, or choose another")
  writable_folder("--target", into.parent)
  began = time.perf_counter()
  if inward:
    opened = hf.open_source(source.removeprefix(hf.PREFIX))
    tokenizer_of(opened.path, opened.config)  # Raises if the tokenizer does not fit the model.
    convert = functools.partial(conversion.from_hf, opened, into)
  else:
    files = model_files(source, "--source")
    config = read_config(files)
    tokenizer_of(files, config)
    convert = functools.partial(conversion.to_hf, Path(source).resolve(), files, config, into)
  with named(into):
    convert()
  size = sum(file.stat().st_size for file in into.rglob("*") if file.is_file())
  took = time.perf_counter() - began
  unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
  print(f"{target}: {size / unit:.2f} {name} in {took:.1f} s ({size / unit / took:.2f} {name}/s)")


if __name__ == "__main__":
  launch(
    run,
    config=False,
    source=(text("hf:DIR, STAGE/checkpoints/STEP, or STAGE/latest."), ""),
    target=(text("Where it is written: a new directory, or hf:DIR."), ""),
  )
