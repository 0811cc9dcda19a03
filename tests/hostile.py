"""Runs hostile programs against the real sandbox and verifiers: python tests/hostile.py prints the table.

Each line shows one program: its kind, what it tries, what happened, and whether the sandbox held. A program
that ends in an unexpected way counts as one that got through. The exit code is 1 if any got through.
"""

import collections
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from composed import compose
from hostile_programs import escapes, forgeries, hoards, leaks

from nemocascade.data.chat import ToolCall, Turn
from nemocascade.domains import code, swe
from nemocascade.domains.domain import Domain
from nemocascade.domains.rows import make_prompt
from nemocascade.generated.swe import Bug
from nemocascade.sandbox import python_tool
from nemocascade.sandbox.program import Program, Result
from nemocascade.sandbox.python_tool import PythonTool
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.verifiers import edits
from nemocascade.verifiers.verdict import Completion, Row, Verdict

CPU_S, WALL_S = 1, 2.5


class Attempt(NamedTuple):
  """One hostile program. `run` returns (what happened, whether the sandbox held)."""

  kind: str
  name: str
  run: Callable[[], tuple[str, bool]]


def attempts() -> Iterator[Attempt]:
  """All hostile programs. They share one sandbox, which is created by the first run."""
  runner = _Runner()
  tables = (
    ("escape", escapes.ESCAPES, runner.escape),
    ("leak", leaks.PAIRS, runner.leak),
    ("hoard", hoards.HOARDS, runner.hoard),
    ("no end", hoards.LONG, runner.long),
    ("bar", hoards.BARS, runner.bar),
    ("forged values", forgeries.FUNCTIONS, runner.values),
    ("forged output", forgeries.PRINTERS, runner.prints),
    ("forged repair", forgeries.REPAIRS, runner.repair),
    ("edit outside", forgeries.EDITS, runner.edit),
    ("forged reply", forgeries.REPLIES, runner.reply),
  )
  for kind, table, judge in tables:
    for name in table:
      yield Attempt(kind, name, lambda name=name, judge=judge: judge(name))
  for control in (runner.control_scan, runner.control_rewards):
    yield Attempt("control", control.__doc__.split(":")[0], control)


