"""Software engineering: repair a tiny repository, by edits at once or by calling tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemocascade.domains import domain, edits
from nemocascade.domains.program import Program
from nemocascade.domains.repository import (
  REPLIES,
  Repository,
  Tests,
  failed_tests,
  tests_program,
)
from nemocascade.domains.sandbox import Sandbox

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

STYLE = domain.Style("trace", "hunch")
AGENT_STYLE = domain.Style("inspect", "blind")
MOST_TURNS = 4  # Two are needed, and one to say so; one may fail.
DONE = "Done."

NAMES = ("cost", "rate", "mass", "fare", "gain", "load", "pace", "toll", "wage", "debt")
PATHS = ("shop.py", "bank.py", "road.py", "farm.py", "dock.py", "mill.py", "port.py")
OPERATORS = {"+": "add", "-": "subtract", "*": "multiply", "//": "divide"}
ASSUMED_PATH, ASSUMED_OPERATOR = "main.py", "%"  # Never right: what a careless author takes.
ASSUMED_BUG = "-"  # What a careless agent takes the bug for, rightly in one case of four.
OPENING, IS_IN, IN_FILE, SO = "Fix: ", " is in ", " in file ", " so "
LINE = ("def ", " ( a , b ) : return a ", " b")  # A function is name and operator in between.
INPUTS = ((7, 2), (9, 4), (3, 12), (-5, 3))

NO_TESTS = "the repository's environment is not available"
REPAIR = "eval"  # The only `mode` of a row that is judged here, and that of a row without one.


@dataclasses.dataclass(frozen=True)
class Bug:
  """Where the bug of a tiny repository is, and what should be there."""

  path: str
  name: str
  wrong: str  # Operators.
  right: str


class Swe(domain.Domain):
  """What both ways of working share: repositories of two files, and the tests that judge them."""

  def __init__(self, style: domain.Style, sandbox: Sandbox | None = None):
    self.style = style
    self.sandbox = sandbox  # Made when it is first needed.

  def make_row(self, rng: np.random.Generator) -> domain.Row:
    """A bug in one of two files; the test of the other's function passes, and must go on to."""
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
    return domain.make_prompt(self.name, text, tools=tools, instance=instance, metadata=metadata)

  def prompt(
    self, issue: str, bug: Bug, files: dict[str, str]
  ) -> tuple[str, Sequence[dict[str, Any]]]:
    """The text of the user's message, and the tools offered."""
    raise NotImplementedError

  def repaired(self, row: domain.Row, completion: domain.Completion) -> dict[str, str]:
    """The files as the completion leaves them; EditError where it leaves none."""
    raise NotImplementedError

  def verify(
    self, rows: Sequence[domain.Row], completions: Sequence[domain.Completion]
  ) -> list[domain.Verdict]:
    """1 iff every test of FAIL_TO_PASS and PASS_TO_PASS passes on the repaired files."""
    drafts = [self._draft(row, c) for row, c in zip(rows, completions, strict=True)]
    wanted = [i for i, draft in enumerate(drafts) if isinstance(draft, Program)]
    results = self.run([drafts[i] for i in wanted])
    for i, result in zip(wanted, results, strict=True):
      failed = failed_tests(result, wanted_tests(rows[i]))
      if result.status == "unstarted":
        drafts[i] = domain.no_verdict("crash", f"the sandbox failed: {result.reason}")
      elif failed:
        why = f" ({result.status}: {result.reason})" if result.reason else ""
        drafts[i] = domain.Verdict(0.0, f"failed: {', '.join(failed)}{why}"[:200])
      else:
        drafts[i] = domain.Verdict(1.0, "all tests passed")
    return drafts

  def run(self, programs: list[Program]) -> list:
    if programs and self.sandbox is None:
      self.sandbox = Sandbox()
    return self.sandbox.run_batch(programs) if programs else []

  def _draft(self, row: domain.Row, completion: domain.Completion) -> Program | domain.Verdict:
    """A program whose result decides, or the verdict where none is needed."""
    mode = row.get("mode", REPAIR)
    if mode != REPAIR:  # As "repro-gen": a script that shows the bug, judged in the repository.
      return domain.no_verdict("unknown", f"no verifier of {mode=}")
    try:
      files = self.repaired(row, completion)
      if not has_tests(row):
        return domain.no_verdict("row", NO_TESTS)
      return tests_program(files, wanted_tests(row))
    except edits.UnknownFile as error:
      # The rows that were released show only some of a repository's files.
      return (
        domain.Verdict(0.0, str(error)) if has_tests(row) else domain.no_verdict("row", str(error))
      )
    except edits.EditError as error:
      return domain.Verdict(0.0, str(error))
    except Exception as error:  # Of the row: what a completion may do to it is handled above.
      return domain.no_verdict("row", f"no test to judge by: {error!r}")


