"""Finds the answer that a text marks: in the last \\boxed{}, or in the last of some tag."""

import re
from collections.abc import Sequence

OPEN = "\\boxed{"
BOXED, FBOX = "boxed", "fbox"


def box(answer: object) -> str:
  return f"{OPEN}{answer}}}"


def last_boxed(text: str, commands: Sequence[str] = (BOXED,)) -> str | None:
  """The content of the last \\boxed{}, which may contain balanced braces.

  As in LaTeX, whitespace may precede the opening brace.

  Args:
    commands: command names in order of priority. A name is used only if the text has no box of
      any earlier name.

  Returns:
    The stripped content; None if there is no box, or if the last one is never closed.
  """
  for command in commands:
    starts = [match.end() for match in re.finditer(rf"\\{command}\s*\{{", text)]
    if starts:
      return _inside(text, starts[-1])
  return None


def _inside(text: str, start: int) -> str | None:
  """The text between the opening brace just before `start` and its closing brace."""
  depth, i = 1, start
  while i < len(text):
    if text[i] == "\\":  # \{ and \} are literal characters and do not open or close a group.
      i += 2
      continue
    depth += (text[i] == "{") - (text[i] == "}")
    if depth == 0:
      return text[start:i].strip()
    i += 1
  return None


def last_tagged(text: str, name: str, *, any_case: bool = False) -> str | None:
  """The stripped content of the last <name> tag that is closed; None if there is none.

  The text is searched for tags alone, and once, so that the time is linear in its length.
  """
  found, start = None, None
  for tag in re.finditer(rf"<(/?){name}>", text, re.IGNORECASE if any_case else 0):
    if not tag[1]:
      start = tag.end() if start is None else start
    elif start is not None:
      found, start = text[start : tag.start()].strip(), None
  return found
