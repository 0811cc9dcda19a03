"""Matching a pattern that a data row brings: it may backtrack for ever, so `limited` runs it."""

from __future__ import annotations

import re

from nemocascade.domains import limited


class BadPattern(ValueError):
  """The row's pattern does not compile."""


def last_match(pattern: str, text: str) -> list[str] | None:
  """The groups of the last match, case ignored; the whole match where there are no groups.

  Raises:
    BadPattern: it does not compile.
    limited.NoAnswer: over the limit.
  """
  answer = limited.call(search, pattern, text)
  if "bad" in answer:
    raise BadPattern(f"{pattern!r}: {answer['bad']}")
  return answer["groups"]


def search(pattern: str, text: str) -> dict[str, str | list[str] | None]:
  """What `last_match` asks the other process: {"groups": ...}, or {"bad": why}."""
  try:
    compiled = re.compile(pattern, re.IGNORECASE)
  except (re.error, OverflowError, RecursionError) as error:
    return {"bad": str(error)}
  last = None
  for match in compiled.finditer(text):
    last = match
  if last is None:
    return {"groups": None}
  return {"groups": [group or "" for group in last.groups()] or [last.group()]}
