"""RL rows and files with what nobody planned for: each is used, left out by name, or refused by file and line."""

import json

import pytest
from test_rows import ROWS, asked, build, maths, number_of, write

from nemocascade.errors import UserError
from nemocascade.runtime.mixture import Mixture

NESTED = [
  {"role": "user", "content": "x"},
  {"type": "function_call", "name": "f", "arguments": "[" * 200_000},
  {"type": "function_call_output", "output": "y"},
]


@pytest.mark.parametrize(
  "row, said",
  [
    (asked(1, agent_ref="math"), "agent_ref: must be an object with a name, is 'math'"),
    (asked(1, agent_ref=["math"]), "agent_ref: must be an object with a name"),
    (asked(1, agent_ref={"name": ["math"]}), "agent_ref: must be an object with a name"),
    (asked(1, agent_ref={"name": 5}), "agent_ref: must be an object with a name"),
    ({"responses_create_params": {"input": "x", "tools": 5}}, "responses_create_params.tools: must be a list, is int"),
    ({"responses_create_params": {"input": "x", "tools": {"name": "f"}}}, "tools: must be a list, is dict"),
    ('{"prompt": "x", "more": ' + "[" * 200_000, "not JSON (maximum recursion"),
    ({"responses_create_params": {"input": NESTED}}, "is nested too deep"),
  ],
)
def test_a_row_of_another_form_is_one_line_with_file_and_row(tmp_path, row, said):
  with pytest.raises(UserError) as error:
    maths(tmp_path / "a.jsonl", [*ROWS[:5], row if isinstance(row, str) else row | {"expected_answer": "1"}])
  assert f"{tmp_path}/a.jsonl, line 6: " in str(error.value) and said in str(error.value)
  assert "\n" not in str(error.value)


def test_a_long_reason_is_cut(tmp_path, capsys):
  rows = [{"prompt": f"x {i}", "schema_str": "{}", "response_mode": "y" * 9000 * (i == 3)} for i in range(60)]
  build(rows=str(write(tmp_path / "a.jsonl", rows)), verify="structured")
  said = capsys.readouterr().err
  assert "left out 1 unknown response mode 'yyy" in said and len(said) < 400


@pytest.mark.parametrize(
  "form",
  [
    lambda text: {"prompt": f"{text} "},
    lambda text: {"prompt": text.replace(" ", "  ")},
    lambda text: {"prompt": f"\r\n{text}\n"},
    lambda text: {"prompt": text.replace("é", "e\u0301")},
    lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    lambda text: {
      "responses_create_params": {
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}]
      }
    },
  ],
)
def test_a_heldout_prompt_is_found_in_training_whatever_its_white_space_and_form(tmp_path, form):
  text = "What, café, is 7?"
  held = write(tmp_path / "held.jsonl", [form(text) | {"expected_answer": "7"}])
  with pytest.raises(UserError, match="1 of its 1 prompts are in domains.mine.rows too"):
    maths(tmp_path / "a.jsonl", [*ROWS, {"prompt": text, "expected_answer": "7"}], heldout=str(held))


def test_prompts_of_other_numbers_are_other_prompts(tmp_path):
  held = write(tmp_path / "held.jsonl", [{"prompt": "Add 1 11", "expected_answer": "12"}])
  maths(tmp_path / "a.jsonl", [{"prompt": "Add 11 1", "expected_answer": "12"}], heldout=str(held))


CHANGED = [row | {"expected_answer": "0"} if number_of(row) == 30 else row for row in ROWS]


def test_a_changed_answer_is_a_changed_file(tmp_path, monkeypatch):
  monkeypatch.setattr("nemocascade.runtime.mixture.prompt_of", lambda row, domain, tokenizer: [1] * 9)
  mixture = lambda rows, state: Mixture(
    {"mine": maths(tmp_path / "a.jsonl", rows)}, {"mine": 1.0}, seed=0, tokenizer=None, limit=10, state=state
  )
  state = json.loads(json.dumps(mixture(ROWS, {}).get_state()))
  mixture(ROWS, state)
  assert sum(row != other for row, other in zip(ROWS, CHANGED, strict=True)) == 1
  with pytest.raises(UserError, match="domains.mine.rows: the files have changed"):
    mixture(CHANGED, state)


def test_an_answer_that_changes_while_the_run_reads_is_named(tmp_path):
  domain = maths(tmp_path / "a.jsonl", ROWS)
  write(tmp_path / "a.jsonl", [row | {"expected_answer": "9" * len(row["expected_answer"])} for row in ROWS])
  with pytest.raises(OSError, match="the file was changed while the run reads it: .*a.jsonl, line "):
    domain.rows.train(0, 0)
