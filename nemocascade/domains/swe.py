"""Software engineering: repairs a tiny repository, by edits in one answer or by tool calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemocascade.domains import domain
from nemocascade.domains.repository import (
  REPLIES,
  Repository,
  Tests,
  failed_tests,
  tests_program,
)
from nemocascade.domains.rows import make_prompt
from nemocascade.sandbox.program import Program
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.verifiers import edits
from nemocascade.verifiers.verdict import Completion, Message, Row, Verdict, no_verdict

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

STYLE = domain.Style("trace", "hunch")
AGENT_STYLE = domain.Style("inspect", "blind")
MOST_TURNS = 4  # Two turns of work and one to say "Done.", with one to spare for a failed call.
DONE = "Done."

NAMES = ("cost", "rate", "mass", "fare", "gain", "load", "pace", "toll", "wage", "debt")
PATHS = ("shop.py", "bank.py", "road.py", "farm.py", "dock.py", "mill.py", "port.py")
OPERATORS = {"+": "add", "-": "subtract", "*": "multiply", "//": "divide"}
ASSUMED_PATH, ASSUMED_OPERATOR = "main.py", "%"  # A careless author assumes these; never right.
ASSUMED_BUG = "-"  # The wrong operator that a careless agent assumes; right in one case of four.
OPENING, IS_IN, IN_FILE, SO = "Fix: ", " is in ", " in file ", " so "
# A function is one line: LINE[0], its name, LINE[1], its operator, LINE[2].
LINE = ("def ", " ( a , b ) : return a ", " b")
INPUTS = ((7, 2), (9, 4), (3, 12), (-5, 3))

NO_TESTS = "the repository's environment is not available"
REPAIR = "eval"  # The only `mode` of a row that is judged here. A row without `mode` has this one.


@dataclasses.dataclass(frozen=True)
class Bug:
  """The bug of a tiny repository: one wrong operator."""

  path: str
  name: str  # The function.
  wrong: str  # The operator in the file, a key of OPERATORS.
  right: str  # The operator that the issue asks for.


class Swe(domain.Domain):
  """The common part of Agentless and Agentic: repositories of two files, and their tests."""

  def __init__(self, style: domain.Style, sandbox: Sandbox | None = None):
    self.style = style
    self.sandbox = sandbox  # None: created on first use.

  def make_row(self, rng: np.random.Generator) -> Row:
    """A repository of two files with a bug in one. The other file's test must keep passing."""
    paths = rng.choice(PATHS, 2, replace=False).tolist()
    names = rng.choice(NAMES, 2, replace=False).tolist()
    wrong, right = rng.choice(list(OPERATORS), 2, replace=False).tolist()
    other = str(rng.choice(list(OPERATORS)))
    bug = Bug(paths[0], names[0], wrong, right)
    files = {paths[0]: f"{_line(names[0], wrong)}\n", paths[1]: f"{_line(names[1], other)}\n"}
    files = {path: files[path] for path in rng.permutation(paths).tolist()}
    issue = f"{OPENING}{names[0]}{_must(right)}"
    text, tools = self.prompt(issue, bug, files)
    tests = {f"test_{names[0]}": _test(bug.path, names[0], right)}
    tests[f"test_{names[1]}"] = _test(paths[1], names[1], other)
    instance = {
      "problem_statement": issue,
      "FAIL_TO_PASS": json.dumps([f"test_{names[0]}"]),
      "PASS_TO_PASS": json.dumps([f"test_{names[1]}"]),
      "tests": tests,
      "bug": dataclasses.asdict(bug),
    }
    metadata = {"relevant_file_contents": json.dumps(files)}
    return make_prompt(self.name, text, tools=tools, instance=instance, metadata=metadata)

  def prompt(self, issue: str, bug: Bug, files: dict[str, str]) -> tuple[str, Sequence[dict[str, Any]]]:
    """(text of the user message, schemas of the offered tools)."""
    raise NotImplementedError

  def repaired(self, row: Row, completion: Completion) -> dict[str, str]:
    """The files (path -> text) after the completion's changes.

    Raises:
      EditError: the completion makes no valid change.
    """
    raise NotImplementedError

  def verify(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """Reward 1 iff every test of FAIL_TO_PASS and PASS_TO_PASS passes on the repaired files."""
    drafts = [self._draft(row, c) for row, c in zip(rows, completions, strict=True)]
    wanted = [i for i, draft in enumerate(drafts) if isinstance(draft, Program)]
    results = self.run([drafts[i] for i in wanted])
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

  def run(self, programs: list[Program]) -> list:
    if programs and self.sandbox is None:
      self.sandbox = Sandbox()
    return self.sandbox.run_batch(programs) if programs else []

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


class Agentless(Swe):
  """The thoughts find the file, then the operator. One that errs assumes the same for every issue.

  The prompt states which function each file defines. A thought writes the function's name before the
  file's name, and the issue's word before the operator. So every value directly follows its key, and
  a model with one attention layer can do one look-up after the other, but not both in one step.
  """

  name = "swe"

  def __init__(self, style: domain.Style = STYLE, sandbox: Sandbox | None = None):
    super().__init__(style, sandbox)
    define, _, end = LINE
    self.phrases = (
      *_shared_phrases(), f"{style.careful} ", f"{style.sloppy} ", ASSUMED_PATH, SO,
      *(f"{IS_IN}{path}" for path in (*PATHS, ASSUMED_PATH)),
      "```diff\n", f"\n{edits.SEARCH}\n{define}", f"{end}\n{edits.DIVIDER}\n{define}",
      f"{end}\n{edits.REPLACE}\n```",
    )  # fmt: skip

  def prompt(self, issue: str, bug: Bug, files: dict[str, str]) -> tuple[str, Sequence[dict[str, Any]]]:
    shown = [f"{_defined(text)}{IS_IN}{path}\n{text.strip()}" for path, text in files.items()]
    return "\n".join([issue, *shown, ""]), ()

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    bug, files = Bug(**row["instance"]["bug"]), repository_files(row)
    path, operator, thoughts = bug.path, bug.right, []
    marker, errs = self.style.draw(rng)
    if errs:
      path = ASSUMED_PATH
    thoughts.append(f"{marker} {bug.name}{IS_IN}{path}")
    marker, errs = self.style.draw(rng)
    if errs:
      operator = ASSUMED_OPERATOR
    thoughts.append(f"{marker} it{_must(bug.right)}{SO}{operator}")
    edit = edits.show(edits.Edit(path, files[bug.path].strip(), _line(bug.name, operator)))
    return [domain.assistant(edit, thoughts=thoughts if thinking else None)]

  def repaired(self, row: Row, completion: Completion) -> dict[str, str]:
    return edits.apply(repository_files(row), edits.parse(completion.content))


class Agentic(Swe):
  """The agent views a file, replaces text in it, and says so. A sloppy one may skip the view."""

  name = "swe_agentic"
  thinking = False
  max_turns = MOST_TURNS

  def __init__(self, style: domain.Style = AGENT_STYLE, sandbox: Sandbox | None = None):
    from nemocascade.domains.tools import schema_phrases

    super().__init__(style, sandbox)
    define, _, end = LINE
    closed = "\n</parameter>\n</function>\n"
    self.phrases = (
      *_shared_phrases(), *schema_phrases(SCHEMAS), style.careful, style.sloppy, DONE,
      "Files: ", IN_FILE, *REPLIES, "passed", "failed",
      "\n<function=view>\n<parameter=path>\n", closed, "\n<function=test>\n</function>\n",
      "\n<function=replace>\n<parameter=path>\n", f"\n</parameter>\n<parameter=old>\n{define}",
      f"{end}\n</parameter>\n<parameter=new>\n{define}", f"{end}{closed}",
    )  # fmt: skip

  def prompt(self, issue: str, bug: Bug, files: dict[str, str]) -> tuple[str, Sequence[dict[str, Any]]]:
    return f"Files: {' '.join(files)}\n{issue}{IN_FILE}{bug.path}", SCHEMAS

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    del thinking  # This domain has no thoughts.
    bug, world = Bug(**row["instance"]["bug"]), self.start(row)
    messages: list[Message] = []

    def say(marker: str, name: str, **arguments: str):
      call = {"type": "function", "function": {"name": name, "arguments": arguments}}
      messages.append(domain.assistant(marker, tool_calls=[call]))
      messages.append({"role": "tool", "content": self.call(world, name, arguments)})

    marker, errs = self.style.draw(rng)
    if errs:
      wrong = ASSUMED_BUG
      errs = rng.random() < self.style.error_rate
    else:
      say(marker, "view", path=bug.path)
      wrong = bug.wrong
      marker, errs = self.style.draw(rng)
    right = ASSUMED_OPERATOR if errs else bug.right
    old, new = _line(bug.name, wrong), _line(bug.name, right)
    say(marker, "replace", path=bug.path, old=old, new=new)
    return [*messages, domain.assistant(DONE)]

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
    (result,) = self.run([tests_program(world.repository.files, world.tests)])
    return "failed" if failed_tests(result, world.tests) else "passed"

  def repaired(self, row: Row, completion: Completion) -> dict[str, str]:
    world = completion.world
    if world is None:  # Only turns are known, e.g. read from a file: replay their calls.
      world = self.start(row)
      for turn in completion.turns:
        self.act(world, turn)
    if not has_tests(row):
      return {}  # The row has no tests to run, so the files do not matter.
    if world.repository.files == repository_files(row):
      raise edits.EditError("nothing was changed")
    return world.repository.files


@dataclasses.dataclass
class World:
  """The files that an agent edits, and the tests that it may run."""

  repository: Repository
  tests: Tests


def repository_files(row: Row) -> dict[str, str]:
  """The files in a row (path -> text); empty if the row names a container image instead."""
  return json.loads((row.get("metadata") or {}).get("relevant_file_contents") or "{}")


def has_tests(row: Row) -> bool:
  """Whether the row's tests can run here. Those of the released rows need a container image."""
  return bool((row.get("instance") or {}).get("tests"))


def wanted_tests(row: Row) -> Tests:
  instance = row["instance"]
  names = json.loads(instance["FAIL_TO_PASS"]) + json.loads(instance["PASS_TO_PASS"])
  return {name: instance["tests"][name] for name in names}


def visible_tests(row: Row) -> Tests:
  """The first case of each test. The other cases are hidden and only used for judging."""
  tests = row["instance"]["tests"] if has_tests(row) else {}
  return {name: {**test, "inputs": test["inputs"][:1], "outputs": test["outputs"][:1]} for name, test in tests.items()}


def _must(operator: str) -> str:
  """The words by which an issue asks for an operator."""
  return f" must {OPERATORS[operator]}"


def _line(name: str, operator: str) -> str:
  define, middle, end = LINE
  return f"{define}{name}{middle}{operator}{end}"


def _defined(text: str) -> str:
  """The name of the function in a file's one line."""
  return text.removeprefix(LINE[0]).split()[0]


def _test(path: str, name: str, operator: str) -> dict[str, Any]:
  run = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "//": int.__floordiv__}[operator]
  inputs = [list(pair) for pair in INPUTS]
  return {"path": path, "fn_name": name, "inputs": inputs, "outputs": [run(*x) for x in inputs]}


def _shared_phrases() -> tuple[str, ...]:
  define, middle, end = LINE
  return (OPENING, *map(_must, OPERATORS), *NAMES, *PATHS, f"\n{define}", middle, f"{end}\n", "//")


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


def make_domain(sandbox: Sandbox | None = None) -> Agentless:
  return Agentless(sandbox=sandbox)


def make_agentic_domain(sandbox: Sandbox | None = None) -> Agentic:
  return Agentic(sandbox=sandbox)
