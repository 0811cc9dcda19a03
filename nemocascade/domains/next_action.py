"""The next action of an agent: one tool call, judged by its equality with the row's `expected_action`."""

from __future__ import annotations

import json
from typing import Any

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.verifiers.formats import load_json
from nemocascade.verifiers.validation import LITERALS
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the first turn makes exactly one call, with the expected function's name and arguments.

  Arguments of a completion are text, so an expected value that is no text equals its JSON form; True, False and
  None may be written as the chat template writes them.
  """
  if why := unsupported(row):
    return no_verdict("row", why)
  expected, wanted = row["expected_action"], _arguments(row["expected_action"])
  calls = completion.turns[0].tool_calls if completion.turns else ()
  if len(calls) != 1:
    return Verdict(0.0, f"{len(calls)} tool calls instead of one")
  (call,) = calls
  if call.name != expected["name"]:
    return Verdict(0.0, f"called {call.name[:80]!r}, not {expected['name']!r}")
  wrong = [key for key in {**wanted, **call.arguments} if not _same(wanted, call.arguments, key)]
  return Verdict(float(not wrong), f"differs in {', '.join(sorted(wrong))}"[:200] if wrong else "the expected call")


def _same(wanted: dict[str, Any], given: dict[str, str], key: str) -> bool:
  if key not in wanted or key not in given:
    return False
  if isinstance(wanted[key], str):
    return given[key].strip("\n") == wanted[key].strip("\n")  # The template puts values on lines of their own.
  try:
    return _equal(LITERALS[given[key]] if given[key] in LITERALS else load_json(given[key]), wanted[key])
  except (ValueError, RecursionError):  # Not JSON, or nested too deep.
    return False


def _equal(a: Any, b: Any) -> bool:
  """Whether values of JSON are equal; True is not 1."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(_equal, a, b))
  return isinstance(a, bool) == isinstance(b, bool) and a == b


def _arguments(action: dict[str, Any]) -> Any:
  arguments = action.get("arguments") or {}
  return json.loads(arguments) if isinstance(arguments, str) else arguments


def unsupported(row: Row) -> str:
  """Why no completion of the row can be judged: it lacks a call to compare with; else ""."""
  action = row.get("expected_action")
  if not isinstance(action, dict) or not isinstance(action.get("name"), str) or not action["name"]:
    return "no expected_action with the name of a function"
  try:
    arguments = _arguments(action)
  except ValueError:
    return "arguments of expected_action are not JSON"
  return "" if isinstance(arguments, dict) else "arguments of expected_action are no object"


def make_verify() -> Verify:
  return one_by_one(judge)