class _Runner:
  """Runs the programs of each kind and judges the outcome."""

  def __init__(self):
    self.worker: Any = None

  @functools.cached_property
  def box(self) -> Sandbox:
    return Sandbox(workers=1, cpu_s=CPU_S, wall_s=WALL_S, output_kb=64)

  def run(self, source: str, stdin: str = "") -> Result:
    """Runs a program in one worker for as long as that lives, without the result cache.

    Like the sandbox, it tries twice.
    """
    for _ in range(2):
      if self.worker is None or self.worker.ended():
        self.worker = self.box.session(self.box.limits)
      result = self.worker.run(Program({"main.py": source}, stdin=stdin))
      if result.status != "unstarted":
        break
    return result

  def well(self) -> bool:
    """Whether the worker serves the next program normally."""
    result = self.run("import os; open('x', 'w').write('x'); print(len(os.listdir('.')), input())", "in")
    return (result.status, result.stdout) == ("passed", "2 in\n")

  def escape(self, name: str) -> tuple[str, bool]:
    source, pattern = escapes.ESCAPES[name]
    result = self.run(source)
    held = re.match(pattern, _end(result)) and "REACHED" not in result.stdout
    return _end(result), bool(held) and self.well()

  def leak(self, name: str) -> tuple[str, bool]:
    told = []
    for secret in "01":
      self.run(*leaks.first(name, secret))
      result = self.run(leaks.second(name))
      told.append(result.stdout)
      if result.status != "passed" or not result.stdout:
        return _end(result), False
    return ("nothing differs" if told[0] == told[1] else f"{told[0]!r} or {told[1]!r}"), told[0] == told[1]

  def hoard(self, name: str) -> tuple[str, bool]:
    source, most, least = hoards.HOARDS[name]
    result = self.run(f"{hoards.COUNT}{source}{hoards.TOLD}")
    found = re.search(r"^HELD (\d+)$", result.stdout, re.MULTILINE)
    held = int(found[1]) if found else -1
    happened = f"held {held} of at most {most}" if found else _end(result)
    return happened, result.status == "passed" and least <= held <= most and self.well()

  def long(self, name: str) -> tuple[str, bool]:
    source, allowed = hoards.LONG[name]
    start = time.monotonic()
    result = self.run(source)
    in_time = time.monotonic() - start < WALL_S + 2
    return _end(result), result.status in allowed and in_time and self.well()

  def bar(self, name: str) -> tuple[str, bool]:
    result = self.run(hoards.BARS[name])
    return _end(result), result.status != "unstarted" and self.well()

  def values(self, name: str) -> tuple[str, bool]:
    return _zero(self._values(forgeries.FUNCTIONS[name]))

  def _values(self, source: str) -> Verdict:
    tests = {"fn_name": "f", "inputs": ["2", "3", "-4"], "outputs": ["13", "36", "-48"]}
    return self._judge(tests, source)

  def prints(self, name: str) -> tuple[str, bool]:
    return _zero(self._prints(forgeries.PRINTERS[name]))

  def _prints(self, source: str) -> Verdict:
    return self._judge({"inputs": ["7\n", "12\n"], "outputs": ["49\n", "144\n"]}, source)

  def _judge(self, tests: dict, source: str) -> Verdict:
    row = {**make_prompt("code", "x"), "verifier_metadata": {"unit_tests": tests}}
    return code.make_verify(self.box)([row], [_complete(f"```python\n{source}\n```")])[0]

  def repair(self, name: str) -> tuple[str, bool]:
    return _zero(self._repair(forgeries.REPAIRS[name]))

  def _repair(self, line: str) -> Verdict:
    task, row = self._repository("swe")
    bug, files = Bug(**row["instance"]["bug"]), swe.repository_files(row)
    (other,) = set(files) - {bug.path}
    line = line.replace("OTHER", other.removesuffix(".py")).replace("NAME", bug.name).replace("RIGHT", bug.right)
    edit = edits.show(edits.Edit(bug.path, files[bug.path].strip(), line))
    return task.verify([row], [_complete(edit)])[0]

  def _repository(self, name: str) -> tuple[Domain, Row]:
    task = compose(name, sandbox=self.box)
    return task, task.rows.train(0, 0)

  def edit(self, name: str) -> tuple[str, bool]:
    path = forgeries.EDITS[name]
    edit = edits.show(edits.Edit(path, "x", "import os; os._exit(0)"))
    task, row = self._repository("swe")
    happened, held = _zero(task.verify([row], [_complete(edit)])[0])
    task, row = self._repository("swe_agentic")
    world = task.start(row)
    call = ToolCall("replace", {"path": path, "old": "", "new": "x"})
    (reply,) = task.act(world, Turn(None, "", (call,), None, True))
    untouched = world.repository.files == swe.repository_files(row)
    return f"{happened}; {reply}", held and untouched and reply.startswith("error:")

  def reply(self, name: str) -> tuple[str, bool]:
    """The next call must return its own output or report a session restart; the call after it must be right."""
    source, following, right = forgeries.REPLIES[name]
    tool = PythonTool(self.box, timeout_s=WALL_S)
    try:
      told = [tool.call(python_tool.NAME, {"code": text}) for text in (source, following, following)]
    finally:
      tool.reset()
    held = told[1] == right or "the session was started anew" in told[1] + told[0]
    return f"{told[1]!r}", held and told[2] == right

  def control_scan(self) -> tuple[str, bool]:
    """the search of memory finds what is there: else it would show nothing."""
    result = self.run(leaks.OWN_SCAN)
    return f"{_end(result)} {result.stdout.strip()}", result.stdout.startswith("[b'TOP-SECRET-1']")

  def control_rewards(self) -> tuple[str, bool]:
    """right answers are rewarded: else no forgery would show anything."""
    bug = self._repository("swe")[1]["instance"]["bug"]
    verdicts = (
      self._values("def f(x): return x**3 + x**2 + (x > 2) * 0 + (x == 2)"),
      self._prints("print(int(input()) ** 2)"),
      self._repair(f"def NAME(a, b): return a {bug['right']} b"),
    )
    return f"rewards {[v.reward for v in verdicts]}", all(v.reward == 1 for v in verdicts)


def _complete(content: str) -> Completion:
  return Completion((Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True),))


def _zero(verdict: Verdict) -> tuple[str, bool]:
  """Held if the reward is 0 and the sample counts; a masked sample would escape its reward of 0."""
  masked = ", masked" if verdict.masked else ""
  return f"reward {verdict.reward:g}{masked}: {verdict.reason}", verdict.reward == 0 and not verdict.masked


def _end(result: Result) -> str:
  return f"{result.status}: {result.reason}" if result.reason else result.status


def main() -> int:
  counts: collections.Counter = collections.Counter()
  through = 0
  for kind, name, run in attempts():
    happened, held = run()
    counts[kind] += 1
    through += not held
    shown = json.dumps(happened)[1:-1][:90]
    print(f"{kind:14} {name[:46]:46} {'held' if held else 'GOT THROUGH':12} {shown}", flush=True)
  parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
  print(f"{sum(counts.values())} programs ({parts}): {through} got through")
  return int(through > 0)


if __name__ == "__main__":
  sys.exit(main())
