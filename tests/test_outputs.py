"""When a program's output counts as equal to the expected one."""

import math

import pytest

from nemocascade.verifiers.outputs import same_text, same_value


@pytest.mark.parametrize(
  ("expected", "given", "same"),
  [
    (1, 1, True), (1, 1.0, True), (1, True, False), (True, 1, False), (True, True, True),
    (0, False, False), (0, None, False), (None, None, True), ("1", 1, False), ("a", "a", True),
    (10**30, 10**30, True), (10**30, 10**30 + 1, False), (10**400, 1.5, False),
    (0.1 + 0.2, 0.3, True), (1.0, 1.001, False), (1.0, math.nan, False), (math.nan, math.nan, False),
    (math.inf, math.inf, True), (math.inf, 1e308, False),
    ([1, 2], (1, 2), True), ([1, 2], [1, 2, 3], False), ([], None, False), ([[1.0]], [[1]], True),
    ({"a": [1]}, {"a": [1]}, True), ({"a": 1}, {"b": 1}, False), ({}, [], False),
  ],
)  # fmt: skip
def test_values_are_equal_but_for_rounding_and_tuples(expected, given, same):
  assert same_value(expected, given) is same


def test_a_value_without_end_is_no_value():
  deep = []
  for _ in range(10_000):
    deep = [deep]
  assert same_value(deep, deep) is False


@pytest.mark.parametrize(
  ("expected", "given", "same"),
  [
    ("1\n2\n", "1\n2", True), ("1 2 \n\n", "1 2\n", True), ("1\n2", "1 2", False),
    ("1\n\n2", "1\n2", False), ("", "", True), ("", "0", False), ("1", "1 2", False),
    ("1  2", "1 2", True), ("YES", "yes", False), (" 1", "1", True),
    ("3", "3.0", True), ("3", "3.0000001", False), ("3.0", "3", True), ("0.333333", "0.3333334", True),
    ("0.5", "0.6", False), ("1e9", "1000000000", True), ("0.5", "nan", False), ("0.5", "x", False),
    ("1.5 a\n2", "1.50 a\n2", False), ("1.0", "1_0", False),
  ],
)  # fmt: skip
def test_texts_are_equal_but_for_blanks_and_rounding(expected, given, same):
  assert same_text(expected, given) is same
