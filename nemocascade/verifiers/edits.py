"""SEARCH/REPLACE edits: the format in which a model without tools changes files."""

import dataclasses
from collections.abc import Mapping, Sequence

SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
FENCE = "```"


class EditError(Exception):
  """The text contains no well-formed edits, or they do not apply."""


class UnknownFile(EditError):
  """An edit names a file that was not given."""


@dataclasses.dataclass(frozen=True)
class Edit:
  """Whole lines to find in a file, and the lines that replace them."""

  path: str
  search: str
  replace: str


def parse(text: str) -> list[Edit]:
  """The edits in a text, in order.

  Each edit is inside a fenced block: the path on its own line (with or without "### "), then SEARCH,
  the lines to find, DIVIDER, the lines to insert, REPLACE. Text outside fences is ignored.

  Raises:
    EditError: there is no edit, or one is malformed.
  """
  edits: list[Edit] = []
  path, fenced = "", False
  lines = iter(text.split("\n"))
  for line in lines:
    word = line.strip()
    if word.startswith(FENCE):
      path, fenced = "", not fenced
    elif word == SEARCH:
      if not fenced:
        raise EditError("an edit stands outside of a fenced block")
      if not path:
        raise EditError("an edit has no path")
      search = _until(DIVIDER, lines)
      edits.append(Edit(path, search, _until(REPLACE, lines)))
      path = ""
    elif word in (DIVIDER, REPLACE):
      raise EditError(f"{word!r} without {SEARCH!r}")
    elif word:
      path = word.removeprefix("### ").strip()
  if not edits:
    raise EditError("no edit")
  if fenced:
    raise EditError("a fenced block is not closed")
  return edits


def apply(files: Mapping[str, str], edits: Sequence[Edit]) -> dict[str, str]:
  """The files after applying the edits in order. Each edit must match exactly once.

  Raises:
    UnknownFile: an edit names a file that is not in `files`.
    EditError: an edit's lines are missing or ambiguous, or the edits change nothing.
  """
  changed = dict(files)
  for edit in edits:
    if edit.path not in changed:
      raise UnknownFile(f"no file {edit.path[:80]!r}")
    if not edit.search.strip():
      raise EditError("nothing to search for")
    # With newlines around both, only whole lines match. The outer newlines are removed at the end.
    text, search = f"\n{changed[edit.path]}\n", f"\n{edit.search}\n"
    place = text.find(search)
    if place < 0:
      raise EditError(f"{edit.path}: the lines to search for are not there")
    if text.find(search, place + 1) >= 0:
      raise EditError(f"{edit.path}: the lines to search for are there more than once")
    middle = f"\n{edit.replace}\n" if edit.replace else "\n"
    changed[edit.path] = (text[:place] + middle + text[place + len(search) :])[1:-1]
  if changed == dict(files):
    raise EditError("the edits change nothing")
  return changed


def show(edit: Edit, language: str = "diff") -> str:
  """Formats an edit as a model would write it."""
  return "\n".join([f"{FENCE}{language}", edit.path, SEARCH, edit.search, DIVIDER, edit.replace, REPLACE, FENCE])


def _until(marker: str, lines) -> str:
  found: list[str] = []
  for line in lines:
    if line.strip() == marker:
      return "\n".join(found)
    if line.strip() in (SEARCH, DIVIDER, REPLACE):
      break
    found.append(line)
  raise EditError(f"an edit has no {marker!r}")
