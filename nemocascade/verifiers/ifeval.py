"""Checkers of IFEval's instructions and of those that IFBench's training set adds.

Ids and rules are those of instruction_following_eval (arXiv 2311.07911) and of IFBench's training
set (arXiv 2507.02833). Odd rules are kept, because models are trained and measured by them. Every
checker takes time linear in the text, because a policy may write anything.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable

from nemocascade.verifiers import sentences

Checker = Callable[..., bool]  # (text, **arguments) -> whether the text follows the instruction.

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
  "at least": lambda count, n: count >= n,
  "at most": lambda count, n: count <= n,
  "less than": lambda count, n: count < n,
  "more than": lambda count, n: count > n,
  "exactly": lambda count, n: count == n,
}


def compare(count: int, n: int, relation: str) -> bool:
  return COMPARISONS[relation](count, n)


def _occurrences(text: str, part: str) -> int:
  """Counts a keyword anywhere, also inside words, ignoring case."""
  return len(re.findall(re.escape(part.strip()), text, re.IGNORECASE))


def whole_words(text: str, word: str) -> int:
  """Counts a word between word boundaries, ignoring case."""
  return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _one(value: str | list[str]) -> str:
  """Unwraps a word that a row may give as a list with one element."""
  return (value if isinstance(value, str) else value[0]).strip()


# ---- keywords, letters


def existence(text: str, *, keywords: list[str]) -> bool:
  return all(_occurrences(text, word) for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str = "at least") -> bool:
  return compare(_occurrences(text, keyword), frequency, relation)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
  return not any(whole_words(text, word) for word in forbidden_words)


def exclude_word_harder(text: str, *, keyword: str) -> bool:
  """The keyword does not appear between two spaces. Case matters."""
  return f" {keyword.strip()} " not in text


def word_once(text: str, *, keyword: str) -> bool:
  return _occurrences(text, keyword) == 1


def count_increment_word(text: str, *, keyword1: str, keyword2: str) -> bool:
  return _occurrences(text, keyword1) == 1 and _occurrences(text, keyword2) == 2


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
  return compare(text.lower().count(letter.lower()), let_frequency, let_relation)


def letter_counting(text: str, *, N: int, relation: str = "at least") -> bool:
  return compare(len(re.findall("[a-zA-Z]", text)), N, relation)


def start_end(text: str) -> bool:
  """The first word equals the last, ignoring case and punctuation around them."""
  bare = (re.sub(r"^[\W_]+|[\W_]+$", "", token.lower()) for token in sentences.tokens(text))
  words = [word for word in bare if word]
  return len(words) > 1 and words[0] == words[-1]


def palindrome(text: str) -> bool:
  """Some word is a palindrome. Words are split at whitespace, and a single letter counts."""
  return any(word == word[::-1] for word in text.split())


def keyword_specific_position(text: str, *, keyword: str, n: int, m: int) -> bool:
  """The keyword is the m-th token of the n-th sentence."""
  found = sentences.by_rules(text)
  tokens = sentences.tokens(found[n - 1]) if 1 <= n <= len(found) else []
  return 1 <= m <= len(tokens) and tokens[m - 1] == _one(keyword)


def no_adjacent_consecutive(text: str) -> bool:
  """No two adjacent words have initials that are consecutive in the alphabet."""
  firsts = [word[0].lower() for word in text.split()]
  if len(firsts) > 1 and any(len(first) != 1 for first in firsts):
    return False
  return all(ord(b) - ord(a) != 1 for a, b in itertools.pairwise(firsts))


# ---- lengths and counts


def number_words(text: str, *, num_words: int, relation: str = "at least") -> bool:
  return compare(len(sentences.words(text)), num_words, relation)


def number_sentences(text: str, *, num_sentences: int, relation: str = "at least") -> bool:
  return compare(len(sentences.punkt(text)), num_sentences, relation)


def _paragraphs(text: str, divider: str) -> int | None:
  """Counts paragraphs; None if an inner one is empty. A divider at either end adds none."""
  pieces = [piece.strip() for piece in text.split(divider)]
  if not all(pieces[1:-1]):
    return None
  return len(pieces) - (not pieces[0]) - (len(pieces) > 1 and not pieces[-1])


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
  return _paragraphs(text, "***") == num_paragraphs


def two_paragraphs(divider: str) -> Checker:
  return lambda text: _paragraphs(text, divider) == 2


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
  """Checks the number of paragraphs and the first word of the n-th.

  Empty paragraphs count for the position n, but not for the number.
  """
  pieces = [piece.strip() for piece in text.split("\n\n")]
  count = sum(map(bool, pieces))
  if not 1 <= nth_paragraph <= count or not pieces[nth_paragraph - 1]:
    return False
  word = pieces[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
  return count == num_paragraphs and re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def count_unique(text: str) -> bool:
  """No token is repeated. Punctuation marks are tokens too."""
  tokens = sentences.tokens(text)
  return len(tokens) == len(set(tokens))


def counting_composition(text: str, *, n_sent: int, n_words: int) -> bool:
  """Three paragraphs separated by ***, each of n_sent sentences of n_words tokens."""
  pieces = text.split("***")
  return len(pieces) == 3 and all(
    len(found) == n_sent and all(len(sentences.tokens(s)) == n_words for s in found)
    for found in map(sentences.by_rules, pieces)
  )


# ---- case


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str = "at least") -> bool:
  count = sum(token.isupper() for token in sentences.tokens(text))
  return compare(count, capital_frequency, capital_relation)


def lowercase_counting(text: str, *, N: int) -> bool:
  return len(re.findall(r"\b[a-z]+\b", text)) <= N


# ---- beginnings and ends


def end_checker(text: str, *, end_phrase: str) -> bool:
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


def first_word_answer(text: str, *, first_word: str) -> bool:
  return text.split()[0].lower() == _one(first_word).lower()


def _last_word(text: str) -> str:
  return re.sub(r"[^\w\s]", "", text.split()[-1]).lower()


def last_word_answer(text: str, *, last_word: str) -> bool:
  return _last_word(text) == _one(last_word).lower()


def first_word_sent(text: str, *, first_word: str) -> bool:
  found = sentences.by_rules(text)
  return all(found) and all(first_word_answer(s, first_word=first_word) for s in found)


def last_word_sent(text: str, *, last_word: str) -> bool:
  found = sentences.by_rules(text)
  return all(found) and all(last_word_answer(s, last_word=last_word) for s in found)


# ---- copies


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def copying(text: str, *, prompt_to_repeat: str) -> bool:
  return text.strip().lower() == prompt_to_repeat.strip().lower()


def copying_multiple(text: str, *, prompt_to_repeat: str, N: int) -> bool:
  pieces = text.split("******")
  return len(pieces) == N and all(copying(p, prompt_to_repeat=prompt_to_repeat) for p in pieces)


def copy_span_idx(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
  return copying(text, prompt_to_repeat=prompt_to_repeat[n_start:n_end])


def repeat_phrase(text: str, *, phrase: str, small_n: int) -> bool:
  """The phrase appears small_n times, each with at most one changed word, the last with exactly one.

  A span from the phrase's first word to its last counts as an appearance.
  """
  words = phrase.split()
  found = [span.split() for line in text.split("\n") for span in _spans(line, words[0], words[-1])]
  changes = [sum(a != b for a, b in zip(one, words)) if len(one) <= len(words) else 2 for one in found]
  return len(found) == small_n and max(changes) < 2 and changes[-1] == 1


def _spans(line: str, first: str, last: str) -> list[str]:
  """The shortest spans from `first ` to ` last`, without overlap, from left to right."""
  found, place = [], 0
  while (start := line.find(f"{first} ", place)) >= 0:
    end = line.find(f" {last}", start + len(first) + 1)
    if end < 0:
      break
    place = end + len(last) + 1
    found.append(line[start:place])
  return found


def two_responses(text: str) -> bool:
  pieces = [piece.strip() for piece in text.split("******")]
  given = [piece for piece in pieces if piece]
  return all(pieces[1:-1]) and len(given) == 2 and given[0] != given[1]


# ---- formats


def title(text: str) -> bool:
  """Some line contains a nonempty <<...>>, from its first << to its last >>."""
  for line in text.split("\n"):
    start, end = line.find("<<"), line.rfind(">>")
    if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
      return True
  return False


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
  """Counts lines that begin with - or with a single *. After a lone *, the next line is its text."""
  lines = [line.lstrip() for line in text.split("\n")]
  count = sum(line.startswith("-") for line in lines)
  place = 0
  while place < len(lines):
    line = lines[place]
    alone = line == "*" and place + 1 < len(lines)
    count += alone or (line.startswith("*") and len(line) > 1 and line[1] != "*")
    place += 1 + alone
  return count == num_bullets


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
  """Whether there are enough highlights; *one* and **two** each count once."""
  single = re.findall(r"\*([^\n*]*)\*", text)
  double = re.findall(r"\*\*([^\n*]*)\*\*", text)
  return sum(bool(inside.strip()) for inside in single + double) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
  sections = re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)
  return len(sections) >= num_sections


def json_format(text: str) -> bool:
  text = text.strip()
  for fence in ("```json", "```Json", "```JSON", "```"):
    text = text.removeprefix(fence)
  try:
    json.loads(text.removesuffix("```").strip())
  except (ValueError, RecursionError):
    return False
  return True


def constrained_response(text: str) -> bool:
  return any(option in text for option in OPTIONS)


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
  """A placeholder reaches from a [ to the next ] in the same line."""
  return sum(map(_placeholders, text.split("\n"))) >= num_placeholders


def _placeholders(line: str) -> int:
  count, place = 0, 0
  while (start := line.find("[", place)) >= 0 and (end := line.find("]", start)) >= 0:
    count, place = count + 1, end + 1
  return count


def postscript(text: str, *, postscript_marker: str = "P.S.") -> bool:
  marker = postscript_marker.strip()
  spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}  # Their letters may be spaced.
  return bool(re.search(spaced.get(marker, re.escape(marker.lower())), text.lower()))


def square_brackets(text: str) -> bool:
  return all(word.startswith("[") and word.endswith("]") for word in text.split())


def bigram_wrapping(text: str) -> bool:
  """Every pair of words is wrapped: <<Two words>> <<each time>>. An odd last word is not checked."""
  words = text.split()
  pairs = zip(words[::2], words[1::2])
  return all(a.startswith("<<") and b.endswith(">>") for a, b in pairs)


def sentence_hyphens(text: str) -> bool:
  """Sentences are joined by hyphens without spaces."""
  expected = sentences.by_rules(text.replace("-", " "))
  return all(a == a.strip() == b for a, b in zip(text.split("-"), expected))


def response_language(text: str, *, language: str) -> bool:
  """Checks the language by langdetect, with a fixed seed.

  A text without a detectable language, such as digits alone, passes for any language.
  """
  detect, unsure = _langdetect()
  try:
    return detect(text) == language
  except unsure:
    return True


@functools.cache
def _langdetect():
  import langdetect

  langdetect.DetectorFactory.seed = 0
  return langdetect.detect, langdetect.LangDetectException


def without(*chars: str) -> Checker:
  return lambda text: not any(char in text for char in chars)
