"""Mathematics: running totals, the boxed answer, and equality checks that cannot hang."""

import dataclasses
import json
import pathlib

import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import math
from nemocascade.errors import UserError
from nemocascade.generated import generator
from nemocascade.generated import math as generated_math
from nemocascade.verifiers import boxed, equality
from nemocascade.verifiers.verdict import Completion

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"


def judge(row, content):
  turn = Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True)
  return math.make_verify()([row], [Completion((turn,))])[0]


@pytest.mark.parametrize("changes", [{}, {"terms": (2, 6), "largest_total": 18, "long_share": 0.5}])
def test_the_expected_answer_is_the_value_of_the_expression(changes):
  task, counts = dataclasses.replace(generated_math.Math(), **changes), set()
  for row in generator.rows(task, "train", 0, 0, 200):
    expression = row["question"].removesuffix(" =")
    totals = generated_math.running_totals(expression)
    assert int(row["expected_answer"]) == eval(expression) == totals[-1]
    assert all(0 <= total <= task.largest_total for total in totals)
    counts.add(len(totals))
  assert counts == set(task.terms)


@pytest.mark.parametrize(
  ("expected", "content", "reward"),
  [
    ("25", "\\boxed{25}", 1.0),
    ("25", "first \\boxed{24}, no: \\boxed{ 25 }.", 1.0),
    ("25", "\\boxed{25} or \\boxed{26}", 0.0),
    ("25", "25", 0.0),
    ("25", "\\boxed{}", 0.0),
    ("25", "\\boxed{24, 25}", 0.0),
    ("25", "\\boxed{26 = 25}", 0.0),
    ("25", "\\boxed{x = 25}", 1.0),
    ("-3", "\\boxed{-3}", 1.0),
    ("-3", "\\boxed{3}", 0.0),
    ("32", "\\boxed{2^5}", 1.0),
    ("\\(\\frac{333}{1997}\\)", "\\boxed{\\frac{333}{1997}}", 1.0),
    ("\\(\\frac{333}{1997}\\)", "\\boxed{\\frac{332}{1997}}", 0.0),
    ("$\\frac{3}{2}$", "\\boxed{1.5}", 1.0),
    ("\\(\\sqrt{2}\\)", "\\boxed{\\sqrt 2}", 1.0),
    ("10^{10}", "\\boxed{10000000000}", 1.0),
  ],
)
def test_the_last_box_must_equal_the_expected_answer(expected, content, reward):
  verdict = judge({"expected_answer": expected}, content)
  assert (verdict.reward, verdict.masked) == (reward, False)


@pytest.mark.parametrize(
  "answer",
  ["9^{9^{9}}", "9^{9^{9^{9}}}", "2^{99999999}", "99999999!", "3!!!!!", "9**9**9", "(" * 299,
   "\\frac{" * 49, "{" * 100, "1" * 100_000, "\\text{25 26}", "x=" * 140],
)  # fmt: skip
def test_hostile_latex_is_wrong(answer):
  assert equality.equal("25", answer) is False


def test_a_comparison_out_of_time_is_masked_and_asked_again(monkeypatch):
  row, content = {"expected_answer": "x + 1"}, "\\boxed{1 + x}"
  assert judge({"expected_answer": "1/2"}, "\\boxed{0.50}").reward == 1.0  # Starts the process before the limit is 0.
  monkeypatch.setattr(equality, "LIMIT_S", 0.0)
  found = judge(row, content)
  assert (found.reward, found.masked, found.cause) == (0.0, True, "time")
  monkeypatch.undo()
  assert judge(row, content).reward == 1.0


def test_plain_integers_are_compared_as_math_verify_does():
  for expected, answer in [("7", "7"), ("7", "8"), ("-7", "-7"), ("7", "-7"), ("7", "007")]:
    assert equality.equal(expected, answer) == equality._ask(expected, answer)


def test_rows_of_reasoning_gym_are_scored_by_its_scorer():
  row = {
    "question": "State the final answer to the following arithmetic problem: 4 - 1 - 7 =",
    "answer": "-4",
    "metadata": {"source_dataset": "chain_sum", "expression": "4 - 1 - 7"},
  }
  assert judge(row, "-4").reward == 1.0
  assert judge(row, "so \\boxed{-4}").reward == 1.0
  assert judge(row, "-5").reward < 1.0
  assert judge({**row, "metadata": {"source_dataset": "no such"}}, "-4").masked


@pytest.mark.parametrize(
  ("text", "inside"),
  [("", None), ("\\boxed{", None), ("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{1}\\boxed{2", None),
   ("\\boxed{ 1 } \\boxed{2}", "2"), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("\\boxed{\\", None)],
)  # fmt: skip
def test_the_last_box_is_read_with_its_braces_balanced(text, inside):
  assert boxed.last_boxed(text) == inside


@pytest.mark.parametrize("answer", ["7", "-3", "B", "\\frac{1}{2}", "{1, 2}", ""])
def test_what_is_boxed_is_read_back(answer):
  assert boxed.last_boxed(f"so {boxed.box(answer)}.") == answer


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
@pytest.mark.parametrize("name", ["math_with_judge", "math_with_autograder", "reasoning_gym"])
def test_released_rows_accept_their_own_answer_and_refuse_another(name):
  for line in (GYM / f"{name}.jsonl").read_text().splitlines():
    row = json.loads(line)
    truth = row.get("expected_answer", row.get("answer"))
    right = f"\\boxed{{{truth}}}" if "expected_answer" in row else truth
    assert judge(row, right).reward == 1.0, truth
    assert judge(row, "\\boxed{123456}").reward == 0.0


@pytest.mark.parametrize(
  ("expected", "answer", "reward"),
  [("12", "1 2", 0), ("12", "1\n2", 0), ("12", "$1$ $2$", 0), ("12", "1\\(2\\)", 0), ("34", "3\\[4\\]", 0),
   ("1.5", "1 .5", 0), ("1/12", "1/1 2", 0), ("1234567", "1234 567", 0), ("110", "1 1 0", 0),
   ("1 2", "1  2", 1), ("10000", "10 000", 1), ("10 000", "$10000$", 1), ("12", "\\(12\\)", 1), ("xy", "x y", 1),
   ("(1,2)", "(1 , 2)", 1), ("\\frac12", "\\frac 1 2", 1)],
)  # fmt: skip
def test_digits_that_something_separates_are_not_one_number(expected, answer, reward):
  assert judge({"expected_answer": expected}, f"\\boxed{{{answer}}}").reward == reward


def test_terms_that_no_problem_can_have_are_refused_and_not_drawn_for_ever(monkeypatch):
  monkeypatch.setattr(generated_math, "MOST_DRAWS", 200)
  task = dataclasses.replace(generated_math.Math(), terms=(20, 20))
  with pytest.raises(UserError, match=r"tasks.math.terms=\(20, 20\) with largest_total=9: .* raise largest_total"):
    generator.rows(task, "train", 0, 0, 1)
