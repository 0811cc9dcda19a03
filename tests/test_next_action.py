"""One tool call, judged by its equality with the row's."""

import json

import pytest

from nemocascade.data.chat import Turn
from nemocascade.data.tool_format import ToolCall, calls, parse_call
from nemocascade.domains import next_action
from nemocascade.domains.math import judge as judge_maths
from nemocascade.domains.math import unsupported as without_answer
from nemocascade.domains.structured import judge as judge_structured
from nemocascade.verifiers.verdict import Completion


def verdict(action, given):
  turn = Turn(None, "", (ToolCall("f", given),), None, True)
  return next_action.make_verify()([{"expected_action": action}], [Completion((turn,))])[0]


@pytest.mark.parametrize(
  "value", [True, False, None, 1, 1.5, "5", "True", "a\nb", [1, True, None], {"b": [], "a": "x"}]
)
def test_a_call_as_the_template_writes_it_equals_itself(value):
  action = {"name": "f", "arguments": json.dumps({"x": value})}
  _, text, *_ = calls([action], learned=True)
  assert verdict(action, parse_call(text.text).arguments).reward == 1.0


@pytest.mark.parametrize(
  "wanted, given",
  [
    (True, "1"), (1, "true"), (1, "True"), (0, "False"), (False, "0"), ([1], "[true]"), ({"a": 1}, '{"a": true}'),
    ({"a": 1}, '{"a": 2, "a": 1}'), ("5", '"5"'), (5, "9" * 5000), (1, "NaN"), (None, ""), (1, "[" * 100_000),
    ({}, "[" * 100_000), ([], "{}"),
  ],
)  # fmt: skip
def test_other_values_are_wrong_not_masked(wanted, given):
  found = verdict({"name": "f", "arguments": {"x": wanted}}, {"x": given})
  assert (found.reward, found.masked) == (0.0, False)


def test_more_and_fewer_arguments_are_wrong():
  assert verdict({"name": "f", "arguments": "{}"}, {"x": "1"}).reward == 0.0
  assert verdict({"name": "f", "arguments": '{"x": 1}'}, {}).reward == 0.0


@pytest.mark.parametrize(
  "action", [None, {}, {"name": 5}, {"name": "f", "arguments": "[1]"}, {"name": "f", "arguments": "{"}]
)
def test_a_row_without_a_call_to_compare_with_is_masked_and_left_out(action):
  assert verdict(action, {}).cause == "row"
  assert "expected_action" in next_action.unsupported({"expected_action": action})


def test_a_null_answer_and_an_absent_schema_are_no_answer_and_no_schema():
  said = Completion((Turn(None, "\\boxed{None}", (), None, True),))
  assert judge_maths({"expected_answer": None}, said).cause == "row"
  assert without_answer({"expected_answer": None}) and not without_answer({"expected_answer": 0})
  assert judge_structured({"schema_str": None}, said).cause == "row"
