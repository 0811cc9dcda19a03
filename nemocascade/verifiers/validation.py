"""Checks whether a text, or the arguments of a tool call, are valid under a JSON schema.

`limited` runs these functions, because a schema's `pattern` or `uniqueItems` may take arbitrarily
long.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

from nemocascade.verifiers import formats

# {"valid": ""}, {"invalid": reason}, or {"row": reason} if the schema is bad.
Answer = dict[str, str]

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
    return {"row": f"schema: {error}"}
  fits = lambda value, part: validator.evolve(schema=part).is_valid(value)
  try:
    value = formats.parse(kind, text, validator.schema, fits)
  except referencing.exceptions.Unresolvable as error:
    return {"row": f"schema: {error}"}
  except Exception as error:  # noqa: BLE001  Text on which a parser raises is not in its format.
    return {"invalid": f"not {kind}: {type(error).__name__}: {error}"}
  return _checked(validator, value)


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
    return {"row": f"schema: {error}"}
  try:
    if key:
      return _checked(validator, _read(arguments[key], validator))
    schema = validator.schema if isinstance(validator.schema, dict) else {}
    fields = schema.get("properties", {})
    value = {name: _read(text, validator.evolve(schema=fields.get(name, True))) for name, text in arguments.items()}
  except referencing.exceptions.Unresolvable as error:
    return {"row": f"schema: {error}"}
  except (ValueError, RecursionError) as error:
    return {"invalid": str(error)}
  return _checked(validator, value)


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


def _checked(validator: Any, value: Any) -> Answer:
  try:
    error = next(validator.iter_errors(value), None)
  except referencing.exceptions.Unresolvable as unresolved:
    return {"row": f"schema: {unresolved}"}
  except RecursionError:
    return {"invalid": "nested too deep"}
  except (TypeError, ValueError, AttributeError) as odd:  # E.g. YAML keys that are not strings.
    return {"invalid": f"{type(odd).__name__}: {odd}"}
  return {"valid": ""} if error is None else {"invalid": f"at {error.json_path}: {error.message}"}


def _read(text: Any, validator: Any) -> Any:
  """Reads an argument as JSON, as a literal, or as text: the first valid reading, else the first."""
  if not isinstance(text, str):
    return text
  said = []
  try:
    said.append(formats.load_json(text))
  except (ValueError, RecursionError):
    pass
  if text in LITERALS:
    said.append(LITERALS[text])
  said.append(text)
  return next((value for value in said if validator.is_valid(value)), said[0])
