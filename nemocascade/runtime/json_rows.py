"""Reads and writes JSON lines of conversations or tokens. Checks all rows before anything is compiled."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.data import chat
from nemocascade.data.sources import numbered_jsonl
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError
from nemocascade.report.metrics import compile_seconds, progress
from nemocascade.runtime.launch import writable_bucket, writable_folder
from nemocascade.state_files import on_bucket, place, whole

Row = dict[str, Any]
FEWEST = 32  # Size of the smallest bucket, in tokens.


def read_rows(path: str) -> list[tuple[int, Row]]:
  """(line number, row) of each line.

  Raises:
    UserError: the file has no rows, or lines that are not an object with "tokens" or "messages"; the message
      names all such lines.
  """
  if not path:
    raise UserError("--input is missing: give a file of JSON lines")
  rows, wrong = [], []
  for number, row in numbered_jsonl(path):
    if isinstance(row, UserError):
      wrong.append((number, row))
    elif "tokens" not in row and "messages" not in row:
      wrong.append((number, f"has neither 'tokens' nor 'messages', only {sorted(row)}"))
    else:
      rows.append((number, row))
  _refuse(path, wrong)
  if not rows:
    raise UserError(f"{path}: has no rows")
  return rows


def tokens_of(
  rows: Sequence[tuple[int, Row]],
  tokenizer: Tokenizer | None,
  *,
  path: str,
  vocab_size: int,
  **template: Any,
) -> list[list[int]]:
  """The tokens of each row: its "tokens", or its rendered conversation.

  Args:
    path: the file's name, for errors.
    template: arguments of the chat template. A row's "chat_template_kwargs" override them.

  Raises:
    UserError: rows have no tokens, a token outside the vocabulary, or a malformed conversation; the message
      names all such rows.
  """
  found, wrong = [], []
  for number, row in rows:
    try:
      found.append(_tokens(row, tokenizer, vocab_size, template))
    except UserError as error:
      wrong.append((number, error))
  _refuse(path, wrong)
  return found


def instant() -> tuple[float, float]:
  """(seconds of a clock, seconds in which this process has compiled so far)."""
  return time.perf_counter(), compile_seconds()


def write_rows(path: str, rows: Sequence[Row], began: tuple[float, float]) -> None:
  """Writes JSON lines to a temporary file, then renames it, so that `path` is never incomplete. Prints what they cost.

  Args:
    rows: each with "tokens", those that the model sampled or scored.
    began: the `instant` at which the command began.
  """
  target = place(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  with whole(target) as partial:
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
  seconds, compiled = (now - before for now, before in zip(instant(), began, strict=True))
  tokens = sum(len(row["tokens"]) for row in rows)
  print(
    f"{path}: {len(rows)} row{'s' * (len(rows) != 1)}, {tokens} tokens in {seconds:.1f} s, {compiled:.1f} s of them"
    " compilation"
  )


def check_output(path: str, source: str) -> None:
  """Raises UserError if results cannot be written to `path`. Call it before computing them.

  Args:
    source: the file of --input, which results must not replace.
  """
  target = place(path)
  if not path or (target.exists() and not target.is_file()):
    raise UserError(f"--output={path!r}: give the file to write")
  if _same_file(path, source):
    raise UserError(f"--output={path!r}: is the file of --input, which it would replace; give another one")
  check = writable_bucket if on_bucket(path) else writable_folder
  check("--output", str(target.parent))


def _same_file(path: str, other: str) -> bool:
  if on_bucket(path) or on_bucket(other):
    return path == other
  return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def bucket(length: int) -> int:
  """The length rounded up to a power of two, at least FEWEST, so that few lengths are compiled."""
  return max(FEWEST, 1 << (length - 1).bit_length())


def batches(numbers: Sequence[int], B: int, *, desc: str) -> Iterator[Sequence[int]]:
  """Yields parts of at most B numbers, with a progress bar if there are several parts."""
  bar = progress(len(numbers), initial=0, desc=desc, unit="row") if len(numbers) > B else None
  for start in range(0, len(numbers), B):
    part = numbers[start : start + B]
    yield part
    if bar is not None:
      bar.update(len(part))
  if bar is not None:
    bar.close()


def _tokens(row: Row, tokenizer: Tokenizer | None, vocab_size: int, template: Mapping) -> list[int]:
  if "tokens" in row:
    tokens = row["tokens"]
    if not isinstance(tokens, list) or not tokens:
      raise UserError("tokens must be a list of at least one id")
    for token in tokens:
      if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise UserError(f"token {token!r:.40}: must be a whole number from 0 to {vocab_size - 1}")
    return tokens
  if tokenizer is None:
    raise UserError("has messages, but the checkpoint has no tokenizer: give tokens")
  messages, tools = row["messages"], row.get("tools")
  own = row.get("chat_template_kwargs") or {}
  for name, value, kind in (
    ("messages", messages, list), ("tools", tools or [], list), ("chat_template_kwargs", own, dict),
  ):  # fmt: skip
    if not isinstance(value, kind):
      raise UserError(f"{name} must be {'a list' if kind is list else 'an object'}")
  chat.check_arguments(own)
  pieces = chat.render(messages, tools=tools, **{**template, **own})
  return chat.tokenize(pieces, tokenizer)[0]


def _refuse(path: str, wrong: Sequence[tuple[int, object]]) -> None:
  if wrong:
    told = "; ".join(f"line {number}: {why}" for number, why in wrong)
    raise UserError(f"{path}: {told}")
