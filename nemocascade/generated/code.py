"""Code: short functions of a few arithmetic steps, with hidden tests."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.generated import generator
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("exact", "rush", error_rate=0.65)
THREE_STEPS_SHARE = 0.3
OPENING = "Write f ( x ) :"
THEN = " then "
FENCE, FUNCTION, END = "```python", "def f ( x ) : ", "return x\n```"


@dataclasses.dataclass(frozen=True)
class Step:
  """One instruction of the prompt: the assignment operator in Python, and its effect."""

  code: str
  run: Callable[[int, int], int]


STEPS = {
  "add": Step("+=", operator.add),
  "take": Step("-=", operator.sub),
  "times": Step("*=", operator.mul),
  "over": Step("//=", operator.floordiv),
}
ASSUMED = Step("%=", operator.mod)  # A sloppy author writes this whatever the prompt asks for.
NUMBERS = range(2, 10)
INPUTS = (0, 1, 2, 5, 9, 24, 100, -3, -16)

Asked = list[tuple[str, int]]  # (key of STEPS, operand) per step.


@dataclasses.dataclass
class Code(generator.Generator):
  """Each step of thought writes one line of code; a sloppy step assumes the operator."""

  name: str = "code"
  style: generator.Style = STYLE

  def __post_init__(self):
    code = [f"x {step.code} " for step in (*STEPS.values(), ASSUMED)]
    words = [f"{word} " for word in STEPS]
    markers = [f"{self.style.careful} ", f"{self.style.sloppy} "]
    fixed = (f"{OPENING} ", THEN, f"{FENCE}\n{FUNCTION}", " ; ", END)
    self.phrases = (*fixed, *words, *markers, *code)

  def make_row(self, rng: np.random.Generator) -> Row:
    count = 2 + int(rng.random() < THREE_STEPS_SHARE)
    while True:
      asked = [(str(rng.choice(list(STEPS))), int(rng.choice(NUMBERS))) for _ in range(count)]
      outputs, *mistaken = (_outputs(steps) for steps in _ways(asked))
      if outputs not in mistaken:
        break  # The tests distinguish every sloppy program from the right one.
    text = THEN.join(f"{word} {number}" for word, number in asked)
    unit_tests = {
      "fn_name": "f",
      "inputs": [json.dumps(x) for x in INPUTS],
      "outputs": [json.dumps(y) for y in outputs],
    }
    return make_prompt(self.name, f"{OPENING} {text}", verifier_metadata={"unit_tests": unit_tests}, steps=asked)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    lines, thoughts = [], []
    for word, number in row["steps"]:
      marker, errs = self.style.draw(rng)
      step = ASSUMED if errs else STEPS[word]
      lines.append(f"x {step.code} {number}")
      thoughts.append(f"{marker} {lines[-1]}")
    answer = f"{FENCE}\n{FUNCTION}{' ; '.join([*lines, END])}"
    return [generator.assistant(answer, thoughts=thoughts if thinking else None)]


def _ways(asked: Asked) -> Iterator[tuple[tuple[Step, int], ...]]:
  """The requested steps first, then every variant in which one or more steps are mistaken."""
  return itertools.product(*([(STEPS[word], n), (ASSUMED, n)] for word, n in asked))


def _outputs(steps: Sequence[tuple[Step, int]]) -> list[int]:
  return [functools.reduce(lambda x, step: step[0].run(x, step[1]), steps, x) for x in INPUTS]
