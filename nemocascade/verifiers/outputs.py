"""Compares a program's output with the expected one: returned values, or lines of text.

The rules follow LiveCodeBench: integers and words must match exactly, and a tolerance applies only
if the expected number is fractional.
"""

import decimal
import math
import re
from typing import Any

VALUE_RELATIVE, VALUE_ABSOLUTE = 1e-5, 1e-8  # Tolerances of returned floats; they are added.
TEXT_TOLERANCE = decimal.Decimal("1e-6")  # Of printed numbers: absolute, but relative above 1.
DEEPEST = 50  # Values nested deeper are never equal.

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)


def same_value(expected: Any, given: Any, depth: int = 0) -> bool:
  """Whether plain values are equal. A tuple equals a list; True does not equal 1."""
  if depth > DEEPEST:
    return False
  if isinstance(expected, bool) or isinstance(given, bool):
    return expected is given
  if isinstance(expected, int | float) and isinstance(given, int | float):
    return expected == given or isinstance(expected, float) and _close(expected, given)
  if isinstance(expected, list | tuple) and isinstance(given, list | tuple):
    return len(expected) == len(given) and all(
      same_value(*pair, depth + 1) for pair in zip(expected, given, strict=True)
    )
  if isinstance(expected, dict) and isinstance(given, dict):
    return expected.keys() == given.keys() and all(same_value(expected[key], given[key], depth + 1) for key in expected)
  return type(expected) is type(given) and expected == given


def same_text(expected: str, given: str) -> bool:
  """Whether texts are equal line by line, ignoring whitespace around the text and each line.

  Lines of numbers are compared number by number, whatever their spacing and notation.
  """
  expected_lines, given_lines = _lines(expected), _lines(given)
  return len(expected_lines) == len(given_lines) and all(
    e == g or _same_numbers(e.split(), g.split()) for e, g in zip(expected_lines, given_lines, strict=True)
  )


def _lines(text: str) -> list[str]:
  return [line.strip() for line in text.strip().split("\n")]


def _same_numbers(expected: list[str], given: list[str]) -> bool:
  return len(expected) == len(given) and all(
    _NUMBER.fullmatch(e) and _NUMBER.fullmatch(g) and _same_number(e, g) for e, g in zip(expected, given, strict=True)
  )


def _same_number(expected: str, given: str) -> bool:
  e, g = decimal.Decimal(expected), decimal.Decimal(given)
  if e == g:
    return True
  if "." not in expected and "e" not in expected.lower():
    return False
  try:
    return abs(e - g) <= TEXT_TOLERANCE * max(abs(e), decimal.Decimal(1))
  except decimal.DecimalException:  # Outside the range of `decimal`.
    return False


def _close(expected: float, given: float) -> bool:
  try:
    return abs(expected - given) <= VALUE_ABSOLUTE + VALUE_RELATIVE * abs(expected) < math.inf
  except OverflowError:  # An integer too large for a float.
    return False
