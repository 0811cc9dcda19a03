"""A user's own reward and environment: composed, tried before a run, and kept from ending one."""

import json
import time
import types

import pytest
from composed import config

from nemocascade.data.chat_parse import Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.errors import UserError
from nemocascade.rollout import rewards
from nemocascade.runtime import domains
from nemocascade.verifiers.verdict import NONFINITE, Completion, Verdict

TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}]
ROW = {"prompt": "How many?", "tools": TOOLS, "limit": 5}
SHOP = """
class Shop:
  max_turns = 3
  def start(self, row):
    return {"limit": row["limit"], "count": 0}
  def act(self, world, turn):
    if not turn.tool_calls:
      return None
    world["count"] += len(turn.tool_calls)
    return [str(world["count"]) for _ in turn.tool_calls]
"""


def said(text, world=None):
  return Completion((Turn("so", text, (), None, True),), world)


@pytest.fixture
def build(tmp_path):
  """Builds the domain `mine` from the code of its reward and environment."""
  counter = iter(range(100))

  def make(code, *, verify="score", environment="", rows=None, **entry):
    path = tmp_path / f"own_{next(counter)}.py"
    path.write_text(code)
    data = tmp_path / "rows.jsonl"
    data.write_text(
      "".join(json.dumps(ROW | {"prompt": f"How many are {i}?"} | (rows or {})) + "\n" for i in range(40))
    )
    entry |= {"rows": str(data), "verify": f"{path}:{verify}" if ":" not in verify else verify.removeprefix(":")}
    if environment:
      entry["environment"] = f"{path}:{environment}"
    return domains.build(config(mine=entry))["mine"]

  return make


def test_a_reward_of_one_completion_and_of_a_batch(build):
  one = build("def score(row, completion):\n  return len(completion.content) / row['limit']")
  batch = build(
    "def score(rows, completions):\n  return [len(c.content) / r['limit'] for r, c in zip(rows, completions)]"
  )
  rows, completions = [one.rows.train(0, i) for i in range(3)], [said("a"), said(""), said("abcde")]
  for domain in (one, batch):
    assert [verdict.reward for verdict in domain.verify(rows, completions)] == [0.2, 0.0, 1.0]
    assert domain.verify(rows, completions)[0].reason == "score 0.2"
    assert domain.thinking and domain.turns == 1


@pytest.mark.parametrize(
  "returned", ["1", "True", "np.float32(1)", "np.bool_(True)", "np.ones(())", "Verdict(1.0, 'x')"]
)
def test_numbers_and_verdicts_are_taken(build, returned):
  head = "import numpy as np\nfrom nemocascade.verifiers.verdict import Verdict\n"
  domain = build(f"{head}def score(row, completion):\n  return {returned}")
  assert domain.verify([ROW], [said("x")])[0].reward == 1.0


@pytest.mark.parametrize(
  "code, words",
  [
    ("def score(row, completion):\n  raise ValueError('no key')", ["ValueError: no key (line 2 of own_0.py)"]),
    ("def score(row, completion):\n  return row['answer']", ["KeyError: 'answer'", "line 2"]),
    ("def score(row, completion):\n  return 'good'", ["returned str 'good'", "finite number or a Verdict"]),
    ("def score(row, completion):\n  return None", ["returned NoneType None"]),
    ("def score(row, completion):\n  return float('nan')", ["returned float nan for an empty completion"]),
    ("def score(row, completion):\n  return float('inf') * bool(completion.content)", ["for an empty completion"]),
    ("def score(row, completion):\n  return 1e999 if completion.content else 0", ["inf for the completion 'A trial"]),
    ("def score(row, completion):\n  return [1.0]", ["returned list of length 1 [1.0]"]),
    ("def score(rows, completions):\n  return [1.0]", ["list of length 1 [1.0] for 2 completions"]),
    ("def score(rows, completions):\n  return 1.0", ["returned float 1.0 for 2 completions"]),
    ("def score(rows, completions):\n  return ['a', 'b']", ["returned str 'a'"]),
    ("def score(rows, completions):\n  return '10'", ["returned str '10' for 2 completions"]),
    ("def score(rows, completion):\n  return 1.0", ["its parameters are (rows, completion)", "(row, completion)"]),
    ("def score(answer):\n  return 1.0", ["its parameters are (answer)"]),
    ("score = 3", ["score in", "is int, not a function"]),
    ("def other(row, completion):\n  return 1.0", ["has no 'score'", "it defines other"]),
    ("def score(row, completion)\n  return 1.0", ["is not Python", "line 1"]),
    ("import nothing_of_this_name", ["importing", "ModuleNotFoundError"]),
  ],
)
def test_a_reward_that_does_not_work_is_one_line_before_anything_runs(build, tmp_path, code, words):
  with pytest.raises(UserError) as error:
    build(code)
  line = str(error.value)
  assert line.startswith(f"domains.mine.verify='{tmp_path}/own_0.py:score'") and "\n" not in line
  assert all(word in line for word in words), line
  if "on the row of" in line:
    assert f"{tmp_path}/rows.jsonl, line " in line


