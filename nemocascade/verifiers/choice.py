"""Extracts the chosen option of a multiple-choice question, as NeMo Gym's servers `mcqa` and `swerl_llm_judge` do."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.sandbox import limited
from nemocascade.verifiers import patterns
from nemocascade.verifiers.boxed import last_boxed, last_tagged

MODES = (
  "strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon", "lenient_answer_colon_md",
  "strict", "lenient",  # Of swerl_llm_judge: the letter stands in a <solution> tag.
)  # fmt: skip
Options = Mapping[str, str]  # Capital letter -> the option's text.

_LETTER_ALONE = re.compile(r"[^A-Za-z]*([A-Z])[^A-Za-z]*")
_LETTER_AND_LABEL = re.compile(r"([A-Z])\s*[:).\-]")
_AFTER_ANSWER = re.compile(r"answer\s*:\s*(.+)", re.IGNORECASE)
_AFTER_MARKED_ANSWER = re.compile(r"[*_]{0,2}answer[*_]{0,2}\s*:[*_\s]{0,2}(.+)", re.IGNORECASE | re.MULTILINE)
_SINGLE_LETTER = re.compile(r"(?<![A-Za-z])([A-Za-z])(?![A-Za-z])")
_BETWEEN_CHOICES = re.compile(r"\s*[/|&,;]\s*|\s+(?:or|and)\s+|\s+", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"([A-Za-z])(?![A-Za-z0-9])")
_CAPITAL_WORD = re.compile(r"\b[A-Z]\b")
_SOLUTION_LETTER = re.compile(r"<solution>\s*\[?([A-Za-z])\]?\s*</solution>")
_WRAP = "\\text{"
# Option letters in the Arabic and Bengali translations of MMLU.
_LOCAL_LETTERS = str.maketrans({"أ": " A", "ب": " B", "ج": " C", "د": " D",
                                "অ": " A", "ব": " B", "ড": " C", "ঢ": " D"})  # fmt: skip


def options_of(row: Mapping[str, Any]) -> Options:
  """The row's options by capital letter; options without a text are dropped."""
  return {
    letter.upper(): str(text)
    for option in row.get("options") or ()
    for letter, text in option.items()
    if len(letter) == 1 and letter.isalpha() and text is not None
  }


def chosen(text: str, options: Options, mode: str, template: Mapping[str, Any]) -> str | None:
  """The letter that the text chooses, or None if it chooses none.

  Args:
    mode: one of MODES.
    template: the row's `template_metadata`. `output_regex` (one pattern or a list) is tried before
      the mode. `answer_prefix` is an alternative to `Answer:`, used in `lenient_answer_colon_md`
      only.

  Raises:
    limited.NoAnswer: a pattern or the prefix of the row exceeded the time limit.
    ValueError: a pattern of the row has more than one group.
  """
  text = text.strip()
  letter = _by_patterns(text, options, template.get("output_regex"))
  if letter is not None:
    return letter
  if mode == "strict_single_letter_boxed":
    return _boxed_letter(text, options)
  if mode == "lenient_boxed":
    return _boxed_letter(text, options) or _boxed_text(text, options)
  if mode in ("strict", "lenient"):
    return _in_solution(text, options, strict=mode == "strict")
  if mode == "lenient_answer_colon":
    return _after_colon(text, options)
  prefix = template.get("answer_prefix")
  if not prefix:
    return after_any_colon(text, options, None)
  # A prefix may occur many times in one long line, and all that follows each one is read.
  return limited.call(after_any_colon, text, options, prefix) or _boxed_letter(text, options)


def _by_patterns(text: str, options: Options, given: str | Sequence[str] | None) -> str | None:
  """The letter found by the first pattern that yields one, even if no option has that letter."""
  for pattern in [given] if isinstance(given, str) else given or ():
    try:
      found = patterns.last_match(pattern, text)
    except patterns.BadPattern:
      continue
    if found is None:
      continue
    if len(found) > 1:
      raise ValueError(f"output_regex {pattern!r} has {len(found)} groups, not one")
    captured = _localized(found[0]).upper()
    if len(captured) == 1 and captured.isalpha():
      return captured
    for letter, option in options.items():
      if _plain(option) == _plain(captured):
        return letter
  return None


