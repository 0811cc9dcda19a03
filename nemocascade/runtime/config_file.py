"""Reads the config from --config=FILE[:argument], and applies changes by --config.NAME=VALUE."""

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from nemocascade.errors import UserError, nearest
from nemocascade.field_check import field_of
from nemocascade.fields import no_field, shown


def split(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], list[str]]:
  """Splits a command line.

  Returns:
    (value of --config or None, changes as (dotted name, text), all other arguments)

  Raises:
    UserError: --config or a change has no value.
  """
  config, changes, others = None, [], []
  words = iter(argv)
  for word in words:
    name, equals, value = word.partition("=")
    if name.lstrip("-").split(".")[0] != "config" or not word.startswith("-"):
      others.append(word)
      continue
    field = name.lstrip("-").partition(".")[2]
    value = value if equals else next(words, None)
    if value is None:
      raise UserError(f"{name} lacks its value: write {name}=...")
    if field or name.endswith("."):
      changes.append((field, value))
    else:
      config = value
  return config, changes, others


def load(config: str) -> ConfigDict:
  """Calls get_config of FILE[:argument]; returns the config, locked.

  Raises:
    UserError: the file does not exist, is no Python file with get_config, or refuses the argument.
  """
  name, _, argument = config.partition(":")
  path = Path(name)
  if not name or not os.path.exists(path):  # Path.exists raises if a name is too long.
    raise UserError(f"--config={shown_path(config)}: there is no such file{_like(path)}")
  if path.is_dir():
    raise UserError(f"--config={shown_path(config)}: is a folder; give a file of it{_such_as(path)}")
  if path.suffix != ".py":
    raise UserError(f"--config={shown_path(config)}: is not a Python file (.py) with get_config")
  module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"config_{path.stem}", path))
  try:
    module.__spec__.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f"--config={shown_path(config)}: is not Python: line {error.lineno}: {error.msg}") from error
  except (Exception, SystemExit) as error:
    raise UserError(f"--config={shown_path(config)}: cannot be read: {_why(error)}") from error
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"--config={shown_path(config)}: has no function get_config(argument)")
  try:
    c = module.get_config(argument) if argument else module.get_config()
  except UserError as error:
    raise UserError(f"--config={shown_path(config)}: {error}") from error
  except (Exception, SystemExit) as error:
    raise UserError(f"--config={shown_path(config)}: get_config({argument!r}) fails: {_why(error)}") from error
  if not isinstance(c, ConfigDict):
    raise UserError(f"--config={shown_path(config)}: get_config must return a ConfigDict, not {type(c).__name__}")
  return c.lock()


def change(c: ConfigDict, changes: Iterable[tuple[str, str]]) -> None:
  """Sets fields of `c` from (dotted name, text). A field must be one that this kind of config allows.

  Raises:
    UserError: a field does not exist (the message has the nearest name), or its text is not a valid value.
  """
  for name, said in changes:
    flag = f"--config.{name}"
    field, siblings = field_of(c.to_dict(), name)
    if field is None:
      if name in siblings or _section(c, name) is not None:
        raise UserError(f"{flag}={shown(said)}: is a section: set a field of it, {flag}.NAME=VALUE")
      raise no_field(flag, siblings)
    value = field.parse(flag, said)
    field.check(flag, value)
    *path, last = name.split(".")
    section = c
    with c.unlocked(), c.ignore_type():
      for part in path:
        if part not in section:
          section[part] = ConfigDict()
        section = section[part]
      section[last] = _section_of(flag, value) if field.kind is dict else value


def _section_of(flag: str, value: dict) -> ConfigDict:
  try:
    return ConfigDict(value)
  except (ValueError, TypeError) as error:  # A name has a dot, or is no text.
    raise UserError(f"{flag}={shown(value)}: names must be texts without dots") from error


def shown_path(path: str, most: int = 80) -> str:
  """The path for a message; of one longer than `most` characters only the end."""
  return path if len(path) <= most else "..." + path[3 - most :]


def _section(c: ConfigDict, name: str) -> ConfigDict | None:
  for part in name.split("."):
    if not isinstance(c, ConfigDict) or part not in c:
      return None
    c = c[part]
  return c if isinstance(c, ConfigDict) else None


def _like(path: Path) -> str:
  """A hint that names the Python file or folder with the most similar name; "" if none is similar."""
  here = path.parent
  while not here.is_dir():
    here, path = here.parent, here
  names = [entry.name for entry in here.iterdir() if entry.suffix == ".py" or entry.is_dir()]
  near = nearest(path.name, names) or nearest(f"{path.stem}.py", names)
  return f": did you mean {str(here / near)!r}?" if near else ""


def _such_as(folder: Path) -> str:
  files = sorted(entry for entry in folder.glob("*.py") if entry.stem not in ("__init__", "base"))
  return f", such as {files[0]}" if files else ""


def _why(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())}"
