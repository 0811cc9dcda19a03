"""Software engineering: tiny repositories with one bug, repaired by edits in one answer or by tool calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemocascade.domains.repository import REPLIES
from nemocascade.domains.rows import make_prompt
from nemocascade.domains.swe import SCHEMAS, Editor, repository_files
from nemocascade.generated import generator
from nemocascade.generated.tools import schema_phrases
from nemocascade.verifiers import edits
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("trace", "hunch")
AGENT_STYLE = generator.Style("inspect", "blind")
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


@dataclasses.dataclass(frozen=True)
class Bug:
  """The bug of a tiny repository: one wrong operator."""

  path: str
  name: str  # The function.
  wrong: str  # The operator in the file, a key of OPERATORS.
  right: str  # The operator that the issue asks for.


class Swe(generator.Generator):
  """The common part of Agentless and Agentic: repositories of two files, and their tests."""

  def __init__(self, style: generator.Style):
    self.style = style

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


class Agentless(Swe):
  """The thoughts find the file, then the operator. One that errs assumes the same for every issue.

  The prompt states which function each file defines. A thought writes the function's name before the
  file's name, and the issue's word before the operator. So every value directly follows its key, and
  a model with one attention layer can do one look-up after the other, but not both in one step.
  """

  name = "swe"

  def __init__(self, style: generator.Style = STYLE):
    super().__init__(style)
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
    return [generator.assistant(edit, thoughts=thoughts if thinking else None)]


class Agentic(Swe):
  """The agent views a file, replaces text in it, and says so. A sloppy one may skip the view."""

  name = "swe_agentic"
  thinking = False

  def __init__(self, style: generator.Style = AGENT_STYLE):
    super().__init__(style)
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
    bug, editor = Bug(**row["instance"]["bug"]), Editor()
    world = editor.start(row)
    messages: list[Message] = []

    def say(marker: str, name: str, **arguments: str):
      call = {"type": "function", "function": {"name": name, "arguments": arguments}}
      messages.append(generator.assistant(marker, tool_calls=[call]))
      messages.append({"role": "tool", "content": editor.call(world, name, arguments)})

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
    return [*messages, generator.assistant(DONE)]


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
