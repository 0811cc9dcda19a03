"""What a user is told: one line with the field, the value and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A bad request (config, data, checkpoint or command). Commands print it and exit with 2."""


class StageStopped(Exception):
  """A stage that goes wrong was ended: one line with stage, step and what to do. Commands exit with 1."""


def nearest(name: object, choices: Iterable[object]) -> str | None:
  """The choice most like the name, if any is like it."""
  near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
  return near[0] if near else None


def unknown(what: str, name: object, choices: Iterable[object]) -> UserError:
  """The error for a name that is not one of `choices`, with the nearest one."""
  choices = sorted(str(choice) for choice in choices)
  near = nearest(name, choices)
  hint = f"did you mean {near!r}? " if near else ""
  return UserError(f"unknown {what} {short(repr(str(name)))}: {hint}allowed: {listed(choices)}")


def listed(names: Iterable[str], most: int = 140) -> str:
  """Names in a row; of many the first, and how many more there are."""
  names = list(names)
  fits = [i for i in range(1, len(names) + 1) if len(", ".join(names[:i])) <= most]
  first = max(fits, default=1)
  rest = f" and {len(names) - first} more" if first < len(names) else ""
  return ", ".join(names[:first]) + rest


def short(said: str, most: int = 60) -> str:
  """One line of at most so many characters."""
  said = " ".join(said.split())
  return said if len(said) <= most else said[: most - 3] + "..."
