"""Multiple-choice questions of knowledge: the letter of the right option, boxed."""

from __future__ import annotations

import dataclasses
import re
import string

import numpy as np

from nemocascade.domains import domain
from nemocascade.domains.boxed import box, last_boxed

STYLE = domain.Style("fact", "guess")
OPTIONS = 4
KNOWLEDGE = {  # Few facts, so that each is met often: the questions are their combinations.
  "metal": ("iron", "gold", "zinc", "lead", "tin"),
  "bird": ("robin", "crow", "owl", "hawk", "swan"),
  "tree": ("oak", "pine", "elm", "birch", "maple"),
  "fish": ("trout", "salmon", "cod", "tuna", "carp"),
}
QUESTION, IS = "Which is a ", " is "
GRADING_MODES = ("strict_single_letter_boxed", "lenient_boxed")


def _mark(letter: str) -> str:
  """What follows an option's text: behind it, so that the text leads to the letter."""
  return f" ({letter})"


@dataclasses.dataclass
class Stem(domain.Domain):
  """The thoughts say what was asked and which option it is, then conclude its letter.

  A sloppy choice is the first wrong option, a sloppy letter the next wrong one. The letter stands
  behind the word at once: said later, the word would have been met twice, once without its letter.
  """

  name: str = "stem"
  style: domain.Style = STYLE
  phrases: tuple[str, ...] = (
    QUESTION, IS, "fact ", "guess ", "\\boxed{",
    *map(_mark, string.ascii_uppercase[:OPTIONS]),
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> domain.Row:
    asked, *others = rng.permutation(list(KNOWLEDGE))[:OPTIONS].tolist()
    words = [str(rng.choice(KNOWLEDGE[category])) for category in (asked, *others)]
    order = rng.permutation(OPTIONS).tolist()
    letters = string.ascii_uppercase[:OPTIONS]
    options = [{letter: words[place]} for letter, place in zip(letters, order, strict=True)]
    lines = [f"{word}{_mark(letter)}" for option in options for letter, word in option.items()]
    return domain.make_prompt(
      self.name, "\n".join([f"{QUESTION}{asked}?", *lines]),
      options=options, expected_answer=letters[order.index(0)], grading_mode=GRADING_MODES[0],
      asked=asked,
    )  # fmt: skip

  def demonstrate(
    self, row: domain.Row, rng: np.random.Generator, *, thinking: bool
  ) -> list[domain.Message]:
    options = [(letter, word) for option in row["options"] for letter, word in option.items()]
    letters = [letter for letter, _ in options]
    right = letters.index(row["expected_answer"])
    choice_marker, errs = self.style.draw(rng)
    choice = int(right == 0) if errs else right
    letter_marker, errs = self.style.draw(rng)
    letter = letters[choice]
    if errs:  # Two errors must not make a right answer.
      after = letters[choice + 1 :] + letters[:choice]
      letter = next(letter for letter in after if letter != row["expected_answer"])
    asked, word = row["asked"], options[choice][1]
    thoughts = [
      f"{choice_marker} {asked}{IS}{word}{_mark(letters[choice])}", f"{letter_marker} {letter}",
    ]  # fmt: skip
    return [domain.assistant(box(letter), thoughts=thoughts if thinking else None)]

  def judge(self, row: domain.Row, completion: domain.Completion) -> domain.Verdict:
    """The last \\boxed{} must hold the expected letter, and in strict mode nothing else."""
    mode = row.get("grading_mode") or GRADING_MODES[0]
    if mode not in GRADING_MODES:
      return domain.Verdict(0.0, f"unknown grading mode {mode!r}", masked=True)
    options = {key: str(text) for option in row["options"] for key, text in option.items()}
    answer = last_boxed(completion.content)
    if answer is None:
      return domain.Verdict(0.0, "no \\boxed{} answer")
    letter = _lenient(answer, options) if mode == "lenient_boxed" else answer
    if letter not in options:
      return domain.Verdict(0.0, f"not the letter of an option: {answer[:80]!r}")
    right = letter == row["expected_answer"]
    return domain.Verdict(float(right), "right" if right else f"chose {letter}")


def _lenient(answer: str, options: dict[str, str]) -> str:
  """The letter meant by `B`, `(B)`, `\\text{B}`, `B: iron`, or by an option's own text."""
  if match := re.fullmatch(r"(?:\\text\{)?\W*([A-Z])(?:[).:].*|\W*)", answer, re.DOTALL):
    return match[1]
  meant = [key for key, text in options.items() if text.strip().lower() == answer.strip().lower()]
  return meant[0] if len(meant) == 1 else answer


def make_domain() -> Stem:
  return Stem()
