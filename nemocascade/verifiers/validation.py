"""Checks whether a text, or the arguments of a tool call, are valid under a JSON schema.

`limited` runs these functions, because a schema's `pattern` or `uniqueItems` may take arbitrarily
long.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

from nemocascade.verifiers import formats

# {"valid": ""}, {"invalid": reason}, or {"row": reason} if the schema is bad.
Answer = dict[str, str]

REASON = 200  # Characters of a reason that are kept. It may quote a text that is too long for a reply.
LEVELS = 16  # Every schema that ends can check a value of this depth within Python's recursion limit.
LITERALS = {"True": True, "False": False, "None": None}  # As the chat template prints them.
# A branch describes only a part of an object. Forbidding other properties in a branch would forbid
# the object.
_NOT_MADE_STRICT = ("if", "then", "else", "not", "oneOf", "anyOf", "allOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_text(schema_str: str, kind: str, text: str) -> Answer:
  """Whether the text is in the format `kind` and its value is valid under the schema."""
  try:
    validator = _validator(schema_str)
  except _BAD_SCHEMA as error:
    return _answer("row", f"schema: {error}")
  try:
    value = formats.parse(kind, text)
  except Exception as error:  # noqa: BLE001  Text on which a parser raises is not in its format.
    return _answer("invalid", f"not {kind}: {type(error).__name__}: {error}")
  fits = lambda value, part: validator.evolve(schema=part).is_valid(value)
  return _checked(lambda value: (validator, formats.typed(kind, value, validator.schema, fits)), value)


def check_arguments(schema_str: str, arguments: Mapping[str, Any], key: str | None) -> Answer:
  """Whether a tool call's arguments, or the one argument named `key`, are valid under the schema.

  Args:
    arguments: name -> value, as strings from the call's text. Each is read as the first value that
      its schema allows: JSON, a literal of the chat template, or plain text.
    key: the argument that holds the whole value; None if the arguments together are the value.
  """
  try:
    validator = _validator(schema_str)
  except _BAD_SCHEMA as error:
    return _answer("row", f"schema: {error}")

  def typed(readings: Mapping[str, list]) -> tuple[Any, Any]:
    if key:
      return validator, _chosen(readings[key], validator)
    fields = validator.schema.get("properties", {}) if isinstance(validator.schema, dict) else {}
    part = lambda name: validator.evolve(schema=fields.get(name, True))
    return validator, {name: _chosen(said, part(name)) for name, said in readings.items()}

  wanted = {key: arguments[key]} if key else arguments
  return _checked(typed, {name: _readings(text) for name, text in wanted.items()})


_BAD_SCHEMA = (
  ValueError, TypeError, AttributeError, RecursionError, jsonschema.SchemaError,
  referencing.exceptions.Unresolvable,
)  # fmt: skip


@functools.lru_cache(maxsize=1 << 10)
def _validator(schema_str: str) -> Any:
  """A validator of the schema's strict form, by the draft that it names (default: 2020-12).

  The schema is checked first. References are never fetched.
  """
  schema = json.loads(schema_str)
  kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
  kind.check_schema(schema)
  return kind(_strict(schema), registry=referencing.Registry())


def _strict(schema: Any) -> Any:
  """The schema with all properties required and no others allowed, as in NeMo Gym."""
  if not isinstance(schema, dict):
    return schema
  strict: dict[str, Any] = {}
  for word, value in schema.items():
    if word in _MAPS and isinstance(value, dict):
      strict[word] = {name: _strict(part) for name, part in value.items()}
    elif word in _NOT_MADE_STRICT or word in ("const", "enum", "default", "examples"):
      strict[word] = value
    elif isinstance(value, list):
      strict[word] = [_strict(part) for part in value]
    else:
      strict[word] = _strict(value)
  if isinstance(schema.get("properties"), dict):
    strict |= {"required": list(schema["properties"]), "additionalProperties": False}
  return strict


def _checked(typed: Callable[[Any], tuple[Any, Any]], value: Any) -> Answer:
  """Whether a value is valid.

  Args:
    typed: the value as it was read -> (validator, the value with the types of the schema).
  """
  try:
    return _first_error(typed, value)
  except RecursionError:
    pass
  try:  # The value is nested too deep, unless its outer levels alone are too deep for the schema.
    _first_error(typed, _outer(value, LEVELS))
  except RecursionError:
    return _answer("row", "schema: it refers to itself without end")
  return _answer("invalid", "nested too deep")


def _first_error(typed: Callable[[Any], tuple[Any, Any]], value: Any) -> Answer:
  try:
    validator, value = typed(value)
    error = next(validator.iter_errors(value), None)
  except referencing.exceptions.Unresolvable as unresolved:
    return _answer("row", f"schema: {unresolved}")
  except RecursionError:
    raise
  except Exception as odd:  # noqa: BLE001  E.g. YAML keys that are not strings, or a number that is not finite.
    return _answer("invalid", f"{type(odd).__name__}: {odd}")
  return _answer("valid") if error is None else _answer("invalid", f"at {error.json_path}: {error.message}")


def _answer(word: str, reason: str = "") -> Answer:
  return {word: reason[:REASON]}


def _outer(value: Any, levels: int) -> Any:
  """The value without the content of objects and lists that are more than `levels` deep."""
  if isinstance(value, dict):
    return {key: _outer(part, levels - 1) for key, part in value.items()} if levels else {}
  if isinstance(value, list):
    return [_outer(part, levels - 1) for part in value] if levels else []
  return value


def _readings(text: Any) -> list:
  """What an argument may mean: a value of JSON, a literal, and the text itself."""
  if not isinstance(text, str):
    return [text]
  said = []
  try:
    said.append(formats.load_json(text))
  except (ValueError, RecursionError):
    pass
  if text in LITERALS:
    said.append(LITERALS[text])
  return [*said, text]


def _chosen(readings: list, validator: Any) -> Any:
  """The first valid reading, else the first."""
  return next((value for value in readings if validator.is_valid(value)), readings[0])