@pytest.mark.parametrize("of", ["row, completion", "rows, completions"])
def test_a_reward_that_fails_later_masks_its_samples_and_says_why_once(build, of, capsys):
  code = f"""
calls = []
def one(text):
  if text == "raise": raise RuntimeError("out of order")
  return {{"nan": float("nan"), "text": "good"}}.get(text, 1.0)
def score({of}):
  return {"one(completion.content)" if of[3] == "," else "[one(c.content) for c in completions]"}
"""
  domain = build(code)
  for text, cause, why in (("raise", "error", "out of order"), ("nan", NONFINITE, ""), ("text", "error", "str 'good'")):
    (verdict,) = domain.verify([ROW], [said(text)])
    assert (verdict.masked, verdict.cause, verdict.reward) == (True, cause, 0.0) and why in verdict.reason
  assert domain.verify([ROW], [said("fine")]) == [Verdict(1.0, "score 1")]
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("warning: domains.mine.verify='") and "out of order (line 4 of own_0.py)" in line
  assert "rollout/masked_error" in line


def test_a_batch_of_another_length_later_masks_all(build):
  domain = build("def score(rows, completions):\n  return [1.0] * 2")
  verdicts = domain.verify([ROW] * 3, [said("x")] * 3)
  assert len(verdicts) == 3 and all(v.masked and "for 3 completions" in v.reason for v in verdicts)


@pytest.mark.parametrize("of", ["row, completion", "rows, completions"])
@pytest.mark.parametrize("change", ["row.pop('limit')", "completion.turns = ()", "row['tools'].clear()"])
def test_what_a_reward_changes_nobody_else_sees(build, of, change):
  """The completions of a group have the same row, and what a completion is decides how its sample is trained on."""
  body = f"row, completion = rows[0], completions[0]\n  {change}\n  return [1.0] * len(rows)"
  domain = build(f"def score({of}):\n  {f'{change}; return 1.0' if of[3] == ',' else body}")
  row, completion = domain.rows.train(0, 0), said("x")
  before = json.dumps(row)
  for _ in range(2):
    assert domain.verify([row] * 3, [completion] * 3) == [Verdict(1.0, "score 1")] * 3
  assert json.dumps(row) == before and completion.content == "x"


@pytest.mark.parametrize(
  "code",
  [
    "completions.clear(); rows.clear(); return []",
    "completions.pop(); return [1.0] * len(completions)",
    "return {1.0, 2.0, 3.0}",
    "return b'123'",
    "return dict.fromkeys(range(3)).keys()",
    "return np.array(['1', '2', '3'])",
    "return [np.str_('1')] * 3",
    "return [1j, np.complex64(2), 3]",
    "return (1.0 for _ in completions)",
    "sys.exit(0)",
  ],
)
def test_what_is_no_list_of_numbers_masks_the_whole_batch(build, code):
  head = "import sys\nimport numpy as np\ndef score(rows, completions):\n  if len(rows) == 2: return [1.0, 1.0]\n  "
  verdicts = build(head + code).verify([ROW] * 3, [said("x")] * 3)
  assert [(verdict.masked, verdict.cause) for verdict in verdicts] == [(True, "error")] * 3


HANGS = """
import re, time
def hang(text):
  if text == "wait":
    time.sleep(60)
  while text == "loop":
    try: time.sleep(0)
    except Exception: pass
  if text == "match": re.match("(a+)+$", "a" * 40 + "b")
  return 1.0
"""


