"""Verdicts on recorded inputs: each row of cases/verdicts.json has an id, the input and the correct verdict."""

import json
import pathlib

import pytest

from nemocascade.data.chat import Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.domains import instruction, stem, structured
from nemocascade.domains.own import OwnReward
from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import Completion, Verdict

CASES = json.loads((pathlib.Path(__file__).parent / "cases/verdicts.json").read_text())
VERIFY = {
  "stem": stem.make_verify(),
  "structured": structured.make_verify(),
  "instruction": instruction.make_verify(),
}


def judge(case):
  """Verdict on a case: its row, completed by the defaults of its domain, with its text or tool calls."""
  calls = [ToolCall(call["name"], call["arguments"]) for call in case.get("calls", ())]
  turn = Turn(
    reasoning=None, content=case.get("text", "") * case.get("times", 1), tool_calls=tuple(calls),
    error=None, finished=True,
  )  # fmt: skip
  row = CASES["defaults"][case["domain"]] | case["row"]
  return VERIFY[case["domain"]]([row], [Completion((turn,))])[0]


def named(cases):
  return [pytest.param(case, id=f"{case['id']}-{place}") for place, case in enumerate(cases)]


@pytest.mark.parametrize("case", named(CASES["judged"]))
def test_a_text_is_paid_what_is_right(case):
  verdict = judge(case)
  assert (verdict.reward, verdict.masked) == (case["reward"], False), verdict.reason


@pytest.mark.parametrize("case", named(CASES["masked"]))
def test_what_cannot_be_judged_is_masked_by_its_cause_and_named(case, monkeypatch):
  monkeypatch.setattr(limited.call, "__kwdefaults__", {"limit_s": 1.0})
  verdict = judge(case)
  assert (verdict.reward, verdict.masked, verdict.cause) == (0.0, True, case["cause"])
  assert case.get("named", "") in verdict.reason


@pytest.mark.parametrize("fields", [{"reason": None}, {"reason": 5}, {"masked": "no"}, {"cause": None}])
def test_a_verdict_of_a_users_reward_whose_fields_have_other_types_is_masked(fields):
  given = Verdict(**{"reward": 1.0, "reason": ""} | fields)
  reward = OwnReward(lambda row, completion: given, batched=False, where="x")
  (verdict,) = reward([{}], [Completion(())])
  assert (verdict.reward, verdict.masked, verdict.cause) == (0.0, True, "error")
  assert next(iter(fields)) in verdict.reason
