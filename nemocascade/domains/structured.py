"""Structured output that a JSON schema validates: text in one of FORMATS, or tool arguments."""

from __future__ import annotations

from typing import Any

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.sandbox import limited
from nemocascade.verifiers import validation
from nemocascade.verifiers.formats import FORMATS
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

MODES = ("text", "tool_call")
NO_SCHEMA = "no schema_str"


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the payload is valid under the strict form of the schema, whatever its values."""
  kind, mode = row.get("schema_type") or "json", row.get("response_mode") or "text"
  if why := unsupported(row):
    return no_verdict("row" if why == NO_SCHEMA else "unknown", why)
  if mode == "text":
    answer = limited.call(validation.check_text, row["schema_str"], kind, completion.content)
  else:
    arguments, key = _arguments(row, completion), row.get("tool_payload_key")
    if isinstance(arguments, str):
      return Verdict(0.0, arguments)
    answer = limited.call(validation.check_arguments, row["schema_str"], arguments, key)
  ((word, why),) = answer.items()
  if word == "row":
    return no_verdict("row", why)
  return Verdict(float(word == "valid"), f"{word} {why}".strip()[:200])


def _arguments(row: Row, completion: Completion) -> dict[str, Any] | str:
  """The arguments of the single call of the row's tool, or a string that says what is wrong."""
  calls = [call for turn in completion.turns for call in turn.tool_calls]
  if len(calls) != 1:
    return f"{len(calls)} tool calls instead of one"
  (call,) = calls
  if row.get("tool_name") and call.name != row["tool_name"]:
    return f"called {call.name[:80]!r}, not {row['tool_name']!r}"
  key = row.get("tool_payload_key")
  return f"no argument {key!r}" if key and key not in call.arguments else dict(call.arguments)


def unsupported(row: Row) -> str:
  """Says that the row has no schema, or a schema type or response mode that does not exist here; else ""."""
  kind, mode = row.get("schema_type") or "json", row.get("response_mode") or "text"
  for word, value, known in (("schema type", kind, FORMATS), ("response mode", mode, MODES)):
    if value not in known:
      return f"unknown {word} {value!r}"
  return "" if isinstance(row.get("schema_str"), str) else NO_SCHEMA


def make_verify() -> Verify:
  return one_by_one(judge)
