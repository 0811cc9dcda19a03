"""The generators by name. A generator's file is imported only when it is made."""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping

from nemocascade import errors
from nemocascade.generated.generator import Generator, Style

PREFIX = "generated:"  # Of the `rows` of a domain in a config, and of a source of conversations.

# Name -> (file, class).
GENERATORS: dict[str, tuple[str, str]] = {
  "instruction": ("instruction", "Instruction"),
  "math": ("math", "Math"),
  "stem": ("stem", "Stem"),
  "structured": ("structured", "Structured"),
  "tools": ("tools", "Tools"),
  "preference": ("preference", "Preference"),
  "long_context": ("long_context", "LongContext"),
  "code": ("code", "Code"),
  "swe": ("swe", "Agentless"),
  "swe_agentic": ("swe", "Agentic"),
}


def make(name: str, tasks: Mapping[str, Mapping] | None = None) -> Generator:
  """Makes the named generator.

  Args:
    tasks: generator -> {field: value} that replaces fields of its Style or of the generator itself. Entries of
      other generators are ignored; `check_tasks` finds those of none.

  Raises:
    UserError: unknown generator or field.
  """
  if name not in GENERATORS:
    raise errors.unknown("generator", name, GENERATORS)
  file, class_ = GENERATORS[name]
  generator = getattr(importlib.import_module(f"nemocascade.generated.{file}"), class_)()
  _change(generator, f"tasks.{name}", (tasks or {}).get(name, {}))
  return generator


def check_tasks(tasks: Mapping[str, Mapping], used: Iterable[str]) -> None:
  """Raises UserError if `tasks` has an entry for a generator that is not in use."""
  for name in tasks:
    if name not in (used := list(used)):
      raise errors.unknown("domain in tasks", name, used)


def _change(generator: Generator, where: str, fields: Mapping) -> None:
  of_style = [field.name for field in dataclasses.fields(Style)]
  own = [f.name for f in dataclasses.fields(generator)] if dataclasses.is_dataclass(generator) else []
  for field, value in fields.items():
    if field in of_style:
      generator.style = dataclasses.replace(generator.style, **{field: value})
    elif field in own:
      setattr(generator, field, value)
    else:
      raise errors.unknown(f"field of {where}", field, [*of_style, *own])