@pytest.mark.parametrize("how", ["wait", "loop", "match"])
@pytest.mark.parametrize("of", ["row, completion", "rows, completions"])
def test_a_reward_that_hangs_is_ended_at_its_limit_and_masked(build, of, how, capsys):
  one = of[3] == ","
  body = "hang(completion.content)" if one else "[hang(c.content) for c in completions]"
  domain = build(f"{HANGS}def score({of}):\n  return {body}", limit_s=0.05)
  began = time.monotonic()
  fine, hung = domain.verify([ROW] * 2, [said("fine"), said(how)])
  assert time.monotonic() - began < 5
  assert (hung.masked, hung.cause) == (True, "time") and "did not return within 0.05 s" in hung.reason
  assert fine == Verdict(1.0, "score 1") if one else fine.masked  # A batch is one call.
  (line,) = capsys.readouterr().err.splitlines()
  assert "own_0.py" in line and "rollout/masked_time" in line
  assert domain.verify([ROW], [said("fine")]) == [Verdict(1.0, "score 1")]


def test_a_batch_does_not_wait_for_every_completion_that_hangs(build):
  domain = build(
    HANGS + "calls = []\ndef score(row, completion):\n  calls.append(1)\n  return hang(completion.content)",
    limit_s=0.05,
  )
  verdicts = domain.verify([ROW] * 20, [said("wait")] * 20)
  assert [v.cause for v in verdicts] == ["time"] * 20
  assert sum("calls before it took over" in v.reason for v in verdicts) == 17
  assert not domain.verify([ROW], [said("fine")])[0].masked  # The next batch is called again.


def test_a_reward_that_hangs_at_its_trial_is_refused(build):
  with pytest.raises(UserError, match="own_0.py:score.*on the row of .*did not return within 0.05 s"):
    build("def score(row, completion):\n  while True: pass", limit_s=0.05)


@pytest.mark.parametrize("place", [0, 11, 38, "heldout"])
def test_a_reward_is_tried_on_rows_from_all_over_the_files(build, tmp_path, place):
  """Rows near the beginning may be of one kind, and those that follow of another."""
  lines = [json.dumps(ROW | {"prompt": f"How many are {i}?"}) for i in range(40)]
  for i in range(4) if place == "heldout" else range(max(0, place - 10), min(40, place + 10)):
    lines[i] = json.dumps({"prompt": f"What of {i}?"})
  training = ["{}"] if place == "heldout" else lines
  (tmp_path / "held.jsonl").write_text("\n".join(lines if place == "heldout" else [json.dumps(ROW)]) + "\n")
  if place == "heldout":
    training = [json.dumps(ROW | {"prompt": f"How large are {i}?"}) for i in range(40)]
  (tmp_path / "mine.jsonl").write_text("\n".join(training) + "\n")
  (tmp_path / "own.py").write_text("def score(row, completion):\n  return row['limit']")
  entry = {"rows": f"{tmp_path}/mine.jsonl", "heldout": f"{tmp_path}/held.jsonl", "verify": f"{tmp_path}/own.py:score"}
  with pytest.raises(UserError, match="domains.mine.verify=.*KeyError: 'limit'") as error:
    domains.build(config(mine=entry))
  assert ("held.jsonl" if place == "heldout" else "mine.jsonl, line") in str(error.value)


def test_a_reward_that_leaves_the_process_is_masked_and_refused_at_the_trial(build):
  code = "import sys\ndef score(row, completion):\n  if completion.content {} 'go': sys.exit(0)\n  return 1.0"
  (verdict,) = build(code.format("==")).verify([ROW], [said("go")])
  assert verdict.masked and "SystemExit" in verdict.reason
  with pytest.raises(UserError, match="own_1.py:score.*SystemExit: 0 .line 3"):
    build(code.format("!="))


@pytest.mark.parametrize("reward", ["1e39", "-1e300", "np.float64(3.5e38)"])
def test_a_reward_too_large_for_fp32_is_not_finite(build, reward):
  """A batch of rewards is fp32: an infinity in it would make its group NaN."""
  code = f"import numpy as np\ndef score(row, completion):\n  return {reward} if completion.content == 'go' else 1"
  assert build(code).verify([ROW], [said("go")])[0].cause == NONFINITE
  assert not Verdict(3.4e38, "").masked


# Environments.


