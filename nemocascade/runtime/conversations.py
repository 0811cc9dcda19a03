"""The conversations that SFT learns from: `c.sources` checked, generated where asked for, and opened as a blend."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.data import blend as blend_lib
from nemocascade.data import sources as dataset_files
from nemocascade.data.blend import Blend, Source
from nemocascade.data.documents import texts_of, to_documents
from nemocascade.data.loader import Loader
from nemocascade.data.row_files import first_rows, open_rows
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError, unknown
from nemocascade.generated.generator import demonstrations
from nemocascade.generated.registry import GENERATORS, PREFIX, make
from nemocascade.report.metrics import read_lines
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.sharing import held
from nemocascade.state_files import append_to, on_bucket
from nemocascade.types import Batch

SAMPLES = 8  # Documents that are written to samples.jsonl.
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


def texts(c: ConfigDict, count: int) -> list[str]:
  """The texts of the first `count` conversations of each source in files; bad ones have none.

  Raises:
    UserError: a source cannot be read.
  """
  found = []
  for name, source in c.sources.items():
    if _generated(source.path):
      continue
    with _named(name, source):
      rows = first_rows(source.path, count)
    for _, row in rows:
      with contextlib.suppress(UserError):
        found += [] if isinstance(row, UserError) else texts_of(row)
  return found


def folder_of(workdir: Path) -> Path:
  """The folder of the generated sources and the indexes of a run: in its work directory, or, if that is in a bucket,
  a temporary one of this machine, which is made anew where it is lost."""
  if not on_bucket(workdir):
    return workdir / "data"
  name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
  return Path(tempfile.gettempdir()) / f"nemocascade-{os.getuid()}" / name


def open_blend(c: ConfigDict, workdir: Path, stage: str) -> Blend:
  """Opens the sources. Generated ones and indexes are written in `folder_of` at the first call, then read.

  Raises:
    UserError: a source cannot be read.
  """

  folder = folder_of(workdir)

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

  if on_bucket(workdir):
    with held(folder, wait=True):  # Each machine has its own.
      rows = open_all()
  else:
    first_alone(open_all, "indexes of the sources")  # The others find what the first one has written.
    rows = open_all()
  counts = blend_lib.counts({name: len(part) for name, part in rows.items()}, c.sources)
  return Blend([Source(name, part, counts[name]) for name, part in rows.items()], c.seed)


def metrics(data: Loader, segment_ids_BT: np.ndarray) -> dict[str, float]:
  """The metrics of the data: counts of this host's streams since the beginning, and how full these rows are.

  Args:
    segment_ids_BT: this host's rows of a batch.

  The rows read are those of the blocks that the rows come from (`look_ahead`), not of the rows alone.
  """
  return {
    "data/epochs": data.epochs,
    "data/conversations": data.counts.rows,
    "data/bad": data.counts.bad,
    "data/long_documents": data.counts.long,
    "data/fill": float((segment_ids_BT > 0).mean()),
  }


def sample_lines(batch: Batch, own: Sequence[int], tokenizer: Tokenizer) -> list[dict]:
  """Lines of samples.jsonl: the first SAMPLES documents of the rows `own`, cut where what is learned begins and ends.

  A line has {"pieces": [{"text", "learned"}, ...]}. The first token of a document is never learned.
  """
  lines: list[dict] = []
  for row in own:
    segments_T = batch.segment_ids_BT[row]
    for document in range(1, int(segments_T.max()) + 1):
      if len(lines) == SAMPLES:
        return lines
      at = np.flatnonzero(segments_T == document)
      tokens_T, learned_T = batch.tokens_BT[row][at], batch.loss_mask_BT[row][at]
      cuts = [0, *(np.flatnonzero(np.diff(learned_T)) + 1).tolist(), len(at)]
      pieces = [
        {"text": tokenizer.decode(tokens_T[start:stop].tolist()), "learned": bool(learned_T[start])}
        for start, stop in zip(cuts, cuts[1:])
      ]
      lines.append({"pieces": pieces})
  return lines


def described(blend: Blend) -> str:
  """The conversations of an epoch, by source, in words."""
  parts = ", ".join(
    f"{source.name} {source.count}" + (f" of {len(source.rows)}" if source.count < len(source.rows) else "")
    for source in blend.sources
  )
  return f"an epoch has {blend.length} conversations: {parts}"


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
    with append_to(self._path) as file:
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
