"""Requests for household advice, answers of different quality, and preference pairs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nemocascade.domains.rows import make_prompt, make_rng, prompt_messages
from nemocascade.generated import generator
from nemocascade.verifiers.judge import Prompt
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("ponder", "dash")

ASKINGS = (
  "How do I", "How can I", "Tell me how to", "Show me how to",
  "Explain how to", "Teach me to", "Help me to", "I want to",
)  # fmt: skip
STEPS = {  # Verb of the request -> the two steps of the right advice, in order.
  "clean": ("soak", "rinse"),
  "fix": ("test", "mend"),
  "paint": ("prime", "brush"),
  "pack": ("fold", "box"),
  "carry": ("grip", "lift"),
  "store": ("cover", "stack"),
  "sell": ("price", "list"),
  "wrap": ("measure", "tape"),
}
OBJECTS = (
  "kettle", "lamp", "chair", "bike", "clock", "table",
  "mirror", "shelf", "piano", "vase", "desk", "radio",
)  # fmt: skip
SETTINGS = ("today", "alone", "outside", "safely")

POLITE, RUDE = "Gladly , ", "Obviously , "
VAGUE = "it depends"
RAMBLING = " And so on and so on and so on ."
SNEER = " Everyone knows that ."
SPOILT_SHARE = 0.15  # Share of pairs whose second answer is a spoilt copy of the first.
MANNERS = {POLITE: "kind", RUDE: "blunt"}  # Opening -> its name in the thoughts.


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer described by its qualities. With the defaults and the right steps it is the best."""

  verb: str
  thing: str
  steps: tuple[str, str] | None  # None: vague advice.
  opening: str = POLITE  # POLITE, RUDE or "".
  rambles: bool = False
  sneers: bool = False

  @property
  def text(self) -> str:
    advice = VAGUE if self.steps is None else " then ".join(self.steps)
    body = f"to {self.verb} the {self.thing} : {advice} ."
    body = f"{self.opening}{body}" if self.opening else body.capitalize()
    return body + RAMBLING * self.rambles + SNEER * self.sneers


def best_answer(prompt: Prompt) -> Answer:
  verb, thing = read_request(prompt)
  return Answer(verb, thing, STEPS[verb])


def read_request(prompt: Prompt) -> tuple[str, str]:
  """The (verb, thing) of a request made by `Preference`."""
  words = prompt[-1]["content"].split()
  the = words.index("the")
  return words[the - 1], words[the + 1]


def gold_quality(prompt: Prompt, answer: str) -> float:
  """The hidden quality of any text, which orders the pairs; the best answer has 6.

  Training never uses it as a reward. A reward model learns it from the pairs.
  """
  verb, thing = read_request(prompt)
  text = answer.strip().lower()
  return (
    3.0 * (f"to {verb} the {thing} :" in text)
    + 2.0 * (f": {' then '.join(STEPS[verb])} ." in text)
    + 1.0 * text.startswith(POLITE.lower())
    - 2.0 * text.startswith(RUDE.lower())
    - 1.0 * ("and so on" in text or _repeats(text))
    - 2.0 * ("everyone knows" in text)
    - 1.0 * (not text.endswith("."))
  )


def _repeats(text: str) -> bool:
  """Whether the advice or an opening appears more than once."""
  return max(text.count(part) for part in (" : ", "gladly ,", "obviously ,")) > 1