def test_an_environment_answers_and_its_world_is_judged(build):
  domain = build(SHOP + "def score(row, completion):\n  return completion.world['count']", environment="Shop")
  assert domain.turns == 3
  row = domain.rows.train(0, 0)
  world = domain.start(row)
  call = Turn(None, "", (ToolCall("add", {}), ToolCall("add", {})), None, True)
  assert domain.act(world, call) == ["2", "2"] and domain.act(world, Turn(None, "done", (), None, True)) is None
  assert domain.verify([row], [said("done", world)])[0].reward == 2.0


def test_turns_may_be_limited_by_the_config_and_have_a_default(build):
  score = "def score(row, completion):\n  return 1.0\n"
  assert build(SHOP + score, environment="Shop", max_turns=7).turns == 7
  assert build((SHOP + score).replace("  max_turns = 3\n", ""), environment="Shop").turns == 8


def test_an_own_environment_serves_a_built_in_verifier_and_a_built_in_one_an_own_reward(build):
  domain = build(SHOP, verify=":math", environment="Shop", rows={"expected_answer": "5"})
  assert domain.verify([domain.rows.train(0, 0)], [said("\\boxed{5}")])[0].reward == 1.0
  score = "def score(row, completion):\n  return len(completion.world.state())"
  entry = {"rows": "generated:tools", "verify": "", "environment": "tools"}
  path = domain.rows.training.files[0].parent / "reward.py"
  path.write_text(score)
  mixed = domains.build(config(mine=entry | {"verify": f"{path}:score"}))["mine"]
  assert mixed.turns == 4 and mixed.environment is not None


@pytest.mark.parametrize(
  "code, words",
  [
    ("class Shop:\n  def __init__(self, size): pass", ["cannot be made without arguments: TypeError"]),
    ("class Shop:\n  def start(self, row): return 1", ["must have start(self, row) and act(self, world, turn)"]),
    (
      "class Shop:\n  def start(self): return 1\n  def act(self, world, turn): return None",
      ["must have start(self, row)"],
    ),
    (SHOP.replace('world["count"] +=', "world.count +="), ["AttributeError", "line 9"]),
    (SHOP.replace("return None", "return done"), ["NameError", "line 8"]),
    (SHOP.replace("3", "0"), ["max_turns=0: must be a whole number of at least 1"]),
    (SHOP.replace("row['limit']", "row['x']").replace('row["limit"]', 'row["x"]'), ["KeyError: 'x'", "line 5"]),
    (SHOP.replace("return [str", "return str([str").replace("tool_calls]\n", "tool_calls])\n"), ["act returned str"]),
    (
      SHOP.replace('[str(world["count"])', '[world["count"]'),
      ["act returned list of length 1 [1]: must be a list of texts"],
    ),
    (
      SHOP.replace("for _ in turn.tool_calls]", "for _ in 'ab']"),
      ["list of length 2 ['1', '1'] for 1 calls", "a call"],
    ),
    (SHOP.replace("return None", "return []"), ["act returned list of length 0 [] for 0 calls"]),
    (SHOP.replace("return None", "return ['']"), ["act returned list of length 1 [''] for 0 calls"]),
    (SHOP.replace("    if not", "    while True: pass\n    if not"), ["did not return within 1 s", "line 7"]),
  ],
)
def test_an_environment_that_does_not_work_is_one_line_before_anything_runs(build, tmp_path, code, words):
  with pytest.raises(UserError) as error:
    build(code + "\ndef score(row, completion):\n  return 1.0\n", environment="Shop", limit_s=1)
  line = str(error.value)
  assert line.startswith(f"domains.mine.environment='{tmp_path}/own_0.py:Shop'") and "\n" not in line
  assert all(word in line for word in words), line


def test_an_environment_may_need_the_arguments_of_a_call(build):
  code = SHOP.replace("len(turn.tool_calls)", "int(turn.tool_calls[0].arguments['n'])", 1)
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop")
  world = domain.start(ROW)
  assert domain.act(world, Turn(None, "", (ToolCall("add", {"n": "3"}),), None, True)) == ["3"]
  assert domain.act(world, Turn(None, "", (ToolCall("add", {}),), None, True))[0].startswith("error: KeyError: 'n'")


