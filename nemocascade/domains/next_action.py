"""The next action of an agent: one tool call, judged by its equality with the row's `expected_action`."""

from __future__ import annotations

import json
from typing import Any

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the first turn makes exactly one call, with the expected function's name and arguments.

  Arguments of a completion are text, so an expected value that is no text equals its JSON form.
  """
  expected = row.get("expected_action")
  if not isinstance(expected, dict) or not expected.get("name"):
    return no_verdict("row", "no expected_action with the name of a function")
  arguments = expected.get("arguments") or {}
  wanted = json.loads(arguments) if isinstance(arguments, str) else arguments
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
    return json.loads(given[key]) == wanted[key]
  except ValueError:
    return False


def make_verify() -> Verify:
  return one_by_one(judge)
