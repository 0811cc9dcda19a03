"""Mathematical equality by math-verify, in a separate process that is killed at a time limit."""

from __future__ import annotations

import functools
import re
from typing import Any

from nemocascade.sandbox import limited

LIMIT_S = 5.0  # Wall time of one comparison.
MAX_CHARS = 300  # A longer answer is wrong, unless at most 4 times as long as the expected one.
DEEPEST = 40  # Largest nesting of brackets; the parser is extremely slow beyond it.
MOST_SIDES = 8  # An equation with more sides is wrong.
DIGITS = 60  # Precision to which numbers are evaluated.
# Relative differences. Above FAR two numbers differ, below NEAR they are equal. Between the two,
# math-verify decides.
FAR, NEAR = 1e-4, 1e-40
SMALL = 1e-20  # Two numbers below this may both be 0, so math-verify decides.

_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
# Nested powers and huge factorials do not fit in memory. They are rejected without waiting for the
# time limit.
_HUGE = re.compile(r"\^\s*\{[^{}]*[\^!]|\^\s*\{?\s*\d{5,}|\d{4,}\s*!|!\s*!|\*\*")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_SEPARATOR = re.compile(r",|;|\\text\{\s*(?:,|and|or)\s*\}|\\(?:quad|qquad|lor|land)\b|\b(?:and|or)\b")
_DELIMITERS = re.compile(r"(?:\s|\\[()\[\]]|\$)+")
_APART = re.compile(rf"(?<=[\d.]){_DELIMITERS.pattern}(?=[\d.])")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:\s\d{3})+(?!\d)", re.ASCII)
_SPACING = re.compile(r"\\[,;:! ]|~|&")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}

# Names of the quantity that an equation gives: x, f(x), \angle ABC. A product or a power of unknowns
# is not a name: x^2 = 5 does not say that x is 5.
_LETTER = (
  r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa"
  r"|lambda|mu|nu|xi|pi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi"
  r"|Pi|Sigma|Phi|Psi|Omega|ell))"
)
_STYLE = (
  r"\\(?:text|mathrm|mathbf|mathit|mathcal|mathbb|boldsymbol|operatorname|overline|vec|hat|bar|tilde"
  r"|overrightarrow)"
)
_STYLED = rf"{_STYLE}\s*(?:\{{[^{{}}=]*\}}|\s[A-Za-z])"
_SUBSCRIPT = r"(?:'|_\w|_\{[^{}=]*\})*"
_SYMBOL = rf"(?:{_LETTER}|{_STYLED}|[A-Z]{{2,4}}|[A-Za-z]{{4,}}){_SUBSCRIPT}"
_ARGUMENTS = r"(?:\\left)?\((?:[^()=]|\([^()=]*\))*(?:\\right)?\)"
_FUNCTION = rf"(?:[fghpqduFGHPQEVSTAR]|{_STYLED}|\\(?:phi|varphi|psi|sigma|tau|pi|mu|Gamma|Phi))"
_APPLIED = rf"{_FUNCTION}{_SUBSCRIPT}\s*{_ARGUMENTS}"
_OF_FIGURE = r"(?:m\s*)?\\(?:angle|measuredangle|triangle)\s*[A-Za-z]{1,4}|\|[A-Z]{2}\||\[[A-Z]{3,}\]"
_NAME = rf"(?:{_APPLIED}|{_OF_FIGURE}|{_SYMBOL}|(?:sum|max|min))"
_NAMES = re.compile(rf"\s*(?:{_NAME}|(?:\\left)?\(\s*{_NAME}(?:\s*,\s*{_NAME})*\s*(?:\\right)?\))\s*")


def equal(expected: str, answer: str) -> bool | None:
  """Whether the answer equals the expected one; None if the expected one cannot be parsed.

  Raises:
    NoAnswer: the comparison exceeded LIMIT_S or its memory, or math-verify failed.
  """
  answer, expected = answer.strip(), expected.strip()
  if not answer or len(answer) > max(MAX_CHARS, 4 * len(expected)):
    return False
  if _undelimited(answer) == _undelimited(expected):
    return True
  if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(expected):
    return int(answer) == int(expected)
  if _HUGE.search(answer) and not _HUGE.search(expected) or max(_depths(answer)) > DEEPEST:
    return False
  return _ask(expected, answer)


