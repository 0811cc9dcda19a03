"""A repository of text files, the functions by which an agent edits it, and its tests."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from nemocascade.sandbox.program import Call, Program, Result
from nemocascade.verifiers.outputs import same_value

# {name: {"path", "fn_name", "inputs": [[argument, ...], ...], "outputs": [...]}}
Tests = Mapping[str, Mapping[str, Any]]

LONGEST_FILE = 200_000  # Characters.
SHOWN = 40  # Characters of a value quoted in an error.
REPLIES = REPLACED, NOT_FOUND, NOT_UNIQUE = (
  "replaced", "error: old is not there", "error: old is there more than once",
)  # fmt: skip


class Repository:
  """Files by path. Each function returns a short text, an error too, and never raises."""

  def __init__(self, files: Mapping[str, str]):
    self.files = dict(files)

  def view(self, path: str) -> str:
    if path not in self.files:
      return f"error: no file {_show(path)}"
    return self.files[path].removesuffix("\n")

  def replace(self, path: str, old: str, new: str) -> str:
    if path not in self.files:
      return f"error: no file {_show(path)}"
    text = self.files[path]
    if not old:
      return "error: old is empty"
    place = text.find(old)
    if place < 0:
      return NOT_FOUND
    if text.find(old, place + 1) >= 0:
      return NOT_UNIQUE
    if len(text) + len(new) > LONGEST_FILE:
      return "error: file too long"
    self.files[path] = text.replace(old, new)
    return REPLACED


def tests_program(files: Mapping[str, str], tests: Tests) -> Program:
  """A program that makes the calls of all tests, in order. It does not contain expected values.

  Raises:
    KeyError, TypeError, ValueError: a test is malformed or has no case, or there are no tests.
  """
  if not tests:
    raise ValueError("no test is named")
  for name, test in tests.items():
    if not test["inputs"] or len(test["inputs"]) != len(test["outputs"]):
      raise ValueError(f"test {name!r} has {len(test['inputs'])} inputs and {len(test['outputs'])} outputs")
    if not isinstance(test["fn_name"], str):
      raise TypeError(f"test {name!r} names no function")
  calls = [
    Call(_module(test["path"]), test["fn_name"], tuple(arguments))
    for test in tests.values()
    for arguments in test["inputs"]
  ]
  return Program(dict(files), calls=tuple(calls))


def failed_tests(result: Result, tests: Tests) -> list[str]:
  """The names of the tests that did not pass. A call without a result fails its test."""
  given = list(result.returns)
  failed = []
  for name, test in tests.items():
    count = len(test["inputs"])
    mine, given = given[:count], given[count:]
    if len(mine) < count or not all(
      "value" in returned and same_value(expected, returned["value"])
      for expected, returned in zip(test["outputs"], mine, strict=True)
    ):
      failed.append(name)
  return failed


def _module(path: str) -> str:
  return ".".join(pathlib.PurePosixPath(path).with_suffix("").parts)


def _show(value: str) -> str:
  """A value as quoted in an error: one short line."""
  return " ".join(value.split())[:SHOWN]
