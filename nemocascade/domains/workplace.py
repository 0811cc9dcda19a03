"""A small in-memory workplace: calendar, contacts, mail, and the functions that act on them."""

from __future__ import annotations

import dataclasses
import re
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

TABLES = {  # Table -> its columns, in the order of a snapshot's rows.
  "calendar": ("id", "title", "place"),
  "contacts": ("name", "address"),
  "mail": ("address", "text"),
}
LONGEST_VALUE = 1000  # Characters of one argument.
SHOWN = 40  # Characters of a value quoted in an error.

# Used if a row has no snapshot, e.g. a row written by hand.
DEFAULT_SNAPSHOT = {
  "calendar": [["amber", "standup", "hall"], ["coral", "review", "lab"]],
  "contacts": [["Ann", "ivory"], ["Bob", "olive"]],
}


class CallError(Exception):
  """A failed call, which changes nothing. Its message is one line, returned to the caller."""


class Workplace:
  """A database. Workplaces with the same contents have equal `state()`, whatever calls led there."""

  def __init__(self, snapshot: Mapping[str, list[list[str]]] | None = None):
    # An episode may run in one thread and be judged in another, but never in both at once.
    self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for table, columns in TABLES.items():
      self._db.execute(f"CREATE TABLE {table} ({', '.join(c + ' TEXT NOT NULL' for c in columns)})")
    for table, rows in (DEFAULT_SNAPSHOT if snapshot is None else snapshot).items():
      places = ", ".join("?" for _ in TABLES[table])
      self._db.executemany(f"INSERT INTO {table} VALUES ({places})", rows)

  def call(self, name: str, arguments: Mapping[str, Any]) -> str:
    """The result of one call: a short text, or one line `error: ...`. It never raises."""
    try:
      if name not in FUNCTIONS:
        raise CallError(f"no function {_show(name)}")
      if not isinstance(arguments, Mapping):
        raise CallError("arguments are not an object")
      return FUNCTIONS[name](self, arguments)
    except CallError as error:
      return f"error: {error}"

  def state(self) -> tuple:
    """The whole contents in a canonical order: per table, its name and its rows sorted."""
    return tuple(
      (table, *sorted(self._db.execute(f"SELECT {', '.join(columns)} FROM {table}")))
      for table, columns in TABLES.items()
    )

  def one(self, query: str, *values: str) -> str | None:
    """The first column of the query's first row; None if there is no row."""
    row = self._db.execute(query, values).fetchone()
    return None if row is None else row[0]

  def change(self, query: str, *values: str) -> int:
    """Executes the statement and returns the number of rows that it changed."""
    return self._db.execute(query, values).rowcount


def _show(value: object) -> str:
  """A value as quoted in an error: one short line."""
  return " ".join(str(value).split())[:SHOWN]


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One argument: a text that `pattern` must match entirely."""

  description: str
  pattern: str = r"(?s).*\S.*"

  def check(self, name: str, value: Any) -> str:
    if isinstance(value, dict | list | bool | None):
      raise CallError(f"bad {name} {_show(value)}")
    text = str(value).strip()
    printable = "\0" not in text and _encodes(text)
    if not printable or len(text) > LONGEST_VALUE or not re.fullmatch(self.pattern, text):
      raise CallError(f"bad {name} {_show(text.encode('ascii', 'replace').decode())}")
    return text


def _encodes(text: str) -> bool:
  """Whether the text can be encoded in UTF-8, which a lone surrogate cannot."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


@dataclasses.dataclass(frozen=True)
class Function:
  """A function that may be called: its schema, and its effect on a workplace."""

  name: str
  description: str
  parameters: Mapping[str, Parameter]
  run: Callable[..., str]

  def __call__(self, workplace: Workplace, arguments: Mapping[str, Any]) -> str:
    for parameter in arguments:
      if parameter not in self.parameters:
        raise CallError(f"no parameter {_show(parameter)}")
    for parameter in self.parameters:
      if parameter not in arguments:
        raise CallError(f"missing {parameter}")
    checked = {p: spec.check(p, arguments[p]) for p, spec in self.parameters.items()}
    return self.run(workplace, **checked)

  def schema(self) -> dict[str, Any]:
    """The function's schema in the flat form of the released rows."""
    properties = {
      name: {"type": "string", "description": parameter.description} for name, parameter in self.parameters.items()
    }
    return {
      "type": "function",
      "name": self.name,
      "description": self.description,
      "parameters": {
        "type": "object",
        "properties": properties,
        "required": list(self.parameters),
        "additionalProperties": False,
      },
      "strict": False,
    }


def _calendar_find(workplace: Workplace, title: str) -> str:
  found = workplace.one("SELECT id FROM calendar WHERE title = ? COLLATE NOCASE", title)
  if found is None:
    raise CallError(f"no event {_show(title)}")
  return found


def _calendar_move(workplace: Workplace, id: str, place: str) -> str:
  if not workplace.change("UPDATE calendar SET place = ? WHERE id = ?", place, id):
    raise CallError(f"no event {_show(id)}")
  return "ok"


def _calendar_cancel(workplace: Workplace, id: str) -> str:
  if not workplace.change("DELETE FROM calendar WHERE id = ?", id):
    raise CallError(f"no event {_show(id)}")
  return "ok"


def _contact_find(workplace: Workplace, name: str) -> str:
  found = workplace.one("SELECT address FROM contacts WHERE name = ? COLLATE NOCASE", name)
  if found is None:
    raise CallError(f"no contact {_show(name)}")
  return found


def _mail_send(workplace: Workplace, address: str, text: str) -> str:
  if workplace.one("SELECT address FROM contacts WHERE address = ?", address) is None:
    raise CallError(f"no address {_show(address)}")
  workplace.change("INSERT INTO mail VALUES (?, ?)", address, text)
  return "ok"


_ID = Parameter("The id of the event.")
_PLACE = Parameter("The new place, one word.", "[A-Za-z]+")

FUNCTIONS: dict[str, Function] = {
  function.name: function
  for function in (
    Function("calendar_find", "Finds the id of an event.",
             {"title": Parameter("The title of the event.")}, _calendar_find),
    Function("calendar_move", "Moves an event.", {"id": _ID, "place": _PLACE}, _calendar_move),
    Function("calendar_cancel", "Cancels an event.", {"id": _ID}, _calendar_cancel),
    Function("contact_find", "Finds the address of a person.",
             {"name": Parameter("The name of the person.")}, _contact_find),
    Function("mail_send", "Sends a mail.",
             {"address": Parameter("The address of the person."),
              "text": Parameter("The text of the mail.")}, _mail_send),
  )
}  # fmt: skip
