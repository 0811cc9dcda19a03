"""Instruction following: a short text under two or three checkable constraints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.generated import generator
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("keep", "maybe", error_rate=0.6)
THREE_CONSTRAINTS_SHARE = 0.15
FORGOTTEN = "none"  # The thought's note for a constraint that the answer will ignore.

TOPICS = {  # Topic -> its usual adjective, and an alternative.
  "sea": ("blue", "deep"),
  "fire": ("hot", "red"),
  "snow": ("cold", "white"),
  "night": ("dark", "long"),
  "bread": ("warm", "soft"),
  "rock": ("hard", "old"),
  "wind": ("wild", "cool"),
  "music": ("loud", "sweet"),
}
WORDS = ("moon", "lamp", "boat", "leaf", "coin", "bell", "kite", "drum")
ENDINGS = ("that is all", "so it goes", "we rest now")
PLACEHOLDERS = ("[name]", "[place]")
POSTSCRIPT = "P.S. thanks"
SHORTEST = 3  # Words in the text when there are no constraints.


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of constraint: how the prompt asks for it, and how a thought notes it."""

  id: str
  # One letter for each part of the answer that the constraint fixes: s start, e end, b body,
  # a adjective, k keyword, p comma, h placeholder, c letter case, w words with a case of their own.
  # Two constraints of one prompt conflict if they share a letter other than w, or if one of them has
  # c and one has w.
  claims: str
  ask: str  # The prompt's line; {} stands for the value.
  values: Callable[[str], tuple[Any, ...]]  # topic -> the values to draw from.
  arguments: Callable[[Any], dict[str, Any]]  # value -> the arguments of the checker.
  # (value, topic) -> the thought's note, in the words of the answer: when right, and when it errs.
  note: Callable[[Any, str], str]
  wrong: Callable[[Any, str], str] = lambda value, topic: FORGOTTEN


def _any_of(*values: Any) -> Callable[[str], tuple[Any, ...]]:
  return lambda topic: values


def _says(text: str) -> Callable[[Any, str], str]:
  return lambda value, topic: text


