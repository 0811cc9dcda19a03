"""Errors for users. A message is one line with the field, its value and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A bad request (config, data, checkpoint or command). Commands print it and exit with 2."""


class StageStopped(Exception):
  """A stage was stopped because training or its data went wrong. The message says where, and a remedy if there is one.

  It is one line. Commands print it and exit with 1.
  """


class Terminated(Exception):
  """The run was asked to stop by SIGTERM, and has saved. Commands print it and exit with TERMINATED."""


# Exit codes. After the last two, the same command resumes.
FAILURE, BAD_REQUEST, INTERRUPTED = 1, 2, 130
LOST = 69  # Another process of the run has died, hangs, or did not come.
TERMINATED = 75  # SIGTERM.
UNREAD = 141  # Nobody reads what the command prints, as after `| head`: the code of a process that SIGPIPE ends.


def nearest(name: object, choices: Iterable[object]) -> str | None:
  """The choice most similar to the name, or None if none is similar."""
  near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
  return near[0] if near else None


def unknown(what: str, name: object, choices: Iterable[object]) -> UserError:
  """The error for a name that is not in `choices`; its message suggests the most similar choice."""
  choices = sorted(str(choice) for choice in choices)
  near = nearest(name, choices)
  hint = f"did you mean {near!r}? " if near else ""
  return UserError(f"unknown {what} {short(repr(str(name)))}: {hint}allowed: {listed(choices)}")


def listed(names: Iterable[str], most: int = 140) -> str:
  """The names joined by commas, at most about `most` characters; the rest is given as a number."""
  names = list(names)
  fits = [i for i in range(1, len(names) + 1) if len(", ".join(names[:i])) <= most]
  first = max(fits, default=1)
  rest = f" and {len(names) - first} more" if first < len(names) else ""
  return ", ".join(names[:first]) + rest


def first_of(differences: list[str]) -> str:
  """The first of some differences, and how many more there are."""
  more = len(differences) - 1
  return differences[0] + (f", and {more} more arrays differ" if more else "")


def short(said: str, most: int = 60) -> str:
  """The text on one line, cut to `most` characters."""
  said = " ".join(said.split())
  return said if len(said) <= most else said[: most - 3] + "..."
