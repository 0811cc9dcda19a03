"""Office tasks: demonstrations of mixed quality, and a verdict on the final state only."""

import json
import math
import pathlib

import numpy as np
import pytest

from nemocascade.data import chat
from nemocascade.domains import tools, workplace
from nemocascade.domains.rows import prompt_messages, prompt_tools
from nemocascade.generated import generator
from nemocascade.generated import tools as generated_tools
from nemocascade.generated.generator import Style
from nemocascade.verifiers.verdict import Completion

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym/workplace_assistant.jsonl"
OFFICE, VERIFY = tools.make_environment(), tools.make_verify()
USUAL = generated_tools.Tools()
CAREFUL = generated_tools.Tools()
CAREFUL.style = Style("seek", "assume", sloppy_rate=0.0)
SLOPPY = generated_tools.Tools()
SLOPPY.style = Style("seek", "assume", sloppy_rate=1.0, error_rate=1.0)


def turns_of(messages):
  """The assistant's messages as parsed turns."""
  turns = []
  for message in messages:
    if message["role"] == "assistant":
      calls = [c["function"] for c in message.get("tool_calls", ())]
      calls = tuple(chat.ToolCall(c["name"], c["arguments"]) for c in calls)
      turns.append(chat.Turn(message.get("reasoning_content"), message["content"], calls, None, True))
  return tuple(turns)


def turn(*calls, finished=True):
  return chat.Turn("so", "", tuple(chat.ToolCall(*call) for call in calls), None, finished)


def play(row, *turns):
  """An episode as the rollout engine runs it."""
  world = OFFICE.start(row)
  for one in turns:
    OFFICE.act(world, one)
  return Completion(turns, world)


def reward(row, *turns):
  (verdict,) = VERIFY([row], [play(row, *turns)])
  assert not verdict.masked
  return verdict.reward


def hand_written(*calls, tools_=None):
  params = {"input": [{"role": "user", "content": "Move standup over to roof"}]}
  if tools_ is not None:
    params["tools"] = tools_
  truth = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
  return {
    "id": 0, "responses_create_params": params, "ground_truth": truth,
    "category": "workplace_assistant_calendar", "environment_name": "workplace_assistant",
  }  # fmt: skip


FIND = ("calendar_find", {"title": "standup"})
MOVE = ("calendar_move", {"id": "amber", "place": "roof"})
ROW = hand_written(FIND, MOVE)


@pytest.mark.parametrize("thinking", [True, False])
def test_careful_demonstrations_are_right(thinking):
  for i, row in enumerate(generator.rows(CAREFUL, "train", 0, 0, 100)):
    rng = np.random.default_rng(i)
    assert reward(row, *turns_of(CAREFUL.demonstrate(row, rng, thinking=thinking))) == 1.0


def test_sloppy_errors_are_wrong():
  for i, row in enumerate(generator.rows(SLOPPY, "train", 0, 0, 100)):
    rng = np.random.default_rng(i)
    assert reward(row, *turns_of(SLOPPY.demonstrate(row, rng, thinking=True))) == 0.0


@pytest.mark.parametrize("thinking", [True, False])
def test_mixed_demonstrations_are_right_a_third_of_the_time(thinking):
  rng = np.random.default_rng(0)
  rows = generator.rows(USUAL, "train", 0, 0, 1000)
  mean = np.mean([
    reward(row, *turns_of(USUAL.demonstrate(row, rng, thinking=thinking))) for row in rows
  ])  # fmt: skip
  assert 0.28 < mean < 0.42


def test_demonstrated_results_are_what_the_world_answers():
  for i, row in enumerate(generator.rows(USUAL, "train", 0, 0, 50)):
    messages = USUAL.demonstrate(row, np.random.default_rng(i), thinking=True)
    assert messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    world, told = OFFICE.start(row), [m["content"] for m in messages if m["role"] == "tool"]
    answered = [OFFICE.act(world, one) for one in turns_of(messages)]
    assert answered[:-1] == [[text] for text in told] and answered[-1] is None
    assert len(answered) <= OFFICE.max_turns


def test_non_thinking_demonstrations_have_no_thoughts():
  row = USUAL.make_row(np.random.default_rng(0))
  for message in USUAL.demonstrate(row, np.random.default_rng(1), thinking=False):
    assert "reasoning_content" not in message


def test_there_are_two_thousand_prompts():
  rows = generator.rows(USUAL, "train", 0, 0, 5000)
  assert len({prompt_messages(row)[0]["content"] for row in rows}) > 1800
  possible = sum(math.prod(map(len, task.words)) * len(generated_tools.PLACES) for task in generated_tools.TASKS)
  assert possible >= 2000


