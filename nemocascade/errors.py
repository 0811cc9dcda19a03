"""What a user is told: one line with the field, the value and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A bad request (config, data, checkpoint or command). Commands print it and exit with 2."""


class StageStopped(Exception):
  """A stage that goes wrong was ended: one line with stage, step and what to do. Commands exit with 1."""


def unknown(what: str, name: object, choices: Iterable[object]) -> UserError:
  """The error for a name that is not one of `choices`, with the nearest one."""
  choices = sorted(str(choice) for choice in choices)
  near = difflib.get_close_matches(str(name), choices, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return UserError(f"unknown {what} {str(name)!r}: {hint}allowed: {', '.join(choices)}")
