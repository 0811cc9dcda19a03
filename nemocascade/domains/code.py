"""Code: functions and contest programs, judged by hidden tests in the sandbox."""

from __future__ import annotations

import base64
import builtins
import functools
import importlib
import json
import re
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from nemocascade.domains.domain import Verify
from nemocascade.sandbox.program import Call, Program, Result
from nemocascade.sandbox.sandbox import Runner, Sandbox
from nemocascade.verifiers.outputs import same_text, same_value
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

# Most tests that are run per row, as in Nemotron-3-Nano (arXiv 2512.20848). Its first failure ends
# the testing of a solution.
MOST_TESTS = 50
RECURSION = 50_000  # Recursion limit of a solution, in frames, as in LiveCodeBench.

# Modules that LiveCodeBench imports before a solution, in this order: first `from module import *`
# for each, then `import module` for each.
STARRED = (
  "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
  "statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
IMPORTED = tuple(name for name in STARRED if name not in ("builtins", "typing"))
# The public names of `sys` vary between Python builds, so the ones that solutions use are listed.
OF_SYS = ("argv", "exit", "maxsize", "setrecursionlimit", "stderr", "stdin", "stdout")
THINK_TAGS = ("<think>", "</think>")
_FENCE = re.compile(r"^\s*```|```\w*\s*$")
_TILDES = re.compile(r"^\s*~~~")
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")

Test = tuple[Program, Callable[[Result], bool]]  # A program, and whether its result passes.


class UnitTests:
  """A Verify that runs a row's hidden tests in the sandbox; None creates one on first use."""

  def __init__(self, sandbox: Sandbox | None = None):
    self.runner = Runner(sandbox)

  def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """Reward 1 iff all hidden tests pass.

    The tests of all completions run in parallel, in rounds of 1, 2, 4, ... tests per completion.
    """
    verdicts: dict[int, Verdict] = {}
    tests: dict[int, list[Test]] = {}
    for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
      solution = last_block(completion.content)
      try:
        tests[i] = make_tests(row, solution or "")
      except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:  # The row is malformed.
        verdicts[i] = no_verdict("row", f"no test to judge by: {error!r}")
        continue
      if any(tag in completion.content for tag in THINK_TAGS):
        verdicts[i] = Verdict(0.0, "a tag of thoughts in the answer")
      elif not solution:
        verdicts[i] = Verdict(0.0, "no block of code")
    start, count = 0, 1
    while pending := [i for i in range(len(rows)) if i not in verdicts]:
      asked = [(i, test) for i in pending for test in tests[i][start : start + count]]
      results = self.runner.run([program for _, (program, _) in asked])
      for (i, (_, passes)), result in zip(asked, results, strict=True):
        verdict = None if i in verdicts else _failure(result, passes)
        if verdict is not None:
          verdicts[i] = verdict
      start += count
      count *= 2  # Most wrong programs fail in the first round; doubling keeps the rounds few.
      for i in pending:
        if len(tests[i]) <= start:
          verdicts.setdefault(i, Verdict(1.0, "all tests passed"))
    return [verdicts[i] for i in range(len(rows))]


def make_tests(row: Row, solution: str) -> list[Test]:
  """The programs to run, each with a check of its result.

  The expected values never enter the sandbox. If the row has `fn_name`, each input holds the
  arguments as JSON, one per line, and each output the returned value as JSON. Otherwise inputs are
  stdin and outputs are stdout.

  Raises:
    KeyError, TypeError, ValueError, RecursionError, zlib.error: the row is malformed, or has no tests.
  """
  unit_tests = _unpacked(row["verifier_metadata"]["unit_tests"])
  _check_types(unit_tests)
  pairs = list(zip(unit_tests["inputs"], unit_tests["outputs"], strict=True))[:MOST_TESTS]
  if not pairs:
    raise ValueError("the row has no unit tests")
  source = prelude(solution) + solution
  if unit_tests.get("fn_name") is None:
    return [
      (Program({"main.py": source}, stdin=given), functools.partial(_prints, expected)) for given, expected in pairs
    ]
  calls = tuple(
    Call("solution", unit_tests["fn_name"], tuple(json.loads(line) for line in given.split("\n"))) for given, _ in pairs
  )
  expected = [json.loads(text) for _, text in pairs]
  return [(Program({"solution.py": source}, calls=calls), functools.partial(returns, expected))]


def _check_types(unit_tests: dict[str, Any]) -> None:
  """Raises TypeError if inputs and outputs are not lists of texts, or fn_name is neither a text nor None."""
  for name in ("inputs", "outputs"):
    if not isinstance(unit_tests[name], list) or not all(isinstance(text, str) for text in unit_tests[name]):
      raise TypeError(f"unit_tests.{name} is not a list of texts")
  function = unit_tests.get("fn_name")
  if function is not None and (not isinstance(function, str) or not function):
    raise TypeError(f"unit_tests.fn_name is {function!r}, not the name of a function")


def _unpacked(unit_tests: dict[str, Any]) -> dict[str, Any]:
  """The row's tests; `packed`, if present, holds inputs and outputs as base64 of zlib of JSON."""
  if "packed" not in unit_tests:
    return unit_tests
  tests = json.loads(zlib.decompress(base64.b64decode(unit_tests["packed"])))
  return {**tests, "fn_name": unit_tests.get("fn_name")}


def prelude(solution: str) -> str:
  """One line with those of LiveCodeBench's imports that the solution may use.

  Each import adds some milliseconds to the start of the interpreter, so only names that occur in
  the text are imported.
  """
  if "__future__" in solution:  # Such an import must be the first statement.
    return ""
  words = set(_WORD.findall(solution))
  modules = [name for name in IMPORTED if name in words]
  names = sorted(word for word in words & _starred().keys() if word not in modules)
  imports = [f"from {_starred()[name]} import {name}" for name in names]
  imports += [f"import {name}" for name in modules]
  return "; ".join([*imports, f"import sys; sys.setrecursionlimit({RECURSION})"]) + "\n"


@functools.cache
def _starred() -> dict[str, str]:
  """Maps each name from LiveCodeBench's `from module import *` to its module; the last one wins."""
  found: dict[str, str] = {}
  for name in STARRED:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    found.update(dict.fromkeys(OF_SYS if name == "sys" else public, name))
  return {name: module for name, module in found.items() if module != builtins.__name__}


def returns(expected: Sequence[Any], result: Result) -> bool:
  """Whether every call returned its expected value."""
  return len(result.returns) == len(expected) and all(
    "value" in given and same_value(value, given["value"])
    for value, given in zip(expected, result.returns, strict=True)
  )


def last_block(content: str) -> str | None:
  """The lines between the last two fences, as in LiveCodeBench; None if there are fewer than two.

  A fence is a line that begins with three backticks, or ends with three backticks and an optional
  language. Tildes count only if there are fewer than two backtick fences. A block whose first line
  is indented is dedented.
  """
  lines = content.split("\n")
  for fence in (_FENCE, _TILDES):
    places = [i for i, line in enumerate(lines) if fence.search(line)]
    if len(places) >= 2:
      block = lines[places[-2] + 1 : places[-1]]
      first = next((line for line in block if line.strip()), "")
      text = "\n".join(block)
      # Not always: `dedent` also strips whitespace-only lines, which may be part of a string.
      return textwrap.dedent(text) if first[:1].isspace() else text
  return None


def _prints(expected: str, result: Result) -> bool:
  return result.status == "passed" and same_text(expected, result.stdout)


def _failure(result: Result, passes: Callable[[Result], bool]) -> Verdict | None:
  if result.status == "unstarted":
    return no_verdict("crash", f"the sandbox failed: {result.reason}")
  if passes(result):
    return None
  ended = result.status == "passed"
  return Verdict(0.0, "wrong answer" if ended else f"{result.status}: {result.reason}")


def unsupported(row: Row) -> str:
  """Why no completion of the row can be judged: it has no tests; else ""."""
  return "" if (row.get("verifier_metadata") or {}).get("unit_tests") else "no verifier_metadata.unit_tests"


def make_verify(sandbox: Sandbox | None = None) -> Verify:
  return UnitTests(sandbox)