def test_an_environment_that_fails_later_tells_the_model(build):
  code = SHOP.replace("    world[", "    if turn.content: raise RuntimeError('sold out')\n    world[", 1)
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop")
  world, calls = domain.start(ROW), (ToolCall("add", {}), ToolCall("add", {}))
  (first, second) = domain.act(world, Turn(None, "now", calls, None, True))
  assert first == second and first.startswith("error: RuntimeError: sold out")
  assert domain.act(world, Turn(None, "", calls, None, True)) == ["2", "2"]


def test_a_wrong_number_of_results_later_tells_the_model_once_a_call(build, capsys):
  code = SHOP.replace("for _ in turn.tool_calls]", "for _ in turn.tool_calls[:1]]")
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop")
  calls = (ToolCall("add", {}), ToolCall("add", {}))
  found = domain.act(domain.start(ROW), Turn(None, "", calls, None, True))
  assert len(found) == 2 and all("act returned list of length 1 ['2'] for 2 calls" in text for text in found)
  assert "must be one text a call" in capsys.readouterr().err


def test_an_environment_that_hangs_later_tells_the_model_or_masks_the_episode(build):
  code = SHOP.replace("    world[", "    while turn.content: pass\n    world[", 1)
  code = code.replace("    return {", "    while row.get('sold'): pass\n    return {", 1)
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop", limit_s=0.05)
  (said_,) = domain.act(domain.start(ROW), Turn(None, "now", (ToolCall("add", {}),), None, True))
  assert said_.startswith("error: TookTooLong: did not return within 0.05 s")
  assert "did not return within 0.05 s" in domain.start(ROW | {"sold": True}).reason


def test_a_world_that_is_a_part_of_the_row_is_not_shared_between_episodes(build):
  code = SHOP.replace('{"limit": row["limit"], "count": 0}', 'row["stock"]').replace('"count"', '"left"')
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop", rows={"stock": {"left": 5}})
  row = domain.rows.train(0, 0)
  for world in (domain.start(row), domain.start(row)):
    assert domain.act(world, Turn(None, "", (ToolCall("add", {}),), None, True)) == ["6"]
  assert row["stock"] == {"left": 5}


@pytest.mark.parametrize("fault", ["raise KeyError('stock')", "import sys; sys.exit(0)"])
def test_an_environment_that_cannot_start_later_masks_the_episode(build, fault):
  code = SHOP.replace("    return {", f"    if row.get('sold'): {fault}\n    return {{", 1)
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop")
  call, row = Turn(None, "", (ToolCall("add", {}),), None, True), domain.rows.train(0, 0) | {"sold": True}
  world = domain.start(row)
  assert domain.act(world, call) is None
  answers = [[said("x", world)], [said("x", domain.start(ROW))]]
  samples = types.SimpleNamespace(rows=[row, ROW], domains=["mine"] * 2, completions=answers, judging=None)
  (bad,), (good,) = rewards.judge(samples, {"mine": domain})
  assert (bad.masked, bad.cause) == (True, "error") and "failed to start: " in bad.reason and not good.masked


def test_an_environment_that_leaves_the_process_tells_the_model(build):
  code = SHOP.replace("    world[", "    if turn.content: raise SystemExit(0)\n    world[", 1)
  domain = build(code + "def score(row, completion):\n  return 1.0\n", environment="Shop")
  found = domain.act(domain.start(ROW), Turn(None, "now", (ToolCall("add", {}),), None, True))
  assert found == ["error: SystemExit: 0 (line 9 of own_0.py)"]


# Names.


@pytest.mark.parametrize(
  "entry, words",
  [
    ({"rows": "x.jsonl"}, "domains.mine.verify is missing: 'mine' is no built-in domain; give FILE.py:NAME, or one of"),
    ({"rows": "x.jsonl", "verify": "mth"}, "unknown domains.mine.verify 'mth': did you mean 'math'"),
    (
      {"rows": "x.jsonl", "verify": "math", "environment": "tool"},
      "domains.mine.environment 'tool': did you mean 'tools'",
    ),
    ({"rows": "x.jsonl", "verify": "none.py:score"}, "domains.mine.verify='none.py:score': there is no file 'none.py'"),
    ({"verify": "math"}, "domains.mine.rows is missing: give generated:NAME, or a file of JSON lines"),
  ],
)
def test_a_wrong_name_is_answered_before_any_row_is_read(entry, words):
  with pytest.raises(UserError) as error:
    domains.check(config(mine=entry))
  assert words in str(error.value)