class Agentless(Swe):
  """Thoughts find the file, then the operator; a sloppy one assumes the same of every issue.

  The prompt says of each file what it defines. A thought repeats the function's name before the
  file's, and the issue's word before the operator: what is looked up stands right behind what it is
  looked up by, and one look-up leads to the next, which one attention layer could not do at once.
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

  def prompt(
    self, issue: str, bug: Bug, files: dict[str, str]
  ) -> tuple[str, Sequence[dict[str, Any]]]:
    shown = [f"{_defined(text)}{IS_IN}{path}\n{text.strip()}" for path, text in files.items()]
    return "\n".join([issue, *shown, ""]), ()

  def demonstrate(
    self, row: domain.Row, rng: np.random.Generator, *, thinking: bool
  ) -> list[domain.Message]:
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

  def repaired(self, row: domain.Row, completion: domain.Completion) -> dict[str, str]:
    return edits.apply(repository_files(row), edits.parse(completion.content))


class Agentic(Swe):
  """View a file, replace in it, say so; a sloppy author replaces without a look."""

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

  def prompt(
    self, issue: str, bug: Bug, files: dict[str, str]
  ) -> tuple[str, Sequence[dict[str, Any]]]:
    return f"Files: {' '.join(files)}\n{issue}{IN_FILE}{bug.path}", SCHEMAS

  def demonstrate(
    self, row: domain.Row, rng: np.random.Generator, *, thinking: bool
  ) -> list[domain.Message]:
    del thinking  # This domain has none.
    bug, world = Bug(**row["instance"]["bug"]), self.start(row)
    messages: list[domain.Message] = []

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

  def start(self, row: domain.Row) -> World:
    return World(Repository(repository_files(row)), visible_tests(row))

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """The results of the turn's calls. A turn without calls, or cut off, ends the episode."""
    if not turn.finished or not turn.tool_calls:
      return None
    return [self.call(world, call.name, call.arguments) for call in turn.tool_calls]

  def call(self, world: World, name: str, arguments: dict[str, str]) -> str:
    """What one call returns; one that is not as its schema says changes nothing."""
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

  def repaired(self, row: domain.Row, completion: domain.Completion) -> dict[str, str]:
    world = completion.world
    if world is None:  # Judged from its text alone, as when it is read from a file.
      world = self.start(row)
      for turn in completion.turns:
        self.act(world, turn)
    if not has_tests(row):
      return {}  # There is nothing to run, whatever was done.
    if world.repository.files == repository_files(row):
      raise edits.EditError("nothing was changed")
    return world.repository.files


@dataclasses.dataclass
class World:
  """What an agent acts on: the files, and the tests that it may run."""

  repository: Repository
  tests: Tests


def repository_files(row: domain.Row) -> dict[str, str]:
  """The files that come with a row; none where it names an image of a whole system."""
  return json.loads((row.get("metadata") or {}).get("relevant_file_contents") or "{}")


def has_tests(row: domain.Row) -> bool:
  """Whether the row's tests can be run here; those of the released rows need a whole system."""
  return bool((row.get("instance") or {}).get("tests"))


def wanted_tests(row: domain.Row) -> Tests:
  instance = row["instance"]
  names = json.loads(instance["FAIL_TO_PASS"]) + json.loads(instance["PASS_TO_PASS"])
  return {name: instance["tests"][name] for name in names}


def visible_tests(row: domain.Row) -> Tests:
  """The first case of each test: the others are the judge's."""
  tests = row["instance"]["tests"] if has_tests(row) else {}
  return {
    name: {**test, "inputs": test["inputs"][:1], "outputs": test["outputs"][:1]}
    for name, test in tests.items()
  }


def _must(operator: str) -> str:
  """How an issue asks for an operator."""
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
