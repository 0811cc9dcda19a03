"""Validates configs against the tables of their fields.

`python -m nemocascade.field_check > docs/fields.md` writes the reference of all fields.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from nemocascade.errors import UserError, listed, unknown
from nemocascade.field_table import ABLATION, CASCADE, OWN, REWARD_MODEL, RL, SEED, SFT, SHARED, STAGE, WHOLE
from nemocascade.fields import Field, no_field, shown


def kind_of(config: Mapping) -> str:
  """The kind of a config, a key of OWN, inferred from its fields. Raises UserError if there is none."""
  if "arms" in config:
    return "ablation"
  if "stages" in config:
    return "cascade"
  if "kind" not in config:
    raise UserError(f"kind is missing: must be {STAGE['kind'].allowed()}, or give a config with stages")
  STAGE["kind"].check("kind", config["kind"])
  return config["kind"]


def check(c: Any, *kinds: str) -> None:
  """Validates a ConfigDict: its fields must be those of its kind, and their values within the ranges.

  Args:
    kinds: the kinds that the caller accepts; none accepts all.

  Raises:
    UserError: names the first wrong field, its value and what is allowed; or the kind, if it is not accepted.
  """
  config = c.to_dict()
  kind = kind_of(config)
  if kinds and kind not in kinds:
    raise UserError(
      f"kind={kind!r}: --config is of another kind than this command's: must be {' or '.join(map(repr, kinds))}"
    )
  _check(config, WHOLE[kind], "")


def check_values(part: str, **values: Any) -> None:
  """Validates values of fields of the section `part`, such as "optimizer", outside a config.

  Raises:
    UserError: names the first wrong field, its value and what is allowed.
  """
  tables = SHARED | STAGE | RL
  for name, value in values.items():
    tables[f"{part}.{name}"].check(f"{part}.{name}", value)


def field_of(config: Mapping, name: str) -> tuple[Field | None, list[str]]:
  """Looks up a dotted name: (its field or None, the names that are allowed in its section)."""
  table, (first, *rest) = WHOLE[kind_of(config)], name.split(".")
  if first in ("stages", "arms") and len(rest) > 1 and rest[0] in config.get(first, {}):
    kind = "rl" if first == "arms" else config[first][rest[0]].get("kind")
    table, name = OWN.get(kind, {}), ".".join(rest[1:])
  elif first in ("stages", "arms") and rest:
    return None, list(config.get(first, {}))
  return _find(table, name), _siblings(table, name)


def _check(config: Mapping, table: Mapping[str, Field], prefix: str) -> None:
  _walk(config, table, "", prefix)
  for name, field in table.items():
    if not field.optional and "*" not in name and not _has(config, name):
      raise UserError(f"{prefix}{name} is missing: must be {field.allowed()}")


def _walk(node: Mapping, table: Mapping[str, Field], path: str, prefix: str) -> None:
  for key, value in node.items():
    _check_name(prefix + path, key)
    name = f"{path}{key}"
    field = _find(table, name)
    if field is None and not _siblings(table, f"{name}.*", stars=True):
      raise no_field(prefix + name, _siblings(table, name))
    if (field is None or field.kind is dict) and not isinstance(value, Mapping):
      of = _siblings(table, f"{name}.*")
      has = f"fields: {listed(of)}" if of else f"fields, such as {name}.{_first(table, name)}"
      raise UserError(f"{prefix}{name}={shown(value)}: must be a section with {has}")
    if field is not None:
      field.check(prefix + name, value)
    if name in ("stages", "arms"):
      for own, stage in value.items():
        _check_name(f"{prefix}{name}.", own)
        if "/" in own or own in ("", ".", ".."):  # It is the name of the stage's folder.
          raise UserError(f"{prefix}{name}.{shown(own)}: names a folder, must be a text without '/', not '.' or '..'")
        _stage(stage, f"{prefix}{name}.{own}", arm=name == "arms")
    elif isinstance(value, Mapping) and (field is None or field.kind is dict):
      _walk(value, table, f"{name}.", prefix)


def _check_name(section: str, key: Any) -> None:
  """Checks a name of the config's choice, which becomes part of file names and metrics."""
  if not isinstance(key, str) or not key.isprintable():
    raise UserError(f"{section}{shown(key)}: is a name, must be a printable text")


def _stage(stage: Any, name: str, arm: bool) -> None:
  if not isinstance(stage, Mapping):
    raise UserError(f"{name}={shown(stage)}: must be the fields of a stage")
  if "kind" not in stage:
    raise UserError(f"{name}.kind is missing: must be {STAGE['kind'].allowed()}")
  STAGE["kind"].check(f"{name}.kind", stage["kind"])
  if arm and stage["kind"] != "rl":
    raise unknown(f"{name}.kind", stage["kind"], ("rl",))
  _check(stage, OWN[stage["kind"]], f"{name}.")


def _find(table: Mapping[str, Field], name: str) -> Field | None:
  """The field of the name, or else of the matching pattern with the fewest stars; None if there is none."""
  if name in table:
    return table[name]
  parts, found = name.split("."), []
  for pattern, field in table.items():
    wanted = pattern.split(".")
    if "*" in wanted and len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True)):
      found.append((wanted.count("*"), field))
  return min(found, key=lambda pair: pair[0])[1] if found else None


def _siblings(table: Mapping[str, Field], name: str, stars: bool = False) -> list[str]:
  """The last parts of names that are allowed in the section of `name`; with `stars`, "*" is included."""
  before = name.split(".")[:-1]
  below = (p.split(".") for p in table if p.count(".") >= len(before))
  return sorted(
    {p[len(before)] for p in below if all(b in ("*", a) for a, b in zip(before, p))} - ({"*"} if not stars else set())
  )


def _first(table: Mapping[str, Field], name: str) -> str:
  names = (p.split(".", name.count(".") + 1)[-1] for p in table if p.startswith(f"{name}."))
  return next(names, "*").replace("*", "NAME")


def _has(config: Mapping, name: str) -> bool:
  for part in name.split("."):
    if not isinstance(config, Mapping) or part not in config:
      return False
    config = config[part]
  return True


def described(c: Any) -> Iterator[tuple[str, Any, Field]]:
  """(dotted name, value, field) for every field of a config that has passed `check`."""
  config = c.to_dict()

  def walk(node: Mapping, path: str):
    for key, value in node.items():
      field, _ = field_of(config, path + key)
      if isinstance(value, Mapping) and value and (field is None or field.kind is dict):
        yield from walk(value, f"{path}{key}.")
      elif field is not None:
        yield path + key, value, field

  return walk(config, "")


def markdown() -> str:
  """The text of docs/fields.md."""
  parts = {
    "Shared by all": SEED | SHARED, "Every stage": STAGE, "SFT": SFT, "Reward model": REWARD_MODEL, "RL": RL,
    "Cascade": CASCADE, "Ablation": {n: f for n, f in ABLATION.items() if n not in CASCADE},
  }  # fmt: skip
  lines = [
    "# Fields of a config", "",
    "Written from the table in `nemocascade/field_table.py` by `python -m nemocascade.field_check > docs/fields.md`.",
    "`*` stands for a name that the config gives. Values are those of the files in `configs/`.",
  ]  # fmt: skip
  for title, table in parts.items():
    lines += ["", f"## {title}", "", "| field | allowed | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {field.allowed()} | {field.help} |" for name, field in table.items()]
  return "\n".join(lines)


if __name__ == "__main__":
  print(markdown())
