"""Structured output that a JSON schema validates: text in one of FORMATS, or tool arguments."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from nemocascade.domains import domain
from nemocascade.domains.rows import make_prompt
from nemocascade.sandbox import limited
from nemocascade.verifiers import validation
from nemocascade.verifiers.formats import FORMATS
from nemocascade.verifiers.verdict import Completion, Message, Row, Verdict, no_verdict

STYLE = domain.Style("field", "slot", error_rate=0.65)
THREE_PROPERTIES_SHARE = 0.3
INSTRUCTION = "Write JSON for"
STRINGS = {
  "name": ("Ann", "Bob", "Eve", "Ian", "Joe", "Kim", "Lee", "Max"),
  "city": ("Rome", "Oslo", "Lima", "Bern", "Cairo", "Delhi", "Paris", "Tokyo"),
  "pet": ("cat", "dog", "hen", "fox", "bee", "cow", "pig", "ant"),
}
INTEGERS = ("age", "floor", "rank")
MODES = ("text", "tool_call")
FORGOTTEN = "skip"  # The thought's note for a key that the answer will lack.


@dataclasses.dataclass
class Structured(domain.Domain):
  """Each thought notes one property; one that errs quotes an integer, or forgets a string."""

  name: str = "structured"
  style: domain.Style = STYLE
  phrases: tuple[str, ...] = (
    INSTRUCTION, " (string): ", " (integer): ", "field ", "slot ", ": ", ': "', '{"', '": "',
    '": ', '", "', ', "', '"}', "{}",
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    names = rng.permutation([*STRINGS, *INTEGERS])[: 2 + (rng.random() < THREE_PROPERTIES_SHARE)]
    record = {name: _draw(name, rng) for name in names.tolist()}
    kinds = {name: "integer" if name in INTEGERS else "string" for name in record}
    schema = {
      "type": "object",
      "properties": {name: {"type": kind} for name, kind in kinds.items()},
      "required": list(record),
      "additionalProperties": False,
    }
    lines = [f"{name} ({kinds[name]}): {value}" for name, value in record.items()]
    return make_prompt(
      self.name, "\n".join([INSTRUCTION, *lines]),
      schema_str=json.dumps(schema), schema_type="json", response_mode="text", record=record,
    )  # fmt: skip

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    answer, thoughts = {}, []
    for name, value in row["record"].items():
      marker, errs = self.style.draw(rng)
      if errs and isinstance(value, str):
        thoughts.append(f"{marker} {name}: {FORGOTTEN}")
        continue
      answer[name] = str(value) if errs else value
      thoughts.append(f"{marker} {name}: {json.dumps(answer[name])}")
    return [domain.assistant(json.dumps(answer), thoughts=thoughts if thinking else None)]

  def judge(self, row: Row, completion: Completion) -> Verdict:
    """Reward 1 iff the payload is valid under the strict form of the schema, whatever its values."""
    kind, mode = row.get("schema_type") or "json", row.get("response_mode") or "text"
    for word, value, known in (("schema type", kind, FORMATS), ("response mode", mode, MODES)):
      if value not in known:
        return no_verdict("unknown", f"unknown {word} {value!r}")
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


def _draw(name: str, rng: np.random.Generator) -> str | int:
  return int(rng.integers(1, 10)) if name in INTEGERS else str(rng.choice(STRINGS[name]))


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


def make_domain() -> Structured:
  return Structured()
