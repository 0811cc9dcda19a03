"""Answers, boxes, outputs and code blocks with their correct verdicts: cases/maths.json."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import code, math, preference, swe
from nemocascade.domains.rows import make_prompt
from nemocascade.rollout import rewards
from nemocascade.sandbox import limited
from nemocascade.verifiers import arithmetic, boxed, equality, outputs, scorers
from nemocascade.verifiers.verdict import Completion, Verdict

HERE = pathlib.Path(__file__).parent
CASES = json.loads((HERE / "cases/maths.json").read_text())
GYM = HERE.parents[1] / "shared/data/gym"
EVALUATING = (  # Datasets of reasoning-gym whose scorers evaluate the answer as code.
  "binary_matrix", "countdown", "intermediate_integration", "n_queens", "number_sorting",
  "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
)  # fmt: skip


def rows(kind):
  return [pytest.param(*case, id=f"{name}-{i}") for i, (name, *case) in enumerate(CASES[kind])]


def complete(content):
  turn = Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True)
  return Completion((turn,))


@pytest.mark.parametrize(("expected", "answer", "right"), rows("equal"))
def test_an_answer_is_worth_what_it_says(expected, answer, right):
  assert equality.equal(expected, answer) is right


@pytest.mark.parametrize(("text", "inside"), rows("boxed"))
def test_a_box_is_found_as_latex_writes_it(text, inside):
  assert boxed.last_boxed(text, (boxed.BOXED, boxed.FBOX)) == inside


@pytest.mark.parametrize(("expected", "given", "right"), rows("outputs"))
def test_printed_numbers_are_exact_unless_fractions_are_expected(expected, given, right):
  assert outputs.same_text(expected, given) is right


@pytest.mark.parametrize(("expected", "given", "right"), rows("values"))
def test_values_are_exact_unless_floats_are_expected(expected, given, right):
  assert outputs.same_value(expected, given) is right


@pytest.mark.parametrize(("content", "block"), rows("blocks"))
def test_the_block_between_the_last_two_fences_counts(content, block):
  assert code.last_block(content) == block


@pytest.mark.parametrize(("mode", "cause"), rows("modes"))
def test_a_task_that_has_no_verifier_is_masked(mode, cause):
  row = {"mode": mode, "metadata": {"relevant_file_contents": json.dumps({"a.py": "x = 1\n"})}}
  edit = "```diff\na.py\n<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n>>>>>>> REPLACE\n```"
  (found,) = swe.make_verify()([row], [complete(edit)])
  assert (found.reward, found.masked, found.cause) == (0.0, True, cause)


@pytest.mark.parametrize(("metadata", "truth", "answer", "right"), rows("scores"))
def test_scores_are_those_of_reasoning_gym(metadata, truth, answer, right):
  row = {"question": "", "answer": truth, "metadata": metadata}
  assert math.judge(row, complete(answer)).reward == pytest.approx(right)


def entry(dataset):
  metadata = {
    "source_dataset": dataset, "numbers": [1], "target": 1, "variable": "x", "integrand": "x",
    "valid_answers": [], "direction": "ascending",
  }  # fmt: skip
  return {"question": "", "answer": "1", "metadata": metadata}


def test_no_answer_is_evaluated(tmp_path):
  """Runs hostile answers in an unconfined process; any code that runs creates a file."""
  place = tmp_path / "mark"
  answers = [answer.replace("PLACE", str(place)) for answer in CASES["hostile"]]
  questions = [(name, json.dumps(entry(name)), answer) for name in EVALUATING for answer in answers]
  program = (
    "import json, pathlib, sys; import reasoning_gym; from nemocascade.verifiers import scorers;"
    "scorers.prepare(); place, questions = json.load(sys.stdin);"
    "scores = [(scorers.grade(*q), pathlib.Path(place).exists(), q) for q in questions];"
    "print(json.dumps([s for s in scores if s[0] > 0.05 or s[1]]), len(scores))"
  )
  ran = subprocess.run(
    [sys.executable, "-c", program], input=json.dumps([str(place), questions]),
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert ran.stdout.split() == ["[]", str(len(EVALUATING) * len(answers))]


def test_every_scorer_that_evaluates_text_has_a_parser_in_its_place():
  """Checks the installed release of reasoning-gym, so that a new scorer that evaluates answers is noticed."""
  import ast

  import reasoning_gym

  root = pathlib.Path(reasoning_gym.__file__).parent
  calls = set()
  for path in root.rglob("*.py"):
    if "contrib" in path.parts or "gsm_symbolic" in path.parts:
      continue  # These only generate rows; the scorer of gsm_symbolic reads one number.
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ("eval", "exec") or name.endswith("sympify"):
          calls.add((".".join(path.relative_to(root).with_suffix("").parts), name))
  made = {("arithmetic.basic_arithmetic", "eval"), ("code.codeio", "exec")}  # Called when rows are generated.
  assert calls - made == {(module, "eval") for module in (*scorers.LITERALS, *scorers.WHOLE)}


@pytest.mark.parametrize("answer", [*CASES["hostile"], "x.y", "f(1)", "exp(1, 2)", "'a'", "True", "2j",
                                    "9**9**9", "[1]", "1 < 2", "x!", "", "(" * 5000])  # fmt: skip
def test_what_is_no_arithmetic_is_refused(answer):
  with pytest.raises(ValueError):
    arithmetic.parse(answer)


@pytest.mark.parametrize(
  "text",
  ["1/3 + 2*x**2", "-(x - y)/2", "exp(sin(x))*cos(x)", "sqrt(2)*pi", "log(x) - E", "0.1", "2**-3", "+5"],
)
def test_arithmetic_is_what_sympy_reads(text):
  program = f"import sympy; print(sympy.parse_expr({text!r}))"  # Unpatched sympy, in a separate process.
  theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert str(arithmetic.parse(text)) == theirs.stdout.strip()


def test_a_process_refuses_to_run_what_it_reads():
  import graders

  with pytest.raises(limited.NoAnswer) as found:
    limited.call(graders.evaluate, "1 + 1")
  assert found.value.cause == "evaluation"
  assert limited.call(graders.echo, 1) == [1, 1]


def test_a_scorer_that_would_evaluate_masks_and_is_not_remembered(monkeypatch):
  def refused(*_, **__):
    raise limited.NoAnswer("evaluation", "it would have run")

  monkeypatch.setattr(scorers.limited, "call", refused)
  row = {"question": "q", "answer": "no other test asks this", "metadata": {"source_dataset": "dice"}}
  found = math.make_verify()([row], [complete("1")])[0]
  assert (found.masked, found.cause) == (True, "evaluation")
  monkeypatch.undo()
  assert not math.make_verify()([row], [complete("1")])[0].masked


@pytest.mark.parametrize(
  ("solution", "names"),
  [
    ("def f(a: List[int]) -> Optional[int]: return Counter(a)", {"List", "Optional", "Counter"}),
    ("heappush(q, 1); print(gcd(4, 6), inf)", {"heappush", "gcd", "inf"}),
    ("print(math.sqrt(4), collections.deque())", {"math", "collections"}),
    ("s.split('a').index(1); open('f'); pow(2, 3)", set()),
    ("from __future__ import annotations\nx: List = 1", set()),
  ],
)
def test_a_solution_may_use_what_livecodebench_imports(solution, names):
  namespace, limit = {}, sys.getrecursionlimit()
  try:
    exec(code.prelude(solution), namespace)
  finally:
    sys.setrecursionlimit(limit)  # The prelude raises it, for this process too.
  assert names <= namespace.keys()
  assert namespace.keys() <= names | {"__builtins__", "sys"}


def test_rows_without_a_reference_are_judged_by_the_pairs():
  from test_score import judged

  samples, _ = judged([[0, 0], [0, 0]])
  row = make_prompt("preference", "How do I clean the lamp today ?")
  verify = preference.make_verify(object())
  verdicts = [verify([row, row], [complete("a"), complete("b")]) for _ in range(2)]
  assert all(v.masked for group in verdicts for v in group)
  rewards_QG = np.array([[3.0, 1.0], [2.0, 4.0]])
  compared = [[Verdict(reward, "compared") for reward in group] for group in rewards_QG.tolist()]
  rollout, counts = rewards.to_rollout(samples, verdicts, compared=compared)
  assert rollout.valid_QG.all() and counts["rollout/masked"] == 0.0
  np.testing.assert_array_equal(rollout.rewards_QG, rewards_QG)
  rollout, counts = rewards.to_rollout(samples, verdicts)  # These rows get only pairwise rewards.
  assert not rollout.valid_QG.any() and counts["rollout/masked"] == 1.0


@pytest.mark.parametrize("name", ["swerl_gen"])
def test_released_rows_of_every_mode_are_masked_not_failed(name):
  path = GYM / f"{name}.jsonl"
  if not path.exists():
    pytest.skip("the released rows are not here")
  released = [json.loads(line) for line in path.read_text().splitlines()]
  causes = {}
  for row in released:
    files = swe.repository_files(row)
    place, text = next((p, t) for p, t in files.items() if t.strip())
    line = next(x for x in text.split("\n") if x.strip() and text.split("\n").count(x) == 1)
    edit = f"```diff\n{place}\n<<<<<<< SEARCH\n{line}\n=======\n{line} #\n>>>>>>> REPLACE\n```"
    (found,) = swe.make_verify()([row], [complete(edit)])
    assert found.masked
    causes[row["mode"]] = found.cause
  assert causes == {"eval": "row", "repro-gen": "unknown"}
