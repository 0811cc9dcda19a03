"""How the processes of a run share what each one knows about its own completions."""

from collections.abc import Callable, Iterable
from typing import Any

# (JSON value, name of the exchange) -> the values of all processes, in their order. All processes call it, with the
# same names in the same order.
Exchange = Callable[[Any, str], list[Any]]


def alone(value: Any, what: str) -> list[Any]:
  """The Exchange of a run in one process."""
  del what
  return [value]


def merge(own: Iterable[list[Any]], exchange: Exchange, what: str) -> list[list[Any]]:
  """The items of all processes, in the order of the processes.

  Args:
    own: this process's items. Each is a list that begins with what it is about, such as the number of a row.
  """
  return [item for part in exchange(list(own), what) for item in part]
