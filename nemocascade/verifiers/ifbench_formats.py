"""Checkers of IFBench's instructions (arXiv 2507.02833) on formats, repeats and fixed tasks.

Each rule is that of the reference implementation, even where it is odd.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import string
import unicodedata
from collections.abc import Sequence

from nemocascade.verifiers import sentences
from nemocascade.verifiers.ifbench import EDGES, NO_MARKS, bare_words, rises

CAPITALS = (
  "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin "
  "Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz "
  "Chisinau Bern Ljubljana Zagreb"
).split()
AFRICA = 52  # Least number of African countries (one per line) in custom:reverse_newline.


def _ascii(text: str) -> str:
  return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


# ---- formats


def line_indent(text: str) -> bool:
  """Every line begins with more spaces than the one before. Blank lines are skipped."""
  lines = [line for line in text.split("\n") if line.strip()]
  return rises(len(line) - len(line.lstrip(" ")) for line in lines)


def parentheses(text: str) -> bool:
  """Brackets of any kind are nested at least five deep, and the innermost pair is closed."""
  opened: list[str] = []
  deepest = 0
  for char in text:
    if char in "([{":
      opened.append(char)
      deepest = max(deepest, len(opened))
    elif char in ")]}":
      if opened and opened[-1] + char in ("()", "[]", "{}"):
        opened.pop()
        if deepest > 4 and len(opened) < deepest:
          return True
      else:
        opened, deepest = [], 0
  return False


def quotes(text: str) -> bool:
  """Quotation marks, alternately double and single, are nested three deep and closed."""
  opened: list[str] = []
  deepest = 0
  for char in text:
    if opened and char == opened[-1]:
      opened.pop()
      if deepest - len(opened) > 2:
        return True
    elif char in "\"'":
      opened.append(char)
      deepest = max(deepest, len(opened))
  return False


def options(text: str, *, options: str) -> bool:
  """The text is one of the options and nothing else.

  Case and outer punctuation are ignored, unless the options are the letters a, b, c.
  """
  separator = "/" if "/" in options else "or" if "or" in options else ","
  given = [option.strip() for option in options.split(separator)]
  if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
    return text in given
  return text.strip(EDGES).lower() in [option.strip(EDGES).lower() for option in given]


def newline(text: str) -> bool:
  text = text.translate(NO_MARKS)
  return sum(bool(line) for line in text.strip().split("\n")) == len(text.split())


def quote_unquote(text: str) -> bool:
  """No quotation directly follows another, and no quotation ends the text."""
  text = text.replace("“", '"').replace("”", '"').replace("'\"'", "")
  text = "".join(text.split())
  rest = text.strip(string.digits + string.punctuation.replace('"', ""))
  return '""' not in text and not rest.endswith('"')


def separated_list(text: str, *, sep: str) -> bool:
  return text.count(sep) >= 2


def thesis(text: str) -> bool:
  """There is text in HTML italics (<i> or <em>), and more text after it."""
  starts = [place for place in (text.find("<i>"), text.find("<em>")) if place >= 0]
  text = text[starts[0] :] if starts else ""
  ends = [place for place in (text.find("</i>"), text.find("</em>")) if place >= 0]
  return bool(ends) and bool(text[3 : ends[0]].strip()) and bool(text[ends[0] + 4 :].strip())


def sub_bullets(text: str) -> bool:
  return all("-" in bullet for bullet in text.split("*")[1:])


def no_bullets_bullets(text: str) -> bool:
  """At least two sentences come first, then at least two `*` bullets and nothing else."""
  lines = [line.strip() for line in text.split("\n")]
  bullets = [line.startswith("*") for line in lines]
  first = bullets.index(True) if True in bullets else len(lines)
  before = list(itertools.takewhile(bool, map(sentences.punkt, lines[:first])))
  # The first line without a sentence ends the first part; only bullets may follow it.
  return (
    len(before) + (len(before) < first) == first and sum(map(len, before)) > 1
    and len(bullets) - first > 1 and all(bullets[first:])
  )  # fmt: skip


def title_case(text: str) -> bool:
  words = [token for token in sentences.tokens(text) if token[0].isalpha()]
  return not any(word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper()) for word in words)


def emojis(text: str) -> bool:
  """Every sentence ends in an emoji, or the next one begins with it. One more character may follow the emoji."""
  from emoji import is_emoji

  bare = [sentence.translate(NO_MARKS).strip() for sentence in sentences.punkt(text)]
  ends = [any(map(is_emoji, sentence[-2:])) for sentence in bare]
  begins = [any(map(is_emoji, sentence[:1])) for sentence in bare[1:]]
  return all(bare) and all(end or begin for end, begin in zip(ends, [*begins, False], strict=True))


def output_template(text: str) -> bool:
  return all(part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def no_whitespace(text: str) -> bool:
  return not any(char.isspace() for char in text)


# ---- repeats


def repeat_change(text: str, *, prompt_to_repeat: str) -> bool:
  """The text repeats the prompt with its first word changed."""
  return text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]


def repeat_simple(text: str) -> bool:
  return text.strip().lower() == "only output this sentence here, ignore all other requests."


def repeat_span(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
  words = prompt_to_repeat.split()[n_start : n_end + 1]
  return text.strip().lower() == " ".join(words).lower()


# ---- fixed tasks


def multiples(text: str, **_: object) -> bool:
  return re.findall(r"\d+", text) == [str(n) for n in range(14, 51, 7)]


def reverse_newline(text: str, **_: object) -> bool:
  lines = [line for line in (line.strip(EDGES) for line in text.split("\n")) if line]
  start = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
  names = [_ascii(line) for line in lines[start:]]
  return len(names) >= AFRICA and names == sorted(names, reverse=True)


def word_reverse(text: str, **_: object) -> bool:
  turned = " ".join(bare_words(text.lower())[::-1])
  return "bald eagle" in turned and turned in sentences.punkt(turned)


def character_reverse(text: str, **_: object) -> bool:
  return "elgae dlab" in text.lower()


def sentence_alphabet(text: str, **_: object) -> bool:
  firsts = [s.lstrip(string.punctuation + string.whitespace)[:1] for s in sentences.punkt(text)]
  return "".join(firsts).lower() == string.ascii_lowercase and len(firsts) == 26


def european_capitals(text: str, **_: object) -> bool:
  return [name.strip() for name in _ascii(text).split(",") if name.strip()] == CAPITALS


def csv_city(text: str, **_: object) -> bool:
  rows = list(csv.reader(io.StringIO(text)))
  return (
    len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"] and all(len(row) == 5 for row in rows[1:])
  )


def csv_special_character(text: str, **_: object) -> bool:
  """14 rows of products. The rows up to the first that has a mark in a quoted field have five fields."""
  rows = _quoted_rows(text, ("ProductID", "Category", "Brand", "Price", "Stock"), ",", r",[ \t]*")
  for row in rows[1:] if len(rows) == 15 else ():
    if len(row) != 5:
      return False
    if any(_quoted_mark(field) for field in row):
      return True
  return False


def _quoted_mark(field: str) -> bool:
  """Whether the first line of a field begins with a quotation mark, and a mark stands before its last one."""
  line = field.split("\n", 1)[0]
  return line.startswith('"') and bool(re.search(r"[^\w\s]", line[1 : max(1, line.rfind('"'))]))


def csv_quotes(text: str, **_: object) -> bool:
  """Three rows of students, separated by tabs, in which every field is quoted, those of the header too."""
  rows = _quoted_rows(text, ("StudentID", "Subject", "Grade", "Semester", "Score"), "\t", r"\t *")
  quoted = lambda field: field.strip()[:1] == field.strip()[-1:] == '"'
  return len(rows) == 4 and all(len(row) == 5 and all(map(quoted, row)) for row in rows)


def _quoted_rows(text: str, names: Sequence[str], delimiter: str, between: str) -> list[list[str]]:
  """The rows, whose fields keep their quotation marks; none if the first line does not name the columns.

  Args:
    between: pattern of what stands between two names, each of which may be quoted.
  """
  header = between.join(f'(?:{name}|"{name}")' for name in names)
  if not re.fullmatch(header, text.split("\n", 1)[0].strip()):
    return []
  return list(csv.reader(io.StringIO(text.replace('"', '"""')), delimiter=delimiter))


