"""Structured output: records written as JSON under a schema."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.generated import generator
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("field", "slot", error_rate=0.65)
THREE_PROPERTIES_SHARE = 0.3
INSTRUCTION = "Write JSON for"
STRINGS = {
  "name": ("Ann", "Bob", "Eve", "Ian", "Joe", "Kim", "Lee", "Max"),
  "city": ("Rome", "Oslo", "Lima", "Bern", "Cairo", "Delhi", "Paris", "Tokyo"),
  "pet": ("cat", "dog", "hen", "fox", "bee", "cow", "pig", "ant"),
}
INTEGERS = ("age", "floor", "rank")
FORGOTTEN = "skip"  # The thought's note for a key that the answer will lack.


@dataclasses.dataclass
class Structured(generator.Generator):
  """Each thought notes one property; one that errs quotes an integer, or forgets a string."""

  name: str = "structured"
  style: generator.Style = STYLE
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
    return [generator.assistant(json.dumps(answer), thoughts=thoughts if thinking else None)]


def _draw(name: str, rng: np.random.Generator) -> str | int:
  return int(rng.integers(1, 10)) if name in INTEGERS else str(rng.choice(STRINGS[name]))
