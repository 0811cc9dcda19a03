"""Rows of files: the index, the order, the split, items of the Responses API, agents, and what is wrong with a file."""

import json
import pathlib

import numpy as np
import pytest
from composed import config

from nemocascade.data import chat
from nemocascade.domains import row_files
from nemocascade.domains.agents import AGENTS, UNSUPPORTED
from nemocascade.domains.rows import check_prompt, make_prompt, prompt_messages, prompt_tools, split_of
from nemocascade.errors import UserError
from nemocascade.runtime import domains
from nemocascade.runtime.mixture import Mixture

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"
OWN = "def score(row, completion):\n  return float(len(completion.content))\n"


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return path


def asked(number, **fields):
  """A row without agent_ref."""
  return {"responses_create_params": {"input": [{"role": "user", "content": f"What is {number}?"}]}, **fields}


def number_of(row):
  return int(prompt_messages(row)[-1]["content"].split()[-1].rstrip("?"))


def build(**entry):
  return domains.build(config(mine=entry))["mine"]


def maths(path, rows, **entry):
  return build(rows=str(write(path, rows)), verify="math", **entry)


ROWS = [asked(i, expected_answer=str(i)) for i in range(60)]


def test_prompts_are_split_by_their_hash_and_each_epoch_has_an_order_of_its_own(tmp_path):
  domain = maths(tmp_path / "a.jsonl", ROWS)
  held = domain.rows.heldout(0, 0, 100)
  assert sorted(map(number_of, held)) == [i for i, row in enumerate(ROWS) if split_of(row) == "heldout"]
  n = len(ROWS) - len(held)
  epochs = [[number_of(domain.rows.train(0, e * n + i)) for i in range(n)] for e in range(3)]
  rest = sorted(set(range(60)) - set(map(number_of, held)))
  assert [sorted(epoch) for epoch in epochs] == [rest] * 3
  assert len({tuple(epoch) for epoch in epochs}) == 3 and rest not in epochs
  assert [number_of(domain.rows.train(1, i)) for i in range(n)] != epochs[0]
  again = maths(tmp_path / "a.jsonl", ROWS)
  assert [number_of(again.rows.train(0, n + i)) for i in range(n)] == epochs[1]


def test_heldout_rows_come_from_their_file_and_pages_of_them_join(tmp_path):
  held = write(tmp_path / "held.jsonl", [asked(100 + i, expected_answer="1") for i in range(5)])
  domain = maths(tmp_path / "a.jsonl", ROWS, heldout=str(held))
  assert {number_of(domain.rows.train(0, i)) for i in range(60)} == set(range(60))
  found = domain.rows.heldout(0, 0, 10)
  assert sorted(map(number_of, found)) == list(range(100, 105))
  assert domain.rows.heldout(0, 0, 3) + domain.rows.heldout(0, 3, 9) == found and domain.rows.heldout(0, 5, 3) == []


def test_a_row_names_its_domain_and_keeps_its_agent(tmp_path):
  agent = {"agent_ref": {"type": "responses_api_agents", "name": "math_with_judge_simple_agent"}}
  row = maths(tmp_path / "a.jsonl", [row | agent for row in ROWS]).rows.train(0, 0)
  assert row["agent_ref"]["name"] == "mine" and row["agent_ref"]["agent"] == "math_with_judge_simple_agent"
  assert maths(tmp_path / "b.jsonl", ROWS).rows.train(0, 0)["agent_ref"]["name"] == "mine"


@pytest.mark.parametrize(
  "form",
  [
    lambda row: {"messages": row["responses_create_params"]["input"], "expected_answer": row["expected_answer"]},
    lambda row: {"prompt": prompt_messages(row)[0]["content"], "expected_answer": row["expected_answer"]},
    lambda row: (
      {k: v for k, v in row.items() if k != "expected_answer"}
      | {"verifier_metadata": {"expected_answer": row["expected_answer"]}}
    ),
  ],
)
def test_short_forms_and_fields_under_verifier_metadata(tmp_path, form):
  domain, usual = maths(tmp_path / "a.jsonl", map(form, ROWS)), maths(tmp_path / "b.jsonl", ROWS)
  for i in range(10):
    row = domain.rows.train(0, i)
    assert prompt_messages(row) == prompt_messages(usual.rows.train(0, i))
    assert row["expected_answer"] == str(number_of(row))


