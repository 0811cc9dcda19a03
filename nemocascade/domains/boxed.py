"""Answers in \\boxed{}: what the last one of a text holds."""

import re
from collections.abc import Sequence

OPEN = "\\boxed{"
BOXED, FBOX = "boxed", "fbox"


def box(answer: object) -> str:
  return f"{OPEN}{answer}}}"


def last_boxed(text: str, commands: Sequence[str] = (BOXED,)) -> str | None:
  """What the last \\boxed{} holds, braces balanced; None where there is none or it never closes.

  As in LaTeX, blanks may stand before the brace. A later command of `commands` counts only where
  the text has none of the earlier ones.
  """
  for command in commands:
    starts = [match.end() for match in re.finditer(rf"\\{command}\s*\{{", text)]
    if starts:
      return _inside(text, starts[-1])
  return None


def _inside(text: str, start: int) -> str | None:
  """The text from `start` to the brace that closes the one before `start`."""
  depth, i = 1, start
  while i < len(text):
    if text[i] == "\\":  # \{ and \} are characters, not groups.
      i += 2
      continue
    depth += (text[i] == "{") - (text[i] == "}")
    if depth == 0:
      return text[start:i].strip()
    i += 1
  return None
