"""Software engineering: a repository is repaired by edits in one answer or by tool calls, and its tests decide."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nemocascade.domains.domain import Environment, Verify
from nemocascade.domains.repository import Repository, Tests, failed_tests, tests_program
from nemocascade.sandbox.program import Program
from nemocascade.sandbox.sandbox import Runner, Sandbox
from nemocascade.verifiers import edits
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

NO_TESTS = "the repository's environment is not available"
REPAIR = "eval"  # The only `mode` of a row that is judged here. A row without `mode` has this one.


def _schema(name: str, description: str, parameters: Sequence[str]) -> dict[str, Any]:
  return {
    "type": "function",
    "name": name,
    "description": description,
    "parameters": {
      "type": "object",
      "properties": {parameter: {"type": "string"} for parameter in parameters},
      "required": list(parameters),
    },
  }


PARAMETERS = {"view": ("path",), "replace": ("path", "old", "new"), "test": ()}
SCHEMAS = [
  _schema("view", "Shows a file.", PARAMETERS["view"]),
  _schema("replace", "Replaces a text that occurs once in a file.", PARAMETERS["replace"]),
  _schema("test", "Runs the tests.", PARAMETERS["test"]),
]


@dataclasses.dataclass
class World:
  """The files that an agent edits, and the tests that it may run."""

  repository: Repository
  tests: Tests


class Editor:
  """The environment: the functions of SCHEMAS on the row's repository."""

  max_turns = 4  # Two turns of work and one to say "Done.", with one to spare for a failed call.
  in_threads = True

  def __init__(self, sandbox: Sandbox | None = None):
    self.runner = Runner(sandbox)

  def start(self, row: Row) -> World:
    return World(Repository(repository_files(row)), visible_tests(row))

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """The results of the turn's calls. None ends the episode: a turn cut off or without calls."""
    if not turn.finished or not turn.tool_calls:
      return None
    return [self.call(world, call.name, call.arguments) for call in turn.tool_calls]

  def call(self, world: World, name: str, arguments: dict[str, str]) -> str:
    """Runs one call and returns its result. A call that does not fit its schema changes nothing."""
    if name not in PARAMETERS:
      return "error: no such function"
    if set(arguments) != set(PARAMETERS[name]):
      return f"error: {name} takes {', '.join(PARAMETERS[name]) or 'nothing'}"
    if name == "view":
      return world.repository.view(**arguments)
    if name == "replace":
      return world.repository.replace(**arguments)
    if not world.tests:
      return f"error: {NO_TESTS}"
    (result,) = self.runner.run([tests_program(world.repository.files, world.tests)])
    return "failed" if failed_tests(result, world.tests) else "passed"


class RepairTests:
  """A Verify that runs the row's tests on the files as the completion leaves them.

  Attributes:
    repaired: (row, completion) -> the files (path -> text) after the completion's changes. It raises EditError
      if the completion makes no valid change.
  """

  def __init__(self, repaired: Callable[[Row, Completion], dict[str, str]], sandbox: Sandbox | None = None):
    self.repaired, self.runner = repaired, Runner(sandbox)

  def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """Reward 1 iff every test of FAIL_TO_PASS and PASS_TO_PASS passes on the repaired files."""
    drafts = [self._draft(row, c) for row, c in zip(rows, completions, strict=True)]
    wanted = [i for i, draft in enumerate(drafts) if isinstance(draft, Program)]
    results = self.runner.run([drafts[i] for i in wanted])
    for i, result in zip(wanted, results, strict=True):
      failed = failed_tests(result, wanted_tests(rows[i]))
      if result.status == "unstarted":
        drafts[i] = no_verdict("crash", f"the sandbox failed: {result.reason}")
      elif failed:
        why = f" ({result.status}: {result.reason})" if result.reason else ""
        drafts[i] = Verdict(0.0, f"failed: {', '.join(failed)}{why}"[:200])
      else:
        drafts[i] = Verdict(1.0, "all tests passed")
    return drafts

  def _draft(self, row: Row, completion: Completion) -> Program | Verdict:
    """The program whose result decides the verdict, or a verdict that needs no program."""
    mode = row.get("mode", REPAIR)
    if mode != REPAIR:  # E.g. "repro-gen": a script that reproduces the bug, run in the repository.
      return no_verdict("unknown", f"no verifier of {mode=}")
    try:
      files = self.repaired(row, completion)
      if not has_tests(row):
        return no_verdict("row", NO_TESTS)
      return tests_program(files, wanted_tests(row))
    except edits.UnknownFile as error:
      # Released rows contain only some of a repository's files, so the edit may be right.
      return Verdict(0.0, str(error)) if has_tests(row) else no_verdict("row", str(error))
    except edits.EditError as error:
      return Verdict(0.0, str(error))
    except Exception as error:  # The row is malformed. Errors of the completion are handled above.
      return no_verdict("row", f"no test to judge by: {error!r}")


def edited(row: Row, completion: Completion) -> dict[str, str]:
  """The row's files after the edits that the answer writes; raises EditError."""
  return edits.apply(repository_files(row), edits.parse(completion.content))


def left_by_agent(row: Row, completion: Completion, editor: Editor) -> dict[str, str]:
  """The files of the world in which the agent worked; raises EditError if nothing was changed."""
  world = completion.world
  if world is None:  # Only turns are known, e.g. read from a file: replay their calls.
    world = editor.start(row)
    for turn in completion.turns:
      editor.act(world, turn)
  if not has_tests(row):
    return {}  # The row has no tests to run, so the files do not matter.
  if world.repository.files == repository_files(row):
    raise edits.EditError("nothing was changed")
  return world.repository.files


def repository_files(row: Row) -> dict[str, str]:
  """The files in a row (path -> text); empty if the row names a container image instead."""
  return json.loads((row.get("metadata") or {}).get("relevant_file_contents") or "{}")


def has_tests(row: Row) -> bool:
  """Whether the row's tests can run here. Those of the released rows need a container image."""
  return bool((row.get("instance") or {}).get("tests"))


def unsupported(row: Row) -> str:
  """Why no completion of the row can be judged here; "" if its tests can run."""
  return "" if has_tests(row) else NO_TESTS


def wanted_tests(row: Row) -> Tests:
  instance = row["instance"]
  names = json.loads(instance["FAIL_TO_PASS"]) + json.loads(instance["PASS_TO_PASS"])
  return {name: instance["tests"][name] for name in names}


def visible_tests(row: Row) -> Tests:
  """The first case of each test. The other cases are hidden and only used for judging."""
  tests = row["instance"]["tests"] if has_tests(row) else {}
  return {name: {**test, "inputs": test["inputs"][:1], "outputs": test["outputs"][:1]} for name, test in tests.items()}


def make_verify(sandbox: Sandbox | None = None) -> Verify:
  return RepairTests(edited, sandbox)


def make_agentic_verify(sandbox: Sandbox | None = None) -> Verify:
  editor = Editor(sandbox)
  return RepairTests(lambda row, completion: left_by_agent(row, completion, editor), sandbox)


def make_environment(sandbox: Sandbox | None = None) -> Environment:
  return Editor(sandbox)
