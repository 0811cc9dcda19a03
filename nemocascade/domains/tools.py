"""Office tasks by function calls. The final state of the workplace is judged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nemocascade.domains.domain import Environment, Verify, one_by_one
from nemocascade.domains.rows import prompt_tools
from nemocascade.domains.workplace import FUNCTIONS, Workplace
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn


class Office:
  """The environment: each episode has its own workplace, filled from the row's `snapshot`."""

  max_turns = 4  # Two turns of work and one to say "Done.", with one to spare for a failed call.
  in_threads = True

  def start(self, row: Row) -> Workplace:
    return Workplace(row.get("snapshot"))

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """The results of the turn's calls. None ends the episode: a turn cut off or without calls."""
    if not turn.finished or not turn.tool_calls:
      return None
    return [world.call(call.name, call.arguments) for call in turn.tool_calls]


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff the final state equals that after the row's true calls, whatever calls led to it."""
  truth = true_calls(row)
  if why := unsupported(row):
    return no_verdict("unknown", why)
  expected = Workplace(row.get("snapshot"))
  for name, arguments in truth:
    result = expected.call(name, arguments)
    if result.startswith("error:"):
      return no_verdict("row", f"true call {name!r} gives {result!r}")
  world = completion.world
  if world is None:  # Only turns are known, e.g. read from a file: replay their calls.
    office = Office()
    world = office.start(row)
    for turn in completion.turns:
      office.act(world, turn)
  right = world.state() == expected.state()
  return Verdict(float(right), "right" if right else "another state")


def unsupported(row: Row) -> str:
  """Names a function of the row that this workplace lacks, so that no completion can be judged; "" if it has all."""
  offered = [tool.get("function", tool)["name"] for tool in prompt_tools(row)]
  missing = [name for name in [*(name for name, _ in true_calls(row)), *offered] if name not in FUNCTIONS]
  return f"no function {missing[0]!r} here to judge by" if missing else ""


def true_calls(row: Row) -> list[tuple[str, dict[str, Any]]]:
  """The (name, arguments) of the row's true calls. Released rows hold the arguments as JSON text."""
  calls = []
  for call in row["ground_truth"]:
    arguments = call["arguments"]
    calls.append((call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
  return calls


def make_environment() -> Environment:
  return Office()


def make_verify() -> Verify:
  return one_by_one(judge)
