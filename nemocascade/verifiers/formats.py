"""Parses JSON, YAML, XML, TOML and CSV into plain values, typed by a schema where needed.

It is stricter than NeMo Gym in every format: a duplicate key or a non-finite number is an error.
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

Schema = Any  # A JSON schema: a dict or a bool.
Fits = Callable[[Any, Schema], bool]  # Whether a value is valid under a part of the schema.


def parse(kind: str, text: str) -> Any:
  """Parses the text; the values of XML and CSV are strings.

  Args:
    kind: one of FORMATS.

  Raises:
    ValueError, or another exception of the parser: the text is not valid in this format.
  """
  if not text.strip():
    raise ValueError("empty")
  return {"json": load_json, "yaml": _yaml, "xml": xmltodict.parse, "toml": tomllib.loads, "csv": _csv}[kind](text)


def typed(kind: str, value: Any, schema: Schema, fits: Fits) -> Any:
  """The value that `parse` returned, with the types that the schema gives to the strings of XML and CSV.

  Args:
    fits: chooses among the branches of a union in `schema`.

  Raises:
    ValueError: a number is not finite.
  """
  if kind == "xml":
    value = _typed_xml(value, schema, schema, fits)
  elif kind == "csv":
    value = [_typed_record(record, schema) for record in value]
  _refuse_infinite(value)
  return value


def load_json(text: str) -> Any:
  """Parses standard JSON: a NaN, an infinity or a duplicate key is a ValueError."""
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
  """Raises ValueError on a non-finite number. Iterative, as nesting may exceed the recursion limit."""
  rest, seen = [value], set()
  while rest:
    value = rest.pop()
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"{value} is not a finite number")
    if isinstance(value, dict | list):
      if id(value) in seen:  # A YAML alias can repeat a value, or make it contain itself.
        continue
      seen.add(id(value))
      rest += value.values() if isinstance(value, dict) else value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
  """The safe YAML loader, which here also rejects duplicate keys."""

  def __init__(self, stream: str):
    super().__init__(stream)
    self._flattened: set[int] = set()

  def flatten_mapping(self, node: yaml.MappingNode) -> None:
    """Checks a mapping's own keys before merge keys (`<<`) add pairs that they may override."""
    if id(node) not in self._flattened:
      self._flattened.add(id(node))
      keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
      _once(((key.tag, key.value), None) for key in keys if not key.tag.endswith(":merge"))
    super().flatten_mapping(node)


def _yaml(text: str) -> Any:
  return yaml.load(text, Loader=_Loader)  # noqa: S506  _Loader derives from a safe loader.


def _csv(text: str) -> list[dict[Any, Any]]:
  reader = csv.DictReader(io.StringIO(text))
  _once((name, None) for name in reader.fieldnames or ())
  return list(reader)


def _scalar(text: str, kind: str) -> Any:
  """Converts a string to the schema type `kind`; returns it unchanged if it cannot be converted."""
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
      key: _typed_xml(value, properties[key], root, fits) if key in properties else value for key, value in data.items()
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
  """The part of the schema that a local `#/...` pointer names; True (any value) if it is missing."""
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
  """Converts a cell to the first of the types that it fits.

  An empty cell becomes None if null is allowed. A cell missing from a short row is None.
  """
  if not isinstance(text, str) or not text:
    return None if "null" in kinds else text
  for kind in kinds:
    value = _scalar(text, kind)
    if kind == "string" or not isinstance(value, str):
      return value
  return text
