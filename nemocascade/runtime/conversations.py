"""The conversations that SFT learns from: `c.sources` checked, generated where asked for, and opened as a blend."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.data import blend as blend_lib
from nemocascade.data import sources as dataset_files
from nemocascade.data.blend import Blend, Source
from nemocascade.data.documents import to_documents
from nemocascade.data.row_files import first_rows, open_rows
from nemocascade.data.stream import Counts
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError, unknown
from nemocascade.generated.generator import demonstrations
from nemocascade.generated.registry import GENERATORS, PREFIX, make
from nemocascade.report.metrics import read_lines
from nemocascade.runtime.hosts import first_alone

SHOWN = 10  # Bad conversations that are named on stderr.
BAD_ROW = {"type": "object", "required": ["row"], "properties": {"row": {"type": "string"}}}
CHECKED = 8  # Conversations of each source that are read before a run.


def check(c: ConfigDict) -> None:
  """Raises UserError if the fields of a source contradict each other. No file is read."""
  for name, source in c.sources.items():
    if "path" not in source:
      raise UserError(f"sources.{name}.path is missing: give files, a folder, or 'generated:DOMAIN'")
    if domain := _generated(source.path):
      if domain not in GENERATORS:
        raise unknown(f"generator in sources.{name}.path", domain, GENERATORS)
      if source.get("count") is None:
        raise UserError(f"sources.{name}.count is missing: say how many conversations are generated")
  blend_lib.counts(dict.fromkeys(c.sources, 1), c.sources)


def check_first(c: ConfigDict, tokenizer: Tokenizer) -> None:
  """Reads the first conversations of each source. Nothing is written.

  Raises:
    UserError: a source cannot be read, its first conversations are all bad, or all are longer than a row and
      would be dropped.
  """
  lengths: set[int] = set()
  for name, source in c.sources.items():
    errors, fine = [], False
    for place, row in _first(c, name):
      try:
        if isinstance(row, UserError):
          raise row
        lengths |= {len(document.tokens_T) for document in to_documents(row, tokenizer)}
        fine = True
      except UserError as error:
        errors.append(f"{place}: {error}")
    if not fine:
      raise UserError(f"sources.{name}: {errors[0] if errors else f'{source.path} holds no rows'}")
  if c.long_documents == "drop" and min(lengths) > c.row_tokens:
    raise UserError(
      f"row_tokens={c.row_tokens}: conversations have {min(lengths)} to {max(lengths)} tokens; give at least that,"
      " or long_documents=split"
    )


def open_blend(c: ConfigDict, folder: Path, stage: str) -> Blend:
  """Opens the sources. Generated ones and indexes are written in `folder` at the first call, then read.

  Raises:
    UserError: a source cannot be read.
  """

  def open_all() -> dict:
    found = {}
    for name, source in c.sources.items():
      path = source.path
      if _generated(path):
        path = folder / stage / name
        if not path.exists():
          dataset_files.write_demonstrations(_examples(c, name, source.count), path, name="demonstrations")
      with _named(name, source):
        found[name] = open_rows(str(path), folder / "index")
    return found

  first_alone(open_all)  # The others find what the first one has written.
  rows = open_all()
  counts = blend_lib.counts({name: len(part) for name, part in rows.items()}, c.sources)
  return Blend([Source(name, part, counts[name]) for name, part in rows.items()], c.seed)


def metrics(counts: Counts, segment_ids_BT: np.ndarray) -> dict[str, float]:
  """The metrics of the data: counts of this host's streams since the beginning, and how full these rows are.

  The rows read are those of the blocks that the rows come from (`look_ahead`), not of the rows alone.
  """
  return {
    "data/conversations": counts.rows,
    "data/bad": counts.bad,
    "data/long_documents": counts.long,
    "data/fill": float((segment_ids_BT > 0).mean()),
  }


class BadRows:
  """Names bad conversations: each once in bad_rows.jsonl of the stage, the first few on stderr too.

  Hosts other than the first write bad_rows.<process>.jsonl.
  """

  def __init__(self, stage_dir: Path):
    process = jax.process_index()
    self._path = stage_dir / (f"bad_rows.{process}.jsonl" if process else "bad_rows.jsonl")
    self._named = {line["row"] for line in read_lines(self._path, BAD_ROW)}

  def __call__(self, row: str) -> None:
    """Takes "FILE, line N: reason"."""
    if row in self._named:
      return
    self._named.add(row)
    if len(self._named) <= SHOWN:
      print(f"skipped: {row}", file=sys.stderr)
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps({"row": row}) + "\n")


def _first(c: ConfigDict, name: str) -> Iterator[tuple[str, Any]]:
  """(place, row or UserError) of a source's first conversations."""
  source = c.sources[name]
  if _generated(source.path):
    for i, row in enumerate(_examples(c, name, min(source.count, CHECKED))):
      yield f"{source.path}, example {i}", row
    return
  with _named(name, source):
    found = first_rows(source.path, CHECKED)
  yield from found


def _examples(c: ConfigDict, name: str, count: int) -> Iterator[dict]:
  generator = make(_generated(c.sources[name].path), c.tasks)
  return demonstrations(generator, c.seed, 0, count, non_thinking_share=c.non_thinking)


def _generated(path: str) -> str:
  """The domain of a generated source, or ""."""
  return path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""


@contextlib.contextmanager
def _named(name: str, source: ConfigDict) -> Iterator[None]:
  """Puts the field in front of the message of a UserError."""
  try:
    yield
  except UserError as error:
    raise UserError(f"sources.{name}.path={source.path}: {error}") from error