def test_keys_are_drawn_for_each_row_and_never_in_the_prompt():
  rows = generator.rows(USUAL, "train", 0, 0, 300)
  keys = {}
  for row in rows:
    text = prompt_messages(row)[0]["content"]
    key = next(iter(json.loads(row["ground_truth"][1]["arguments"]).values()))
    assert key not in text.split()
    keys[key] = keys.get(key, 0) + 1
  assert set(keys) == set(generated_tools.KEYS) and max(keys.values()) < 50


def test_rows_of_equal_seed_are_equal_and_json():
  one, other = (generator.rows(USUAL, "heldout", 3, 5, 4) for _ in range(2))
  assert json.loads(json.dumps(one)) == other


def test_doing_nothing_is_never_right():
  for row in generator.rows(USUAL, "train", 0, 0, 200):
    assert reward(row, turn()) == 0.0


def test_a_right_state_counts_however_it_was_reached():
  assert reward(ROW, turn(FIND), turn(MOVE), turn()) == 1.0
  assert reward(ROW, turn(MOVE)) == 1.0
  assert reward(ROW, turn(FIND, MOVE)) == 1.0
  detour = ("calendar_move", {"id": "amber", "place": "farm"})
  assert reward(ROW, turn(detour), turn(MOVE)) == 1.0


def test_extra_changes_do_not():
  for extra in (("calendar_cancel", {"id": "coral"}),
                ("mail_send", {"address": "ivory", "text": "hi"})):  # fmt: skip
    assert reward(ROW, turn(MOVE), turn(extra)) == 0.0
  assert reward(ROW, turn(MOVE), turn(("no_such_function", {}))) == 1.0


def test_an_episode_ends_where_nothing_is_called_or_the_turn_is_cut_off():
  world = OFFICE.start(ROW)
  assert OFFICE.act(world, turn()) is None
  assert OFFICE.act(world, turn(MOVE, finished=False)) is None
  assert OFFICE.act(world, turn(FIND, FIND)) == ["amber", "amber"]


def test_calls_are_replayed_where_no_world_was_kept():
  turns = (turn(FIND), turn(MOVE), turn())
  (verdict,) = VERIFY([ROW], [Completion(turns, None)])
  assert verdict.reward == 1.0 and not verdict.masked


def test_arguments_of_the_truth_may_be_objects():
  row = {**ROW, "ground_truth": [{"name": MOVE[0], "arguments": MOVE[1]}]}
  assert reward(row, turn(MOVE)) == 1.0


@pytest.mark.parametrize(
  "row, named",
  [
    (hand_written(("email_reply_email", {"email_id": "7", "body": "hi"})), "email_reply_email"),
    (hand_written(tools_=[{"type": "function", "name": "crm_add", "parameters": {}}]), "crm_add"),
    (hand_written(("calendar_move", {"id": "main", "place": "roof"})), "calendar_move"),
    ({"responses_create_params": {"input": "hi"}}, "ground_truth"),
  ],
)
def test_a_row_that_cannot_be_judged_is_masked_and_says_why(row, named):
  (verdict,) = VERIFY([row], [Completion((turn(),), None)])
  assert verdict.masked and verdict.reward == 0.0 and named in verdict.reason


@pytest.mark.skipif(not GYM.exists(), reason="real rows are not here")
def test_real_rows_are_masked_by_the_name_of_their_function():
  for line in GYM.read_text().splitlines():
    row = json.loads(line)
    world = OFFICE.start(row)
    call = row["ground_truth"][0]
    (answer,) = OFFICE.act(world, turn((call["name"], json.loads(call["arguments"]))))
    assert answer.startswith("error: no function")
    (verdict,) = VERIFY([row], [Completion((turn(),), world)])
    assert verdict.masked and call["name"] in verdict.reason


def test_phrases_are_what_the_chat_template_writes():
  row = USUAL.make_row(np.random.default_rng(0))
  blocks = generated_tools.schema_phrases(USUAL.schemas)
  assert len(blocks) == len(workplace.FUNCTIONS)
  assert all(f"<name>{name}</name>" in block for name, block in zip(workplace.FUNCTIONS, blocks))
  for task_row in generator.rows(CAREFUL, "train", 0, 0, 20):
    messages = prompt_messages(task_row)
    messages += CAREFUL.demonstrate(task_row, np.random.default_rng(0), thinking=True)
    text = chat.text_of(chat.render(messages, tools=prompt_tools(task_row)))
    for _, arguments in tools.true_calls(task_row):
      values = list(arguments.values())
      middle = [p for p in generated_tools.call_phrases() if p.startswith("\n</parameter>\n<parameter=")]
      if len(values) == 1:
        assert any(f"{p}{values[0]}\n</parameter>\n</function>\n" in text
                   for p in generated_tools.call_phrases())  # fmt: skip
      else:
        assert any(f"{values[0]}{p}{values[1]}\n</parameter>\n</function>\n" in text
                   for p in middle)  # fmt: skip
  assert all(block in chat.text_of(chat.render(prompt_messages(row), tools=USUAL.schemas))
             for block in blocks)  # fmt: skip
