"""The code domain: the hidden tests decide, whatever else a program does."""

import dataclasses
import json
import pathlib
import time

import numpy as np
import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import code
from nemocascade.domains.rows import make_prompt, prompt_messages
from nemocascade.generated import code as generated_code
from nemocascade.generated import generator
from nemocascade.sandbox.program import Program, Result
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.verifiers.verdict import Completion, Verdict

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym/code_gen.jsonl"


AUTHOR = generated_code.Code()


@pytest.fixture(scope="module")
def verify():
  return code.make_verify(Sandbox(cpu_s=1, wall_s=2.5))


@pytest.fixture(scope="module")
def rows():
  return generator.rows(AUTHOR, "train", 0, 0, 300)


def complete(content, reasoning=""):
  turn = Turn(reasoning=reasoning, content=content, tool_calls=(), error=None, finished=True)
  return Completion((turn,))


def block(source):
  return f"```python\n{source}\n```"


def verdict(verify, row, source):
  return verify([row], [complete(block(source))])[0]


def rewards(verify, rows, style=None, thinking=True, seed=0):
  rng = np.random.default_rng(seed)
  author = dataclasses.replace(AUTHOR, style=style or AUTHOR.style)
  messages = [author.demonstrate(row, rng, thinking=thinking)[-1] for row in rows]
  verdicts = verify(rows, [complete(m["content"]) for m in messages])
  assert not any(v.masked for v in verdicts)
  return np.array([v.reward for v in verdicts])


def test_demonstrations_succeed_as_often_as_their_styles_let_them(verify, rows):
  assert 0.25 <= rewards(verify, rows).mean() <= 0.5
  careful = dataclasses.replace(AUTHOR.style, sloppy_rate=0.0)
  assert rewards(verify, rows, careful).min() == 1.0
  assert rewards(verify, rows, careful, thinking=False).min() == 1.0
  erring = dataclasses.replace(AUTHOR.style, sloppy_rate=1.0, error_rate=1.0)
  assert rewards(verify, rows, erring).max() == 0.0


def test_thoughts_have_a_marked_line_for_each_step_which_the_code_repeats(rows):
  for row in rows[:50]:
    (message,) = AUTHOR.demonstrate(row, np.random.default_rng(0), thinking=True)
    steps = [line.split(" ", 1) for line in message["reasoning_content"].split("\n")]
    assert {marker for marker, _ in steps} <= {AUTHOR.style.careful, AUTHOR.style.sloppy}
    assert " ; ".join(line for _, line in steps) in message["content"]
    (message,) = AUTHOR.demonstrate(row, np.random.default_rng(0), thinking=False)
    assert "reasoning_content" not in message


def test_there_are_thousands_of_prompts():
  rng = np.random.default_rng(0)
  prompts = {prompt_messages(AUTHOR.make_row(rng))[0]["content"] for _ in range(6000)}
  assert len(prompts) > 2000


def test_the_prompt_does_not_hold_the_code(rows):
  for row in rows[:50]:
    text = prompt_messages(row)[0]["content"]
    assert not any(sign in text for sign in "+-*/=")


def test_expected_values_never_enter_the_sandbox(rows):
  for row in rows[:20]:
    ((program, _),) = code.make_tests(row, "def f(x): return x")
    assert isinstance(program, Program)
    outputs = [json.loads(y) for y in row["verifier_metadata"]["unit_tests"]["outputs"]]
    entered = [x for call in program.calls for x in call.arguments]
    assert entered == list(generated_code.INPUTS) and outputs != entered


CHEATS = {
  "says so": "print('PASS')\nprint('all tests passed')",
  "leaves at once": "import os\nos._exit(0)",
  "leaves politely": "raise SystemExit(0)",
  "leaves when called": "import os\ndef f(x): os._exit(0)",
  "equals everything": "class E(int):\n  __eq__ = lambda a, b: True\ndef f(x): return E(0)",
  "reprs as asked": "class E:\n  __repr__ = lambda a: '0'\ndef f(x): return E()",
  "writes results": ("import os\nfor _ in range(9): os.write(3, b'{\"value\": true}\\n')\nos._exit(0)"),
  "breaks the launcher": (
    "import builtins, sys\nbuiltins.isinstance = lambda *a: True\n"
    "frame = sys._getframe()\nwhile frame:\n  frame.f_globals['encode'] = lambda *a: '0'\n"
    "  frame = frame.f_back\ndef f(x): return 0"
  ),
  "looks for the tests": (
    "import gc, sys, os\nseen = repr(gc.get_objects())\nfound = os.listdir('.')\n"
    "def f(x): return x if 'outputs' in seen else None"
  ),
  "reads this file": f"exec(open({__file__!r}).read())",
  "loops": "def f(x):\n  while True: pass",
  "floods": "def f(x):\n  while True: print('x' * 1000)",
  "recurs": "def f(x): return f(x)",
  "is no code": "def f(",
  "is empty": "",
  "is binary": "\0\x01\ud800",
  "returns too much": "def f(x): return 'x' * 10**7",
  "returns what never ends": "def f(x):\n  y = []\n  y.append(y)\n  return y",
}