def test_several_files_and_blank_lines_are_one_list(tmp_path):
  write(tmp_path / "data" / "1.jsonl", ["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])])
  (tmp_path / "data" / "2.jsonl").write_text(json.dumps(ROWS[2]))  # No newline at the end.
  for given in (tmp_path / "data", tmp_path / "data" / "*.jsonl", tmp_path / "**" / "*.jsonl"):
    index = row_files.index(row_files.find(str(given), "rows"), lambda row: "")
    assert [number_of(index.read(i)) for i in range(3)] == [0, 1, 2]
    assert index.place(1).endswith("1.jsonl, line 4") and index.place(2).endswith("2.jsonl, line 1")


def test_a_mixture_of_files_goes_on_from_its_checkpoint_and_knows_its_files(tmp_path, monkeypatch):
  monkeypatch.setattr("nemocascade.runtime.mixture.prompt_of", lambda row, domain, tokenizer: [1] * 9)
  path = tmp_path / "a.jsonl"

  def mixture(state, rows=ROWS):
    return Mixture({"mine": maths(path, rows)}, {"mine": 1.0}, seed=0, tokenizer=None, limit=10, state=state)

  whole = mixture({})
  drawn = [whole.draw(25)[0] for _ in range(6)]  # More than two epochs.
  part = mixture({})
  part.draw(25)
  state = json.loads(json.dumps(part.get_state()))
  assert [mixture(state).draw(25)[0], drawn[1]] == [drawn[1]] * 2
  with pytest.raises(UserError, match="domains.mine.rows: the files have changed"):
    mixture(state, ROWS[1:])


# Items of the Responses API.

ITEMS = [
  {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
  {"role": "user", "content": "How warm is it in Oslo and in Rome?"},
  {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Two cities."}]},
  {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
  {"type": "function_call", "call_id": "1", "name": "warm", "arguments": '{"city": "Oslo"}'},
  {"type": "function_call", "call_id": "2", "name": "warm", "arguments": '{"city": "Rome"}'},
  {"type": "function_call_output", "call_id": "1", "output": "3"},
  {"type": "function_call_output", "call_id": "2", "output": "12"},
  {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Once more."}]},
  {"type": "function_call", "call_id": "3", "name": "warm", "arguments": '{"city": "Bergen"}'},
  {"type": "function_call_output", "call_id": "3", "output": "5"},
]


def test_items_are_rendered_as_the_conversation_that_they_are():
  call = lambda city: {"type": "function", "function": {"name": "warm", "arguments": {"city": city}}}  # noqa: E731
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it in Oslo and in Rome?"},
    {"role": "assistant", "reasoning_content": "Two cities.", "content": "I look.",
     "tool_calls": [call("Oslo"), call("Rome")]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "reasoning_content": "Once more.", "content": "", "tool_calls": [call("Bergen")]},
    {"role": "tool", "content": "5"},
  ]  # fmt: skip
  row = {"responses_create_params": {"input": ITEMS}}
  check_prompt(row)
  text = chat.text_of(chat.render(prompt_messages(row), add_generation_prompt=True))
  assert text == chat.text_of(chat.render(messages, add_generation_prompt=True))
  assert text.count("<tool_call>") == 3 and text.count("<tool_response>") == 3
  assert "Two cities." in text and "Once more." in text


@pytest.mark.parametrize(
  "given, said",
  [
    ([], "not empty"),
    ("", "not empty"),
    ([3], "each message must be an object"),
    ([{"role": "robot", "content": "x"}], "unknown role of message 0"),
    ([{"role": "assistant", "content": "x"}], "message 0 is 'assistant' first"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "message 1 is 'system' after 'user'"),
    ([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}], "message 1 is 'tool' after 'user'"),
    ([*ITEMS[:2], ITEMS[3], ITEMS[6]], "message 3 is 'tool' after 'assistant'"),  # It called nothing.
    ([*ITEMS[:2], ITEMS[3], ITEMS[3]], "message 3 is 'assistant' after 'assistant'"),
    (ITEMS[:6], "the last message must be of user or tool, not 'assistant'"),
    ([{"role": "user", "content": 3}], "content of a message"),
    ([*ITEMS[:4], ITEMS[4] | {"arguments": "{"}, ITEMS[6]], "arguments of tool call 'warm': not JSON"),
  ],
)
def test_a_prompt_that_cannot_be_asked_is_one_line_with_file_row_and_field(tmp_path, given, said):
  path = write(tmp_path / "a.jsonl", [*ROWS[:3], {"responses_create_params": {"input": given}, "expected_answer": "1"}])
  with pytest.raises(UserError) as error:
    build(rows=str(path), verify="math")
  assert f"{path}, line 4: " in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


# Agents.


def test_of_a_file_with_several_agents_each_domain_takes_its_own_and_says_what_it_left(tmp_path, capsys):
  options = {"options": [{"A": "x"}, {"B": "y"}], "expected_answer": "A"}
  agents = ["mcqa_simple_agent", "mcqa_simple_agnt", "math_with_judge_simple_agent", "swe_agents_val", None]
  rows = [
    asked(i, **options, **({"agent_ref": {"type": "responses_api_agents", "name": agents[i % 5]}} if agents[i % 5] else {}))
    for i in range(100)
  ]  # fmt: skip
  path = write(tmp_path / "a.jsonl", rows)
  domain = domains.build(config(stem={"rows": str(path)}))["stem"]
  assert {number_of(domain.rows.train(0, i)) % 5 for i in range(40)} == {0, 4}
  said = capsys.readouterr().err
  assert (
    "domains.stem.rows: left out 20 of the unknown agent 'mcqa_simple_agnt' (did you mean 'mcqa_simple_agent'?)" in said
  )
  assert f"(first: {path}, line 2)" in said
  assert "20 of agent 'math_with_judge_simple_agent', which 'math' judges" in said
  assert "20 of agent 'swe_agents_val': its tests run in a container image" in said and said.count("\n") == 1


def test_a_file_of_unknown_agents_alone_is_refused_and_own_rewards_take_any(tmp_path, monkeypatch):
  rows = [make_prompt("robot", f"Say {i}") for i in range(60)]
  path = write(tmp_path / "a.jsonl", rows)
  with pytest.raises(UserError, match=r"domains.mine.rows=.*no row is left: 60 of the unknown agent 'robot'.*line 1"):
    build(rows=str(path), verify="math")
  write(tmp_path / "reward.py", [OWN])
  domain = build(rows=str(path), verify=f"{tmp_path}/reward.py:score")
  assert domain.rows.train(0, 0)["agent_ref"] == {"type": "responses_api_agents", "name": "mine", "agent": "robot"}


def test_rows_that_no_verifier_here_can_judge_are_left_out_by_name(tmp_path):
  truth = [{"name": "email_send", "arguments": "{}"}]
  path = write(tmp_path / "a.jsonl", [asked(i, ground_truth=truth) for i in range(3)])
  with pytest.raises(UserError, match="no row is left: 3 no function 'email_send' here"):
    build(rows=str(path), verify="tools")
  path = write(tmp_path / "b.jsonl", [asked(i) for i in range(3)])
  with pytest.raises(UserError, match="no row is left: 3 that lack a field .KeyError: 'ground_truth'"):
    build(rows=str(path), verify="tools")


# Filters and bad files.


def test_pass_rates_outside_the_bounds_are_left_out_of_training_only(tmp_path, capsys):
  rows = [row | {"pass_rate": i / 59} for i, row in enumerate(ROWS)]
  held = write(tmp_path / "held.jsonl", [asked(200 + i, expected_answer="1") for i in range(4)])
  domain = maths(tmp_path / "a.jsonl", rows, heldout=str(held), min_pass_rate=0.01, max_pass_rate=0.5)
  found = {number_of(domain.rows.train(0, i)) for i in range(100)}
  assert found == {i for i in range(60) if 0.01 <= i / 59 <= 0.5} and len(domain.rows.heldout(0, 0, 9)) == 4
  assert "left out 31 with a pass_rate outside 0.01 to 0.5" in capsys.readouterr().err


def test_bounds_need_a_pass_rate_in_every_row(tmp_path):
  with pytest.raises(UserError, match=r"a.jsonl, line 2: pass_rate is missing: domains.mine.min_pass_rate"):
    maths(tmp_path / "a.jsonl", [ROWS[0] | {"pass_rate": 0.5}, *ROWS[1:]], max_pass_rate=0.9)
  with pytest.raises(UserError, match="min_pass_rate=0.5: must be at most max_pass_rate=0.1"):
    maths(tmp_path / "a.jsonl", ROWS, min_pass_rate=0.5, max_pass_rate=0.1)


def test_a_heldout_file_that_shares_prompts_with_training_is_refused(tmp_path):
  held = write(tmp_path / "held.jsonl", [asked(100, expected_answer="1"), ROWS[7], ROWS[3]])
  with pytest.raises(UserError) as error:
    maths(tmp_path / "a.jsonl", ROWS, heldout=str(held))
  assert f"domains.mine.heldout: 2 of its 3 prompts are in domains.mine.rows too, such as that of {held}, line 2" in (
    said := str(error.value)
  )
  assert f"{tmp_path}/a.jsonl, line 8" in said and "\n" not in said


@pytest.mark.parametrize("heldout", [False, True])
def test_a_prompt_that_one_domain_trains_on_and_another_is_scored_on_is_refused(tmp_path, heldout):
  others = [asked(300 + i, expected_answer="1") for i in range(40)]
  first = {"rows": str(write(tmp_path / "a.jsonl", ROWS)), "verify": "math"}
  second = {"rows": str(write(tmp_path / "b.jsonl", others)), "verify": "math"}
  entries = {"one": first, "two": second}
  built = domains.build(config(**entries))  # What they hold out by the hash, neither trains on.
  if heldout:
    second["heldout"] = str(write(tmp_path / "held.jsonl", [asked(200, expected_answer="1"), ROWS[7]]))
    field, shared = "domains.two.heldout: 1 of its 2", ROWS[7]
    entries["one"] |= {"heldout": str(write(tmp_path / "other.jsonl", [asked(201, expected_answer="1")]))}
  else:  # The first trains on all its rows, one of which the second holds out by its hash.
    shared = built["two"].rows.heldout(0, 0, 1)[0]
    write(tmp_path / "a.jsonl", [*ROWS, {key: shared[key] for key in ("responses_create_params", "expected_answer")}])
    entries["one"] |= {"heldout": str(write(tmp_path / "other.jsonl", [asked(201, expected_answer="1")]))}
    field = "domains.two.rows, held out by the hash: 1 of its"
  with pytest.raises(UserError) as error:
    domains.build(config(**entries))
  assert str(error.value).startswith(field) and "prompts are in domains.one.rows too" in str(error.value)


@pytest.mark.parametrize(
  "lines, said",
  [
    ([], "no row is left: the files are empty"),
    (["{"], "a.jsonl, line 1: not JSON"),
    (["[1]"], "a.jsonl, line 1: must be an object, is list"),
    ([{"question": "x"}], "a.jsonl, line 1: has none of responses_create_params, messages and prompt, only question"),
    (
      [{"responses_create_params": 3, "expected_answer": "1"}],
      "a.jsonl, line 1: responses_create_params.input: must be a text",
    ),
    ([ROWS[0]], "domains.mine.heldout='': of the 1 rows of"),
  ],
)
def test_a_bad_file_is_one_line(tmp_path, lines, said):
  with pytest.raises(UserError) as error:
    maths(tmp_path / "a.jsonl", lines)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_a_glob_that_finds_nothing_is_named(tmp_path):
  with pytest.raises(UserError, match=r"domains.mine.rows='.*/none-\*.jsonl': no such file"):
    build(rows=f"{tmp_path}/none-*.jsonl", verify="math")
  write(tmp_path / "a.jsonl", ROWS)
  with pytest.raises(UserError, match=r"domains.mine.heldout='.*/none.jsonl': no such file"):
    build(rows=f"{tmp_path}/a.jsonl", heldout=f"{tmp_path}/none.jsonl", verify="math")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
  domain = maths(tmp_path / "a.jsonl", ROWS)
  write(tmp_path / "a.jsonl", [asked(900 + i) for i in range(60)])
  with pytest.raises(OSError, match="the file was changed") as error:  # A failure of the run: exit code 1.
    domain.rows.train(0, 0)
  assert "a.jsonl, line " in error.value.filename
  (tmp_path / "a.jsonl").unlink()
  with pytest.raises(OSError, match="No such file .*a.jsonl, line "):
    domain.rows.train(0, 0)


def test_the_index_is_small(tmp_path):
  index = row_files.index((write(tmp_path / "a.jsonl", ROWS),), lambda row: "")
  names = "file_N", "offset_N", "line_N", "digest_N", "sum_N"
  assert sum(getattr(index, name).nbytes for name in names) == 36 * len(ROWS)
  assert index.digest_N.dtype == np.uint64


# The released rows.

KINDS = {  # File -> the domain of its rows, or why it is left out.
  "code_gen": "code", "equivalence_llm_judge": None, "genrm_compare": "preference", "ifbench": "instruction",
  "instruction_following": "instruction", "math_with_autograder": "math", "math_with_judge": "math", "mcqa": "stem",
  "reasoning_gym": "math", "structured_outputs": "structured", "swe_agents": None, "swe_pivot": "next_action",
  "swerl_gen": "swe", "swerl_llm_judge": "stem", "workplace_assistant": "tools",
}  # fmt: skip
LEFT_OUT = {
  "swerl_gen": "the repository's environment is not available", "workplace_assistant": "no function",
  "swe_agents": "its tests run in a container image",
}  # fmt: skip


def test_every_released_file_has_its_kind():
  if GYM.exists():
    assert {path.stem for path in GYM.glob("*.jsonl")} == set(KINDS)


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
@pytest.mark.parametrize("name", [name for name, domain in KINDS.items() if domain and name not in LEFT_OUT])
def test_all_released_rows_of_a_kind_load_and_are_judged(name, tmp_path, capsys):
  from nemocascade.data.chat_parse import Turn
  from nemocascade.verifiers.verdict import Completion

  path = GYM / f"{name}.jsonl"
  released = [json.loads(line) for line in path.read_text().splitlines()]
  held = write(tmp_path / "held.jsonl", [released[0] | {"responses_create_params": {"input": "Another prompt."}}])
  domain = build(rows=str(path), heldout=str(held), verify=KINDS[name])
  count = len(released)
  if name == "ifbench":  # One instruction needs a tagger that is not here.
    assert "left out 2 unknown instruction 'words:start_verb'" in capsys.readouterr().err
    count -= 2
  rows = [domain.rows.train(0, i) for i in range(count)]
  assert len({json.dumps(row, sort_keys=True) for row in rows}) == count
  for row in rows:
    pieces = chat.render(prompt_messages(row), tools=prompt_tools(row) or None, add_generation_prompt=True)
    assert chat.text_of(pieces)
  verdicts = domain.verify(rows, [Completion((Turn("", "An answer.", (), None, True),))] * count)
  if name == "genrm_compare":  # Its rewards are pairwise, within a group.
    assert all(verdict.masked and "no judge" in verdict.reason for verdict in verdicts)
  else:
    assert not any(verdict.masked for verdict in verdicts), verdicts


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_released_rows_that_cannot_be_judged_here_say_why(name):
  verify = KINDS[name] or "swe_agentic"
  with pytest.raises(UserError, match=f"no row is left: .*{LEFT_OUT[name]}"):
    build(rows=str(GYM / f"{name}.jsonl"), verify=verify)


def test_agents_are_known_or_said_to_be_unsupported():
  named = {f"{name}_simple_agent" for name in KINDS if name not in ("swe_agents", "swe_pivot")}
  assert named <= {*AGENTS, *UNSUPPORTED}
