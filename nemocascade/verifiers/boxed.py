"""Reads and writes \\boxed{} answers."""

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