@pytest.mark.parametrize("name", CHEATS)
def test_what_does_not_solve_the_task_gets_nothing(verify, rows, name):
  start = time.monotonic()
  found = verdict(verify, rows[0], CHEATS[name])
  assert (found.reward, found.masked) == (0.0, False) and found.reason
  assert time.monotonic() - start < 6


@pytest.mark.parametrize(
  "content",
  ["", "def f(x): return x", "```python\ndef f(x): return x", "```python\n```",
   "```python\n" * 30_000, "```" * 100_000, "\ud800\0"],
)  # fmt: skip
def test_without_a_block_there_is_no_solution(verify, rows, content):
  (found,) = verify([rows[0]], [complete(content)])
  assert found == Verdict(0.0, "no block of code")


def test_any_right_program_passes(verify):
  row = next(r for r in generator.rows(AUTHOR, "train", 0, 0, 50) if len(r["steps"]) == 2)
  asked = row["steps"]
  symbols = {word: step.code.removesuffix("=") for word, step in generated_code.STEPS.items()}
  (a, m), (b, n) = asked
  source = f"print('noise')\nclass Solution:\n  def f(self, x): return (x {symbols[a]} {m}) {symbols[b]} {n}"
  assert verdict(verify, row, source).reward == 1.0


def io_row(inputs, outputs):
  unit_tests = {"inputs": inputs, "outputs": outputs}
  return {**make_prompt("code", "x"), "verifier_metadata": {"unit_tests": unit_tests}}


def test_programs_are_judged_by_what_they_print(verify):
  row = io_row([f"{i}\n" for i in range(20)], [f"{i * i}\n" for i in range(20)])
  assert verdict(verify, row, "print(int(input()) ** 2)").reward == 1.0
  assert verdict(verify, row, "x = int(input())\nprint(x * x if x < 19 else 0)").reward == 0.0
  failed = verdict(verify, row, "print(int(input()) ** 2)\n1 / 0")
  assert (failed.reward, failed.reason) == (0.0, "error: ZeroDivisionError: division by zero")


def test_a_wrong_program_is_not_run_on_all_tests(monkeypatch):
  box, ran = Sandbox(), []
  run_batch = box.run_batch
  monkeypatch.setattr(box, "run_batch", lambda p: ran.extend(p) or run_batch(p))
  row = io_row([f"{i}\n" for i in range(40)], ["0\n"] * 40)
  right, wrong = complete(block("print(0)")), complete(block("print(1)"))
  verdicts = code.make_verify(box)([row, row], [right, wrong])
  assert [v.reward for v in verdicts] == [1.0, 0.0]
  assert len(ran) == 40 + 1


@pytest.mark.parametrize(
  "metadata",
  [None, {}, {"unit_tests": {"inputs": [], "outputs": []}},
   {"unit_tests": {"inputs": ["1"], "outputs": []}},
   {"unit_tests": {"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}}],
)  # fmt: skip
def test_a_row_without_tests_is_masked(verify, metadata):
  row = {**make_prompt("code", "x"), "verifier_metadata": metadata}
  found = verdict(verify, row, "def f(x): return 1")
  assert found.masked and found.reward == 0.0


def test_a_broken_sandbox_is_masked_not_failed(rows):
  class Broken:
    def run_batch(self, programs):
      return [Result("unstarted", reason="no room")] * len(programs)

  found = verdict(code.make_verify(Broken()), rows[0], "def f(x): return x")
  assert found.masked and "no room" in found.reason


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not part of the project")
def test_released_rows_are_judged():
  released = [json.loads(line) for line in GYM.read_text().splitlines()]
  tests = [row["verifier_metadata"]["unit_tests"] for row in released]
  tables = [dict(zip(t["inputs"], t["outputs"], strict=True)) for t in tests]
  # A program that knows all answers passes; one that always prints -1 fails.
  answer = "import sys\nprint({!r}[sys.stdin.read()])"
  completions = [complete(block(answer.format(table))) for table in tables]
  verify = code.make_verify(Sandbox(cpu_s=2, wall_s=10))
  assert [v.reward for v in verify(released, completions)] == [1.0] * len(released)
  wrong = [complete(block("print(-1)"))] * len(released)
  assert [v.reward for v in verify(released, wrong)] == [0.0] * len(released)


NESTED = "[" * 700 + "]" * 700


@pytest.mark.parametrize(
  "unit_tests",
  [{"inputs": [1], "outputs": ["5"]}, {"inputs": ["1"], "outputs": [5]}, {"inputs": "1", "outputs": "5"},
   {"inputs": {"1": 1}, "outputs": {"5": 1}}, {"inputs": ["1"], "outputs": ["5"], "fn_name": 5},
   {"inputs": ["1"], "outputs": ["5"], "fn_name": ""}, {"inputs": [NESTED], "outputs": ["5"], "fn_name": "f"},
   {"inputs": ["[" * 10**5], "outputs": ["5"], "fn_name": "f"}],
)  # fmt: skip
def test_a_row_whose_tests_have_another_shape_is_masked_and_the_others_are_judged(verify, unit_tests):
  bad, good = (
    make_prompt("code", "x", verifier_metadata={"unit_tests": tests})
    for tests in (unit_tests, {"inputs": [""], "outputs": ["5"]})
  )
  solution = complete(block("def f(x):\n  return 5\nprint(5)"))
  masked, right = verify([bad, good], [solution, solution])
  assert masked.masked and right.reward == 1
