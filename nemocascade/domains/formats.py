"""Texts in JSON, YAML, XML, TOML or CSV as plain values, types as a schema asks for them.

Stricter than NeMo Gym in two points, in every format: a key that is given twice and a number that is
not finite are errors. What a parser raises on is no value of its format.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import xmltodict
import yaml

FORMATS = ("json", "yaml", "xml", "toml", "csv")

Schema = Any  # A dict, or a bool.
Fits = Callable[[Any, Schema], bool]  # Whether a value is valid by a part of the schema.


def parse(kind: str, text: str, schema: Schema, fits: Fits) -> Any:
  """The value that the text says.

  Args:
    kind: one of FORMATS. XML and CSV know only strings: these become what `schema` asks for.

  Raises:
    ValueError and others: it says none.
  """
  if not text.strip():
    raise ValueError("empty")
  value = {"json": load_json, "yaml": _yaml, "xml": xmltodict.parse, "toml": tomllib.loads,
           "csv": _csv}[kind](text)  # fmt: skip
  if kind == "xml":
    value = _typed_xml(value, schema, schema, fits)
  elif kind == "csv":
    value = [_typed_record(record, schema) for record in value]
  _refuse_infinite(value)
  return value


def load_json(text: str) -> Any:
  """As the standard has it: no NaN, no infinity, each key once."""
  value = json.loads(text, object_pairs_hook=_once)
  _refuse_infinite(value)
  return value


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
  found: dict[Any, Any] = {}
  for key, value in pairs:
    if key in found:
      raise ValueError(f"key {key!r} is given twice")
    found[key] = value
  return found


def _refuse_infinite(value: Any) -> None:
  """By a list instead of recursion: a value may be nested deeper than the stack."""
  rest, seen = [value], set()
  while rest:
    value = rest.pop()
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"{value} is not a finite number")
    if isinstance(value, dict | list):
      if id(value) in seen:  # YAML's aliases.
        continue
      seen.add(id(value))
      rest += value.values() if isinstance(value, dict) else value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
  """The safe loader, with each key once."""

  def __init__(self, stream: str):
    super().__init__(stream)
    self._flattened: set[int] = set()

  def flatten_mapping(self, node: yaml.MappingNode) -> None:
    """Sees each mapping before merge keys (`<<`) add others' pairs, which own keys may repeat."""
    if id(node) not in self._flattened:
      self._flattened.add(id(node))
      keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
      _once(((key.tag, key.value), None) for key in keys if not key.tag.endswith(":merge"))
    super().flatten_mapping(node)


def _yaml(text: str) -> Any:
  return yaml.load(text, Loader=_Loader)  # noqa: S506  A safe loader.


def _csv(text: str) -> list[dict[Any, Any]]:
  reader = csv.DictReader(io.StringIO(text))
  _once((name, None) for name in reader.fieldnames or ())
  return list(reader)


def _scalar(text: str, kind: str) -> Any:
  """A string as the kind that the schema asks for; itself where it is none."""
  try:
    if kind == "integer":
      return int(text)
    if kind == "number":
      return float(text)
  except ValueError:
    return text
  if kind == "boolean":
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
  return text


# ---- XML


def _typed_xml(data: Any, schema: Schema, root: Schema, fits: Fits) -> Any:
  if not isinstance(schema, dict):
    return data
  if "$ref" in schema:
    return _typed_xml(data, _referred(schema["$ref"], root), root, fits)
  for part in schema.get("allOf", ()):
    data = _typed_xml(data, part, root, fits)
  for branches in (schema.get("oneOf"), schema.get("anyOf")):
    if branches:
      tried = [_typed_xml(data, branch, root, fits) for branch in branches]
      for value, branch in zip(tried, branches, strict=True):
        if fits(value, branch):
          return value
      return tried[0]
  kind = schema.get("type")
  if isinstance(kind, list):
    if data is None and "null" in kind:
      return None
    kinds = [one for one in kind if one != "null"]
    kind = kinds[0] if len(kinds) == 1 else None
  if kind == "object" and isinstance(data, dict):
    properties = schema.get("properties", {})
    return {
      key: _typed_xml(value, properties[key], root, fits) if key in properties else value
      for key, value in data.items()
    }
  if kind == "array":
    # <tags><tag>a</tag><tag>b</tag></tags> arrives as {"tag": ["a", "b"]}.
    if isinstance(data, dict) and len(data) == 1:
      data = next(iter(data.values()))
    items = data if isinstance(data, list) else [] if data is None else [data]
    return [_typed_xml(item, schema.get("items"), root, fits) for item in items]
  if data is None and kind == "string":
    return ""  # An empty element.
  return _scalar(data, kind) if isinstance(data, str) and isinstance(kind, str) else data


def _referred(pointer: str, root: Schema) -> Schema:
  """The part of the schema that a local `#/...` points to; True where there is none."""
  part = root
  for name in pointer.removeprefix("#").split("/")[1:]:
    part = part.get(name, True) if isinstance(part, dict) else True
  return part


# ---- CSV


def _typed_record(record: Mapping[Any, Any], schema: Schema) -> dict[Any, Any]:
  items = schema.get("items", schema) if isinstance(schema, dict) else {}
  properties = items.get("properties", {}) if isinstance(items, dict) else {}
  typed = {}
  for name, text in record.items():
    field = properties.get(name)
    kinds = field.get("type", "string") if isinstance(field, dict) else "string"
    typed[name] = _cell(text, kinds if isinstance(kinds, list) else [kinds])
  return typed


def _cell(text: Any, kinds: list[str]) -> Any:
  """A cell as the first of the kinds that it can be; a short row's missing cell is None."""
  if not isinstance(text, str) or not text:
    return None if "null" in kinds else text
  for kind in kinds:
    value = _scalar(text, kind)
    if kind == "string" or not isinstance(value, str):
      return value
  return text
