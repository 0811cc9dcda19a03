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
KIND = {word: kind for kind, words in KNOWLEDGE.items() for word in words}
QUESTION, IS_A = "Which is a ", ": "
GRADING_MODES = ("strict_single_letter_boxed", "lenient_boxed")


def _mark(letter: str) -> str:
  """What an option begins with, in the question and in the thoughts alike."""
  return f"\n({letter}) "


@dataclasses.dataclass
class Stem(domain.Domain):
  """The thoughts go through the options, saying what each is, until one is what was asked.

  Each step needs one thing: to copy the next option, to know its kind, to stop at the right one. A
  sloppy choice says of the first wrong option that it is what was asked; a sloppy letter is the
  next wrong one.
  """

  name: str = "stem"
  style: domain.Style = STYLE
  phrases: tuple[str, ...] = (
    QUESTION, IS_A, "fact ", "guess ", "\\boxed{",
    *map(_mark, string.ascii_uppercase[:OPTIONS]),
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> domain.Row:
    asked, *others = rng.permutation(list(KNOWLEDGE))[:OPTIONS].tolist()
    words = [str(rng.choice(KNOWLEDGE[category])) for category in (asked, *others)]
    order = rng.permutation(OPTIONS).tolist()
    letters = string.ascii_uppercase[:OPTIONS]
    options = [{letter: words[place]} for letter, place in zip(letters, order, strict=True)]
    lines = [f"{_mark(letter)}{word}" for option in options for letter, word in option.items()]
    return domain.make_prompt(
      self.name, f"{QUESTION}{asked}?" + "".join(lines),
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
    kinds = KIND | {options[choice][1]: row["asked"]}  # As they are said to be.
    looked_at = options[: right + 1] if choice == right else [options[choice]]
    claims = [f"{_mark(letter)}{word}{IS_A}{kinds[word]}" for letter, word in looked_at]
    thoughts = [f"{choice_marker} {row['asked']}" + "".join(claims), f"{letter_marker} {letter}"]
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