def claims(expected: str, answer: str) -> list[tuple[str, str]] | None:
  """Pairs of sides of the answer's equations that must be equal for the answer to count.

  math-verify reads only the last side of an equation and would accept `26 = 25` for 25 and
  `x^2 = 5` for 5. So every other side must equal the last one; leading sides that are names of the
  sought quantity are exempt. If the expected answer is itself an equation, no pair is required.

  Returns:
    (last side, other side) pairs; None if an equation has an empty side or more than MOST_SIDES.
  """
  if _EQUALS.search(expected):
    return []
  pairs = []
  for part in _parts(_SPACING.sub(" ", answer)):
    *sides, last = _EQUALS.split(part)
    if len(sides) >= MOST_SIDES or sides and not last.strip():
      return None
    while sides and _NAMES.fullmatch(sides[0]):
      sides = sides[1:]
    pairs += [(last, side) for side in sides]
  return pairs if all(side.strip() for pair in pairs for side in pair) else None


def _parts(text: str) -> list[str]:
  """Splits the text at separators that are outside all brackets."""
  depths = _depths(text)
  cuts = [match.span() for match in _SEPARATOR.finditer(text) if depths[match.start()] == 0]
  starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
  return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _depths(text: str) -> list[int]:
  """The bracket depth at each character; \\{ counts as a bracket, as { does."""
  depth, depths = 0, []
  for sign in text:
    depths.append(depth)
    depth = max(0, depth + _BRACKETS.get(sign, 0))
  return depths


def _undelimited(text: str) -> str:
  """The text without whitespace and LaTeX math delimiters, except those that separate digits.

  Spaces that group the digits of one number by thousands are removed too: 10 000 is 10000, but 1 2 is not 12.
  """
  return _DELIMITERS.sub("", _APART.sub("\0", _GROUPED.sub(lambda number: "".join(number[0].split()), text)))


@functools.lru_cache(maxsize=1 << 16)
def _ask(expected: str, answer: str) -> bool | None:
  """The grading process's result, cached; a NoAnswer is not cached."""
  return limited.call(compare, expected, answer, limit_s=LIMIT_S)


# ---- runs in the grading process


def prepare() -> None:
  """Imports math-verify and replaces its expression parser, which would evaluate the text."""
  from math_verify import parser

  from nemocascade.verifiers import arithmetic

  arithmetic.stand_in_for_sympy()
  parser.parse_expr = arithmetic.parse


def compare(expected: str, answer: str) -> bool | None:
  """Whether math-verify accepts the answer and all of its `claims`; None as in `equal`."""
  pairs = claims(expected, answer)
  if pairs is None:
    return False
  truth = _parsed(_bare(expected)) or _parsed(expected, boxed=False)
  if not truth:
    return None
  return _same(truth, _parsed(answer)) and all(_same(_parsed(last), _parsed(side)) for last, side in pairs)


def _bare(text: str) -> str:
  """An expected answer without surrounding LaTeX delimiters, which math-verify cannot parse in a box."""
  for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
    if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
      text = text[len(opening) : -len(closing)].strip()
  return text


def _parsed(text: str, *, boxed: bool = True) -> list:
  import math_verify

  # math-verify's own time limit raises from a signal handler and can leave SymPy in a broken state.
  # The time limit of the process replaces it.
  return math_verify.parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=None)


def _same(truth: list, given: list) -> bool:
  import math_verify

  if not given:
    return False
  decided = _by_value(truth[0], given[0])
  if decided is not None:
    return decided
  return bool(math_verify.verify(truth, given, timeout_seconds=None))


def _by_value(truth: Any, given: Any) -> bool | None:
  """Whether two numbers are equal by their numeric values; None leaves it to math-verify.

  math-verify would expand expressions such as (2 - sqrt 3)^2016, which exceeds any time limit.
  Atoms, percentages and close values are left to it, because it may round them.
  """
  import sympy
  from math_verify.grader import is_atomic_or_pct_atomic

  sides = (truth, given)
  if not all(isinstance(side, sympy.Expr) and side.is_number for side in sides):
    return None
  plain = [is_atomic_or_pct_atomic(side, sympy.Number) for side in sides]
  if all(plain) or any(p and not side.is_Atom for p, side in zip(plain, sides, strict=True)):
    return None
  try:
    a, b = (_digits(side) for side in sides)
    apart, size = abs(a - b), max(abs(a), abs(b))
  except (TypeError, ValueError):  # No finite value, e.g. an expression of infinities.
    return None
  if size < SMALL or size * NEAR < apart <= size * FAR:
    return None
  return bool(apart <= size * NEAR)


def _digits(side: Any):
  """The mpmath value of a SymPy number, to DIGITS digits."""
  import mpmath

  with mpmath.workdps(DIGITS):
    return mpmath.mpmathify(side.evalf(DIGITS))