def _named(name: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
  return lambda value: {name: value, **more}


def _nothing(value: Any) -> dict[str, Any]:
  del value
  return {}


ANY = _any_of(None)
KINDS = {
  kind.id: kind
  for kind in (
    Kind("keywords:existence", "kw", "Include the word {}.", _any_of(*WORDS),
         lambda x: {"keywords": [x]}, lambda x, _: f"use {x}"),
    Kind("keywords:forbidden_words", "a", "Do not use the word {}.",
         lambda topic: TOPICS[topic][:1], lambda x: {"forbidden_words": [x]},
         lambda x, topic: f"say {TOPICS[topic][1]}", lambda x, _: f"say {x}"),
    Kind("length_constraints:number_words", "b", "Use at least {} words.", _any_of(5, 6, 7),
         _named("num_words", relation="at least"),
         lambda x, _: " ".join(["very"] * (x - SHORTEST))),
    Kind("change_case:english_lowercase", "c", "Use small letters only.", ANY, _nothing,
         _says("small")),
    Kind("change_case:english_capital", "c", "Use capital letters only.", ANY, _nothing,
         _says("capital")),
    Kind("startend:end_checker", "ew", "End with the phrase {}.", _any_of(*ENDINGS),
         _named("end_phrase"), lambda x, _: f"end {x}"),
    Kind("startend:quotation", "seb", "Use double quotation marks.", ANY, _nothing,
         _says("quote")),
    Kind("punctuation:no_comma", "p", "Use no commas.", ANY, _nothing, _says("plain"),
         _says("comma")),
    Kind("detectable_format:title", "s", "Add a title in angular brackets.", ANY, _nothing,
         _says("title")),
    Kind("detectable_format:number_bullet_lists", "b", "Use exactly {} bullets.", _any_of(2, 3),
         _named("num_bullets"), lambda x, _: " ".join("*" * x),
         lambda x, _: " ".join("*" * (x - 1))),
    Kind("detectable_format:number_highlighted_sections", "b", "Highlight a word.", ANY,
         lambda _: {"num_highlights": 1}, _says("*is*")),
    Kind("detectable_content:number_placeholders", "hw", "Use at least {} placeholders.",
         _any_of(1, 2), _named("num_placeholders"), lambda x, _: " ".join(PLACEHOLDERS[:x]),
         lambda x, _: " ".join(PLACEHOLDERS[: x - 1]) or FORGOTTEN),
    Kind("detectable_content:postscript", "ew", "Add a postscript.", ANY,
         lambda _: {"postscript_marker": "P.S."}, _says(POSTSCRIPT)),
    Kind("first_word:first_word_answer", "sw", "Start with the word {}.", _any_of(*WORDS),
         _named("first_word"), lambda x, _: f"first {x}"),
    Kind("last_word:last_word_answer", "ew", "Stop with the word {}.", _any_of(*WORDS),
         _named("last_word"), lambda x, _: f"last {x}"),
  )
}  # fmt: skip


def _clash(a: Kind, b: Kind) -> bool:
  both = a.claims + b.claims
  return bool(set(a.claims) & set(b.claims) - {"w"}) or ("c" in both and "w" in both)


def _in_peace(count: int) -> list[tuple[Kind, ...]]:
  """All sets of `count` kinds without a conflict."""
  return [
    kinds
    for kinds in itertools.combinations(KINDS.values(), count)
    if not any(_clash(*pair) for pair in itertools.combinations(kinds, 2))
  ]


def _asked(kind: Kind) -> str:
  """The fixed start of a kind's line, as a phrase.

  It ends in a space before a number, but not before a word, whose own token includes the space.
  """
  return kind.ask.partition("{}" if kind.values("sea")[0] in range(10) else " {}")[0]


SETS = {count: _in_peace(count) for count in (2, 3)}


@dataclasses.dataclass
class Instruction(generator.Generator):
  """Each thought notes what one constraint asks for; the answer is composed from the notes."""

  name: str = "instruction"
  style: generator.Style = STYLE
  phrases: tuple[str, ...] = (
    "Write about", *dict.fromkeys(_asked(kind) for kind in KINDS.values()),
    " words.", " placeholders.", " bullets.", "<<", ">>",
    *(f" {text}" for text in (*ENDINGS, *PLACEHOLDERS, POSTSCRIPT, "*is*", "*IS*")),
  )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    topic = str(rng.choice(list(TOPICS)))
    sets = SETS[2 + int(rng.random() < THREE_CONSTRAINTS_SHARE)]
    kinds = sets[int(rng.integers(len(sets)))]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    drawn = []
    for kind in kinds:
      values = kind.values(topic)
      drawn.append(values[int(rng.integers(len(values)))])
    lines = [kind.ask.format(value) for kind, value in zip(kinds, drawn, strict=True)]
    prompt = "\n".join([f"Write about {topic}.", *lines])
    return make_prompt(
      self.name, prompt, prompt=prompt, topic=topic,
      instruction_id_list=[kind.id for kind in kinds],
      kwargs=[kind.arguments(value) for kind, value in zip(kinds, drawn, strict=True)],
    )  # fmt: skip

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    topic, notes, thoughts = row["topic"], {}, []
    for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
      kind, value = KINDS[name], _value(arguments)
      marker, errs = self.style.draw(rng)
      notes[name] = (kind.wrong if errs else kind.note)(value, topic)
      thoughts.append(f"{marker} {notes[name]}")
    return [generator.assistant(compose(topic, notes), thoughts=thoughts if thinking else None)]


def _value(arguments: dict[str, Any]) -> Any:
  """The argument that the prompts of this domain vary; None if there is none."""
  value = next(iter(arguments.values()), None)
  return value[0] if isinstance(value, list) else value


def compose(topic: str, notes: dict[str, str]) -> str:
  """Writes the answer that follows from the notes, right or wrong.

  Args:
    notes: instruction id -> the thought's note.
  """

  def noted(name: str, default: str = "") -> str:
    note = notes.get(name, default)
    return default if note == FORGOTTEN else note

  adjective = noted("keywords:forbidden_words", f"say {TOPICS[topic][0]}").removeprefix("say ")
  subject = topic.capitalize() + ("," if noted("punctuation:no_comma") == "comma" else "")
  if bullets := noted("detectable_format:number_bullet_lists"):
    parts = [subject, adjective, "good"][: len(bullets.split())]
    body = "\n".join(f"* {part}" for part in parts)
  else:
    verb = noted("detectable_format:number_highlighted_sections", "is")
    very = noted("length_constraints:number_words")
    body = " ".join(filter(None, [subject, verb, very, adjective]))
  words = (
    noted("first_word:first_word_answer").removeprefix("first "),
    body,
    noted("keywords:existence").removeprefix("use "),
    noted("detectable_content:number_placeholders"),
    noted("startend:end_checker").removeprefix("end "),
    noted("last_word:last_word_answer").removeprefix("last "),
    noted("detectable_content:postscript"),
  )
  # The bullets start on a new line if something precedes them.
  first, rest = words[0], " ".join(filter(None, words[1:]))
  text = (first + ("\n" if bullets else " ") if first else "") + rest
  if noted("detectable_format:title"):
    text = f"<<{topic}>>\n{text}"
  if noted("startend:quotation"):
    text = f'"{text}"'
  if noted("change_case:english_lowercase"):
    text = text.lower()
  return text.upper() if noted("change_case:english_capital") else text
