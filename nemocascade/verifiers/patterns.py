"""Matches regular expressions from data rows, in `limited`, because they may backtrack forever."""

from __future__ import annotations

import re

from nemocascade.sandbox import limited

LONGEST = 10_000  # Characters of a group that are kept, because a reply has a limit. Answers are far shorter.


class BadPattern(ValueError):
  """A pattern does not compile."""


def last_match(pattern: str, text: str) -> list[str] | None:
  """The groups of the last match, ignoring case.

  Returns:
    One string per group, "" if it did not take part; the whole match if the pattern has no groups;
    None if there is no match.

  Raises:
    BadPattern: the pattern does not compile.
    limited.NoAnswer: the search exceeded the time limit or failed.
  """
  answer = limited.call(search, pattern, text)
  if "bad" in answer:
    raise BadPattern(f"{pattern!r}: {answer['bad']}")
  return answer["groups"]


def search(pattern: str, text: str) -> dict[str, str | list[str] | None]:
  """Runs `last_match` in the other process. Returns {"groups": ...}, or {"bad": reason}."""
  try:
    compiled = re.compile(pattern, re.IGNORECASE)
  except (re.error, OverflowError, RecursionError) as error:
    return {"bad": str(error)}
  last = None
  for match in compiled.finditer(text):
    last = match
  if last is None:
    return {"groups": None}
  return {"groups": [(group or "")[:LONGEST] for group in last.groups() or [last.group()]]}
