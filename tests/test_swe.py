"""Software engineering: the tests of the repaired repository decide, for edits and for tool use."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from composed import compose

from nemocascade.data.chat import ToolCall, Turn
from nemocascade.domains import repository, swe
from nemocascade.domains.rows import make_prompt, prompt_messages
from nemocascade.generated import generator
from nemocascade.generated import swe as generated_swe
from nemocascade.sandbox.program import Result
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.verifiers import edits
from nemocascade.verifiers.verdict import Completion, no_verdict

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"
COUNT = 200


@pytest.fixture(scope="module")
def box():
  return Sandbox(cpu_s=1, wall_s=2.5)


@pytest.fixture(scope="module", params=["swe", "swe_agentic"])
def task(request, box):
  return compose(request.param, sandbox=box)


@pytest.fixture(scope="module")
def agentless(box):
  return compose("swe", sandbox=box)


@pytest.fixture(scope="module")
def agentic(box):
  return compose("swe_agentic", sandbox=box)


def complete(content):
  return Completion((Turn(reasoning="", content=content, finished=True),))


def turn(*calls, content="", finished=True):
  tool_calls = tuple(ToolCall(name, arguments) for name, arguments in calls)
  return Turn(reasoning=None, content=content, tool_calls=tool_calls, finished=finished)


def play(task, row, messages):
  """The episode of the given assistant messages, and the tool results in it."""
  world, turns, results = task.start(row), [], []
  for message in messages:
    if message["role"] == "tool":
      results.append(message["content"])
      continue
    calls = [c["function"].values() for c in message.get("tool_calls", ())]
    turns.append(turn(*calls, content=message["content"]))
    if world is not None:
      assert (task.act(world, turns[-1]) or []) == [
        m["content"] for m in messages[len(turns) + len(results) :][: len(calls)]
      ]
  return Completion(tuple(turns), world)


def rewards(task, rows, *, thinking, seed=0, **style):
  rng = np.random.default_rng(seed)
  usual = task.rows.generator
  author = type(usual)(dataclasses.replace(usual.style, **style))
  episodes = [play(task, row, author.demonstrate(row, rng, thinking=thinking)) for row in rows]
  verdicts = task.verify(rows, episodes)
  assert not any(v.masked for v in verdicts)
  return np.array([v.reward for v in verdicts])


def test_demonstrations_succeed_as_often_as_their_styles_let_them(task):
  rows = generator.rows(task.rows.generator, "train", 0, 0, COUNT)
  for thinking in {task.thinking, False}:
    assert 0.26 <= rewards(task, rows, thinking=thinking).mean() <= 0.48
    assert rewards(task, rows, thinking=thinking, sloppy_rate=0.0).min() == 1.0
    erring = rewards(task, rows, thinking=thinking, sloppy_rate=1.0, error_rate=1.0)
    assert erring.max() == 0.0


def test_there_are_thousands_of_prompts(task):
  rng = np.random.default_rng(0)
  prompts = {prompt_messages(task.rows.generator.make_row(rng))[0]["content"] for _ in range(6000)}
  assert len(prompts) > 2000


def test_the_bug_fails_its_test_and_passes_the_other(task, box):
  for row in generator.rows(task.rows.generator, "heldout", 0, 0, 20):
    tests, files = swe.wanted_tests(row), swe.repository_files(row)
    (result,) = box.run_batch([repository.tests_program(files, tests)])
    failed = repository.failed_tests(result, tests)
    assert failed == json.loads(row["instance"]["FAIL_TO_PASS"])
    assert set(tests) - set(failed) == set(json.loads(row["instance"]["PASS_TO_PASS"]))


def test_expected_values_never_enter_the_sandbox(task):
  (row,) = generator.rows(task.rows.generator, "train", 0, 0, 1)
  tests = swe.wanted_tests(row)
  program = repository.tests_program(swe.repository_files(row), tests)
  assert [c.arguments for c in program.calls] == [*generated_swe.INPUTS] * 2
  assert program.files == swe.repository_files(row)


def test_no_operator_is_in_the_issue_and_its_sign_is_not_in_an_agents_prompt(agentless, agentic):
  for row in generator.rows(agentic.rows.generator, "train", 0, 0, 50):
    text = prompt_messages(row)[0]["content"]
    assert not set(text) & set("+-*/")
  for row in generator.rows(agentless.rows.generator, "train", 0, 0, 50):
    text = prompt_messages(row)[0]["content"]
    assert not set(text.split("\n")[0]) & set("+-*/")


# Edits.


def edit_of(row, line):
  bug = generated_swe.Bug(**row["instance"]["bug"])
  return edits.show(edits.Edit(bug.path, swe.repository_files(row)[bug.path].strip(), line))


def test_thoughts_name_a_file_and_an_operator_that_the_edit_then_uses(agentless):
  for row in generator.rows(agentless.rows.generator, "train", 0, 0, 50):
    (message,) = agentless.rows.generator.demonstrate(row, np.random.default_rng(1), thinking=True)
    first, second = (line.split() for line in message["reasoning_content"].split("\n"))
    assert {first[0], second[0]} <= {agentless.rows.generator.style.careful, agentless.rows.generator.style.sloppy}
    (edit,) = edits.parse(message["content"])
    assert (edit.path, edit.replace.split()[-2]) == (first[-1], second[-1])


def test_any_right_edit_passes(agentless):
  (row,) = generator.rows(agentless.rows.generator, "train", 0, 0, 1)
  bug = generated_swe.Bug(**row["instance"]["bug"])
  line = f"def {bug.name}(a, b):\n  result = a {bug.right} b\n  return result"
  text = f"I think so:\n### solution\n{edit_of(row, line)}\n"
  assert agentless.verify([row], [complete(text)])[0].reward == 1.0


CHEATS = {
  "leaves at once": "import os; os._exit(0)",
  "leaves politely": "raise SystemExit(0)",
  "equals everything": (
    "class E(int):\n  __eq__ = lambda *a: True\nNAME = lambda a, b: E(0)"
  ),
  "breaks the other": "def NAME(a, b): return a RIGHT b\nimport os, OTHER\ndel OTHER.__dict__[[x for x in vars(OTHER) if x[0] != '_'][0]]",
  "loops": "while True: pass",
  "is no code": "def NAME(",
  "is gone": "",
  "is binary": "\0\ud800",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_an_edit_that_does_not_repair_gets_nothing(agentless, name):
  (row,) = generator.rows(agentless.rows.generator, "train", 0, 0, 1)
  bug = generated_swe.Bug(**row["instance"]["bug"])
  (other,) = (p.removesuffix(".py") for p in swe.repository_files(row) if p != bug.path)
  line = CHEATS[name].replace("NAME", bug.name).replace("RIGHT", bug.right).replace("OTHER", other)
  (found,) = agentless.verify([row], [complete(edit_of(row, line))])
  assert (found.reward, found.masked) == (0.0, False) and found.reason


@pytest.mark.parametrize("text", ["", "Done.", "```diff\n```", "\0\ud800", "```" * 10_000])
def test_text_without_edits_gets_nothing_and_a_reason(agentless, text):
  (row,) = generator.rows(agentless.rows.generator, "train", 0, 0, 1)
  (found,) = agentless.verify([row], [complete(text)])
  assert (found.reward, found.masked) == (0.0, False) and found.reason


def test_an_edit_that_keeps_the_bug_or_breaks_another_file_gets_nothing(agentless):
  (row,) = generator.rows(agentless.rows.generator, "train", 0, 0, 1)
  bug, files = generated_swe.Bug(**row["instance"]["bug"]), swe.repository_files(row)
  assert "change nothing" in agentless.verify([row], [complete(edit_of(row, files[bug.path].strip()))])[0].reason
  (other,) = (path for path in files if path != bug.path)
  right = edit_of(row, f"def {bug.name}(a, b): return a {bug.right} b")
  broken = edits.show(edits.Edit(other, files[other].strip(), "x = 1"))
  (found,) = agentless.verify([row], [complete(f"{right}\n{broken}")])
  assert found.reward == 0.0 and json.loads(row["instance"]["PASS_TO_PASS"])[0] in found.reason


# Tools.


def test_an_agent_views_replaces_tests_and_is_judged_by_what_it_leaves(agentic):
  (row,) = generator.rows(agentic.rows.generator, "train", 0, 0, 1)
  bug, world = generated_swe.Bug(**row["instance"]["bug"]), agentic.start(row)
  view = ("view", {"path": bug.path})
  assert agentic.act(world, turn(view)) == [f"def {bug.name} ( a , b ) : return a {bug.wrong} b"]
  change = {"path": bug.path, "old": bug.wrong, "new": bug.right}
  results = agentic.act(world, turn(("test", {}), ("replace", change), ("test", {}), view))
  fixed = f"def {bug.name} ( a , b ) : return a {bug.right} b"
  assert results == ["failed", repository.REPLACED, "passed", fixed]
  assert agentic.act(world, turn(content="Done.")) is None
  episode = Completion((turn(content="Done."),), world)
  assert agentic.verify([row], [episode])[0].reward == 1.0


def test_an_episode_without_its_world_is_played_again(agentic):
  rows = generator.rows(agentic.rows.generator, "train", 0, 0, 40)
  rng = np.random.default_rng(0)
  episodes = [play(agentic, row, agentic.rows.generator.demonstrate(row, rng, thinking=False)) for row in rows]
  texts = [Completion(episode.turns) for episode in episodes]
  assert agentic.verify(rows, texts) == agentic.verify(rows, episodes)


def test_an_episode_that_changes_nothing_gets_nothing(agentic):
  (row,) = generator.rows(agentic.rows.generator, "train", 0, 0, 1)
  (found,) = agentic.verify([row], [Completion((turn(content="Done."),), agentic.start(row))])
  assert (found.reward, found.reason) == (0.0, "nothing was changed")


def test_a_turn_that_was_cut_off_acts_no_more(agentic):
  (row,) = generator.rows(agentic.rows.generator, "train", 0, 0, 1)
  assert agentic.act(agentic.start(row), turn(("test", {}), finished=False)) is None


@pytest.mark.parametrize(
  ("name", "arguments", "reply"),
  [
    ("view", {"path": "/etc/passwd"}, "error: no file /etc/passwd"),
    ("view", {"path": "../x\n\ny"}, "error: no file ../x y"),
    ("view", {}, "error: view takes path"),
    ("view", {"path": "a.py", "line": "1"}, "error: view takes path"),
    ("test", {"x": "1"}, "error: test takes nothing"),
    ("shell", {"command": "ls"}, "error: no such function"),
    ("replace", {"path": "b.py", "old": "x", "new": "y"}, "error: no file b.py"),
    ("replace", {"path": "a.py", "old": "z", "new": "y"}, repository.NOT_FOUND),
    ("replace", {"path": "a.py", "old": "x", "new": "y"}, repository.NOT_UNIQUE),
    ("replace", {"path": "a.py", "old": "", "new": "y"}, "error: old is empty"),
    ("replace", {"path": "a.py", "old": "x = 1", "new": "y" * 10**6}, "error: file too long"),
    ("test", {}, f"error: {swe.NO_TESTS}"),
  ],
)
def test_a_call_that_cannot_be_is_answered_and_changes_nothing(agentic, name, arguments, reply):
  world = swe.World(repository.Repository({"a.py": "x = 1\ny = x\n"}), {})
  assert agentic.act(world, turn((name, arguments))) == [reply]
  assert world.repository.files == {"a.py": "x = 1\ny = x\n"}


def test_an_agents_tests_show_one_case_and_the_judges_are_more(agentic):
  (row,) = generator.rows(agentic.rows.generator, "train", 0, 0, 1)
  bug, world = generated_swe.Bug(**row["instance"]["bug"]), agentic.start(row)
  tests = swe.wanted_tests(row)
  first = tests[f"test_{bug.name}"]["outputs"][0]
  cheat = {"path": bug.path, "old": f"a {bug.wrong} b", "new": str(first)}
  assert agentic.act(world, turn(("replace", cheat), ("test", {}))) == [
    repository.REPLACED,
    "passed",
  ]
  assert agentic.verify([row], [Completion((), world)])[0].reward == 0.0


# Samples that cannot be judged.


def test_a_broken_sandbox_is_masked_not_failed():
  class Broken:
    def run_batch(self, programs):
      return [Result("unstarted", reason="no room")] * len(programs)

  task = compose("swe", sandbox=Broken())
  (row,) = generator.rows(task.rows.generator, "train", 0, 0, 1)
  (found,) = task.verify([row], [complete(edit_of(row, "x = 1"))])
  assert found.masked and "no room" in found.reason


def released_row():
  """A row in the released form: an instance of a real repository, with some of its files."""
  files = {"pkg/a.py": "x = 1\r\ny = 2\nz = 3\n"}
  instance = {"FAIL_TO_PASS": '["t.py::test_a"]', "PASS_TO_PASS": "[]", "test_script": "pytest"}
  row = make_prompt("swerl_gen_simple_agent", "Fix it.", instance=instance)
  return {**row, "metadata": {"relevant_file_contents": json.dumps(files), "image": "x.sif"}}


@pytest.mark.parametrize(
  ("edit", "masked"),
  [
    (edits.Edit("pkg/a.py", "y = 2", "y = 3"), True),
    (edits.Edit("pkg/b.py", "y = 2", "y = 3"), True),  # The file may exist in the repository, though not in this row.
    (edits.Edit("pkg/a.py", "q = 2", "q = 3"), False),
    (edits.Edit("pkg/a.py", "y = 2", "y = 2"), False),
  ],
)
def test_a_released_row_never_passes_here_and_fails_only_where_edits_cannot_apply(edit, masked):
  (found,) = swe.make_verify()([released_row()], [complete(edits.show(edit, "python"))])
  assert (found.reward, found.masked) == (0.0, masked) and found.reason
  (found,) = swe.make_verify()([released_row()], [complete("no edit")])
  assert (found.reward, found.masked) == (0.0, False)


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not part of the project")
def test_the_released_rows_are_read_and_masked(agentless, agentic):
  for line in (GYM / "swerl_gen.jsonl").read_text().splitlines():
    row = json.loads(line)
    path, text = next(iter(swe.repository_files(row).items()))
    lines = text.split("\n")
    unique = next(x for x in lines if x.strip() and lines.count(x) == 1)
    edit = edits.Edit(path, unique, f"{unique}  # Seen.")
    (found,) = agentless.verify([row], [complete(edits.show(edit))])
    assert found.masked and found.cause == ("row" if row["mode"] == "eval" else "unknown")
    episode = Completion((turn(("view", {"path": path})), turn(content="Done.")))
    assert agentic.verify([row], [episode])[0].masked
  for line in (GYM / "swe_agents.jsonl").read_text().splitlines():
    row = json.loads(line)
    world = agentic.start(row)
    assert agentic.act(world, turn(("test", {}))) == [f"error: {swe.NO_TESTS}"]
    (found,) = agentic.verify([row], [Completion((turn(content="Done."),), world)])
    assert found == no_verdict("row", swe.NO_TESTS)


TEST = {"path": "a.py", "fn_name": "f", "inputs": [[1]], "outputs": [2]}
NESTED = json.loads("[" * 700 + "]" * 700)


@pytest.mark.parametrize(
  "instance",
  [{"tests": {"t": {**TEST, "outputs": []}}}, {"tests": {"t": {**TEST, "outputs": [2, 3]}}},
   {"tests": {"t": {**TEST, "inputs": [], "outputs": []}}}, {"tests": {"t": {**TEST, "fn_name": 5}}},
   {"tests": {"t": {**TEST, "inputs": [[NESTED]]}}}, {"tests": {"t": TEST}, "FAIL_TO_PASS": "[]"}],
)  # fmt: skip
def test_a_row_without_tests_that_can_decide_is_masked(box, instance):
  instance = {"FAIL_TO_PASS": '["t"]', "PASS_TO_PASS": "[]"} | instance
  files = {"a.py": "def f(x):\n  return x\n"}
  row = make_prompt("swe", "x", metadata={"relevant_file_contents": json.dumps(files)}, instance=instance)
  answer = edits.show(edits.Edit("a.py", "  return x", "  return x + 1"))
  (verdict,) = swe.make_verify(box)([row], [complete(answer)])
  assert verdict.masked and verdict.cause in ("row", "crash")