def _in_solution(text: str, options: Options, *, strict: bool) -> str | None:
  """The letter in the first tag that holds nothing else; or, not strict, the first lone letter in the last tag."""
  if strict:
    match = _SOLUTION_LETTER.search(text)
  else:
    match = _SINGLE_LETTER.search(last_tagged(text, "solution", any_case=True) or "")
  return match[1].upper() if match and match[1].upper() in options else None


def _boxed_letter(text: str, options: Options) -> str | None:
  inner = last_boxed(text)
  if inner is None:
    return None
  inner = _unwrapped(inner)
  match = _LETTER_ALONE.fullmatch(inner) or _LETTER_AND_LABEL.match(inner)
  return match[1] if match and match[1] in options else None


def _boxed_text(text: str, options: Options) -> str | None:
  """The letter of the option whose text appears in the box; None unless exactly one does."""
  inner = last_boxed(text)
  if inner is None:
    return None
  held = (_plain(inner), _plain(_unwrapped(inner)))
  found = [
    letter for letter, option in options.items()
    if _plain(option) and any(_plain(option) in one for one in held)
  ]  # fmt: skip
  return found[0] if len(found) == 1 else None


def _after_colon(text: str, options: Options) -> str | None:
  """The option after the first `Answer:`, given as its letter or as its full text."""
  match = _AFTER_ANSWER.search(text)
  if match is None:
    return None
  answer = _unwrapped(match[1]).strip()
  if answer.upper() in options:
    return answer.upper()
  return next((letter for letter in options if _plain(options[letter]) == _plain(answer)), None)


def after_any_colon(text: str, options: Options, prefix: str | None) -> str | None:
  """The letter after the last `Answer:` or `prefix` that is followed by one.

  `Answer` may be set in Markdown emphasis.
  """
  text = unicodedata.normalize("NFKC", text)
  found = [(match.start(), match[1]) for match in _AFTER_MARKED_ANSWER.finditer(text)]
  if prefix:
    pattern = re.escape(unicodedata.normalize("NFKC", prefix)) + r"\s*"
    for match in re.finditer(pattern, text, re.IGNORECASE):
      found.append((match.start(), text[match.end() :].split("\n", 1)[0]))
  for _, answer in sorted(found, key=lambda item: item[0], reverse=True):
    if letter := _letter_in(answer, options):
      return letter
  return None


def _letter_in(answer: str, options: Options) -> str | None:
  """The letter at the start of the answer, else the last capital letter that is a word by itself."""
  answer = _localized(answer).strip("*_` \t\n\r.,;:")
  if _lists_choices(answer, options):
    return None
  if len(answer) == 1:
    letter = answer
  elif match := _LEADING_LETTER.match(answer):
    letter = match[1]
  else:
    letter = (_CAPITAL_WORD.findall(answer) or [""])[-1]
  return letter.upper() if letter.upper() in options else None


def _lists_choices(answer: str, options: Options) -> bool:
  """Whether two different option letters are adjacent, as in `A or B`."""
  letters = [m for m in _SINGLE_LETTER.finditer(answer) if m[1].upper() in options]
  return any(
    a[1].upper() != b[1].upper() and _BETWEEN_CHOICES.fullmatch(answer[a.end() : b.start()])
    for a, b in zip(letters, letters[1:])
  )


def _unwrapped(text: str) -> str:
  """Strips every \\text{...} that wraps the whole text."""
  text = text.strip()
  while text.startswith(_WRAP) and text.endswith("}"):
    text = text[len(_WRAP) : -1].strip()
  return text


def _plain(text: str) -> str:
  return " ".join(text.lower().split())


def _localized(text: str) -> str:
  return unicodedata.normalize("NFKC", text).translate(_LOCAL_LETTERS).strip()
