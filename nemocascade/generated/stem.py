"""Multiple-choice questions about facts, answered by the letter of an option."""

from __future__ import annotations

import dataclasses
import string

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.generated import generator
from nemocascade.verifiers import choice
from nemocascade.verifiers.boxed import box
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("fact", "guess")
OPTIONS = 4
KNOWLEDGE = {  # Few facts, so that training repeats each often. Questions are combinations of them.
  "metal": ("iron", "gold", "zinc", "lead", "tin"),
  "bird": ("robin", "crow", "owl", "hawk", "swan"),
  "tree": ("oak", "pine", "elm", "birch", "maple"),
  "fish": ("trout", "salmon", "cod", "tuna", "carp"),
}
KIND = {word: kind for kind, words in KNOWLEDGE.items() for word in words}
QUESTION, IS_A = "Which is a ", ": "


def _mark(letter: str) -> str:
  """The start of an option's line, in the question and in the thoughts."""
  return f"\n({letter}) "


@dataclasses.dataclass
class Stem(generator.Generator):
  """The thoughts go through the options and name the kind of each, until one has the kind asked for.

  Each step needs one skill: copying the next option, knowing its kind, or stopping at the right one.
  A choice that errs claims that the first wrong option has the kind asked for. A letter that errs is
  that of the next wrong option.
  """

  name: str = "stem"
  style: generator.Style = STYLE
  phrases: tuple[str, ...] = (
    QUESTION, IS_A, "fact ", "guess ", "\\boxed{",
    *map(_mark, string.ascii_uppercase[:OPTIONS]),
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    asked, *others = rng.permutation(list(KNOWLEDGE))[:OPTIONS].tolist()
    words = [str(rng.choice(KNOWLEDGE[category])) for category in (asked, *others)]
    order = rng.permutation(OPTIONS).tolist()
    letters = string.ascii_uppercase[:OPTIONS]
    options = [{letter: words[place]} for letter, place in zip(letters, order, strict=True)]
    lines = [f"{_mark(letter)}{word}" for option in options for letter, word in option.items()]
    return make_prompt(
      self.name, f"{QUESTION}{asked}?" + "".join(lines),
      options=options, expected_answer=letters[order.index(0)], grading_mode=choice.MODES[0],
      asked=asked,
    )  # fmt: skip

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    options = [(letter, word) for option in row["options"] for letter, word in option.items()]
    letters = [letter for letter, _ in options]
    right = letters.index(row["expected_answer"])
    choice_marker, errs = self.style.draw(rng)
    place = int(right == 0) if errs else right
    letter_marker, errs = self.style.draw(rng)
    letter = letters[place]
    if errs:  # Skips the expected letter, so that two errors do not give a right answer.
      after = letters[place + 1 :] + letters[:place]
      letter = next(letter for letter in after if letter != row["expected_answer"])
    kinds = KIND | {options[place][1]: row["asked"]}  # The kinds that the thoughts claim.
    looked_at = options[: right + 1] if place == right else [options[place]]
    claims = [f"{_mark(letter)}{word}{IS_A}{kinds[word]}" for letter, word in looked_at]
    thoughts = [f"{choice_marker} {row['asked']}" + "".join(claims), f"{letter_marker} {letter}"]
    return [generator.assistant(box(letter), thoughts=thoughts if thinking else None)]