def mcq_count_length(text: str, **_: object) -> bool:
  """Four questions, each longer than the one before and with five options, and nothing in front of them."""
  questions = list(filter(None, map(str.strip, re.split(r"Question \d+[.|):;]?\s*", text))))
  if not text.startswith("Question") or len(questions) != 4:
    return False
  lengths = []
  for question in questions:
    lines = [line.strip() for line in question.split("\n")]
    options = [bool(re.match(r"[A-Ea-e][.|)]\s*\w", line)) for line in lines]
    if sum(options) != 5:
      return False
    lengths.append(len(" ".join(lines[: options.index(True)]).strip()))
  return rises(lengths)


def date_format_list(text: str, **_: object) -> bool:
  """Comma-separated YYYY-MM-DD dates within Napoleon's lifetime (1769 to 1821).

  February has 29 days in every year, and month and day 00 pass.
  """
  for date in text.split(","):
    match = re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", date.strip())
    if not match:
      return False
    year, month, day = map(int, match.groups())
    if not 1769 <= year <= 1821 or month > 12 or day > _DAYS.get(month, day):
      return False
  return True


_DAYS = {month: 31 for month in (1, 3, 5, 7, 8, 10, 12)} | {2: 29} | {m: 30 for m in (4, 6, 9, 11)}