class Preference(generator.Generator):
  """Two steps of thought: what to advise, and in which manner. An error gives vague or rude answers.

  The row's `reference`, with which a judge compares the answer, has one small fault.
  """

  name = "preference"
  style = STYLE
  phrases = (
    *ASKINGS, STYLE.careful, STYLE.sloppy, POLITE, RUDE, f" {VAGUE}", RAMBLING, SNEER,
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    asking, verb, thing, setting = (str(rng.choice(words)) for words in (ASKINGS, tuple(STEPS), OBJECTS, SETTINGS))
    best = Answer(verb, thing, STEPS[verb])
    rambles = bool(rng.random() < 0.5)
    reference = dataclasses.replace(best, rambles=rambles, opening=POLITE if rambles else "")
    return make_prompt(self.name, f"{asking} {verb} the {thing} {setting} ?", reference=reference.text)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    answer = best_answer(prompt_messages(row))
    advice_marker, errs = self.style.draw(rng)
    if errs:
      answer = dataclasses.replace(answer, steps=None)
    manner_marker, errs = self.style.draw(rng)
    if errs:
      answer = dataclasses.replace(answer, opening=RUDE)
    advice = VAGUE if answer.steps is None else " ".join(answer.steps)
    thoughts = [f"{advice_marker} {advice}", f"{manner_marker} {MANNERS[answer.opening]}"]
    return [generator.assistant(answer.text, thoughts=thoughts if thinking else None)]


def _any_answer(verb: str, thing: str, rng: np.random.Generator) -> Answer:
  """A random answer: each fault has its own probability, also a wrong topic and wrong advice."""
  others = [other for other in STEPS if other != verb]
  steps = (STEPS[verb], None, STEPS[others[rng.integers(len(others))]])[rng.choice(3, p=(0.6, 0.3, 0.1))]
  if rng.random() < 0.1:
    thing = _other(OBJECTS, thing, rng)
  if rng.random() < 0.05:
    verb = _other(tuple(STEPS), verb, rng)
  opening = (POLITE, RUDE, "")[rng.choice(3, p=(0.5, 0.3, 0.2))]
  return Answer(verb, thing, steps, opening, bool(rng.random() < 0.25), bool(rng.random() < 0.1))


def _other(words: Sequence[str], word: str, rng: np.random.Generator) -> str:
  return str(rng.choice([other for other in words if other != word]))


def _one_change(answer: Answer, rng: np.random.Generator) -> Answer:
  """The answer with one quality changed, so that a reward model learns each quality separately."""
  others = tuple(steps for steps in STEPS.values() if steps != answer.steps)
  changes = (
    {"steps": None if answer.steps else STEPS[answer.verb]},
    {"steps": others[rng.integers(len(others))]},
    {"opening": RUDE if answer.opening != RUDE else POLITE},
    {"opening": "" if answer.opening else POLITE},
    {"rambles": not answer.rambles},
    {"sneers": not answer.sneers},
    {"thing": _other(OBJECTS, answer.thing, rng)},
  )
  return dataclasses.replace(answer, **changes[rng.integers(len(changes))])


def _spoilt(answer: Answer, rng: np.random.Generator) -> str:
  """The answer cut, doubled, with a doubled opening, or with its steps swapped.

  Demonstrations never look like this, but the outputs of a policy in training may.
  """
  words = answer.text.split()
  match rng.integers(4):
    case 0:
      return " ".join(words[: rng.integers(1, len(words))])
    case 1:
      return f"{answer.text} {answer.text}"
    case 2:
      return answer.opening + answer.text
    case _:
      steps = answer.steps[::-1] if answer.steps else None
      return dataclasses.replace(answer, steps=steps).text


def preference_pairs(
  seed: int, count: int, split: str = "train", start: int = 0
) -> list[tuple[list[Message], str, str]]:
  """Pairs (messages, chosen, rejected), number `start` and on, on prompts of the split, without ties.

  One third of the pairs have two independent random answers, one third differ in one quality, and
  one third have the best answer and a random one. In SPOILT_SHARE of all pairs the second answer is
  a spoilt copy of the first.
  """
  pairs = []
  for i, row in enumerate(generator.rows(Preference(), split, seed, start, count), start):
    rng = make_rng(seed, "preference_pairs", split, i)
    prompt = prompt_messages(row)
    verb, thing = read_request(prompt)
    pair = None
    while pair is None:
      first = best_answer(prompt) if i % 3 == 2 else _any_answer(verb, thing, rng)
      second = _one_change(first, rng) if i % 3 == 1 else _any_answer(verb, thing, rng)
      text = _spoilt(first, rng) if rng.random() < SPOILT_SHARE else second.text
      pair = _ordered(prompt, first.text, text)
    pairs.append((prompt, *pair))
  return pairs


def _ordered(prompt: Prompt, first: str, second: str) -> tuple[str, str] | None:
  """(better, worse); None if they are equally good."""
  quality_1, quality_2 = gold_quality(prompt, first), gold_quality(prompt, second)
  if quality_1 == quality_2:
    return None
  return (first, second) if quality_1 > quality_2 else (second, first)
