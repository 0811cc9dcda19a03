"""Office tasks by function calls: look up a key, then act with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemocascade.data import chat
from nemocascade.domains.rows import make_prompt
from nemocascade.domains.tools import true_calls
from nemocascade.domains.workplace import FUNCTIONS, Workplace
from nemocascade.generated import generator
from nemocascade.verifiers.verdict import Message, Row

STYLE = generator.Style("seek", "assume")
ENVIRONMENT = "workplace"

# Each slot of a prompt has few words and a fixed phrase before it, so that a model of 200k parameters
# learns to copy the words from a few thousand episodes.
TOPICS = ("review", "demo", "lunch", "retro", "sync", "audit", "tour", "quiz", "talk", "vote")
NAMES = ("Ann", "Bob", "Dan", "Eve", "Gus", "Jim", "Kim", "Leo", "Mia", "Ned", "Pam", "Zoe")
TEAMS = ("sales", "legal", "press", "stock", "fleet", "labs", "staff", "store", "crew", "bank")
PLACES = ("hall", "roof", "cafe", "barn", "dock", "farm", "gym", "park", "pier", "tent")
ASSUMED_PLACE = "here"  # A careless agent uses this place; never right.
# Every row draws a new key for each event and contact, so the agent must look the key up.
KEYS = (
  "amber", "coral", "ivory", "olive", "plum", "ruby",
  "sand", "teal", "rose", "navy", "jade", "lime",
)  # fmt: skip
ASSUMED_KEY = "main"  # A careless agent uses this key; it never exists.
OTHERS = 2  # Each row has 1 + OTHERS events and 1 + OTHERS contacts.


@dataclasses.dataclass(frozen=True)
class Task:
  """One kind of task: look up a subject's key, then call a function with the key and the place.

  The prompt is opening + subject + MIDDLE + place. The subject is one word of words[0], the joint,
  and one word of words[1].
  """

  category: str
  opening: str
  joint: str
  words: tuple[tuple[str, ...], tuple[str, ...]]
  find: tuple[str, str]  # (function, its parameter for the subject).
  do: tuple[str, str, str]  # (function, its parameter for the key, its parameter for the place).


MOVE = Task(
  "calendar", "Move ", " with ", (TOPICS, NAMES),
  ("calendar_find", "title"), ("calendar_move", "id", "place"),
)  # fmt: skip
MAIL = Task(
  "email", "Invite ", " from ", (NAMES, TEAMS),
  ("contact_find", "name"), ("mail_send", "address", "text"),
)  # fmt: skip
TASKS = (MOVE, MAIL)
MIDDLE = " over to "
DONE = "Done."


def call_phrases() -> tuple[str, ...]:
  """The constant text of calls: everything except argument values."""
  parts = ["\n</parameter>\n</function>\n"]
  for function in FUNCTIONS.values():
    first, *more = function.parameters
    parts.append(f"\n<function={function.name}>\n<parameter={first}>\n")
    parts += [f"\n</parameter>\n<parameter={parameter}>\n" for parameter in more]
  return tuple(dict.fromkeys(parts))


def schema_phrases(schemas: Sequence[dict[str, Any]]) -> tuple[str, ...]:
  """Each function's block of the system prompt, as the chat template writes it."""
  text = chat.text_of(chat.render([{"role": "user", "content": ""}], tools=list(schemas)))
  return tuple(re.findall(r"\n<function>\n.*?\n</function>", text, re.DOTALL))


class Tools(generator.Generator):
  """Two steps: the first looks the key up or assumes one, the second uses the place or assumes one."""

  name = "tools"
  style = STYLE

  def __init__(self):
    self.schemas = [function.schema() for function in FUNCTIONS.values()]
    prompts = [part for task in TASKS for part in (task.opening, task.joint)]
    markers = [self.style.careful, self.style.sloppy]
    errors = ["error: no event ", "error: no contact ", "error: no address "]
    self.phrases = (
      *schema_phrases(self.schemas), *call_phrases(), *prompts, MIDDLE, *markers, *errors, DONE,
    )  # fmt: skip

  def make_row(self, rng: np.random.Generator) -> Row:
    task = TASKS[rng.integers(len(TASKS))]
    keys = iter(rng.permutation(KEYS).tolist())
    titles, names = (_subjects(rng, t, 1 + OTHERS) for t in TASKS)
    # No event is already at the place asked for, so doing nothing is never right.
    place, *places = _some(rng, PLACES, 2 + OTHERS)
    events = [[next(keys), title, now] for title, now in zip(titles, places, strict=True)]
    contacts = [[name, next(keys)] for name in names]
    subject, key = (titles[0], events[0][0]) if task is MOVE else contacts[0]
    # Sorted, so that the order does not show which row was asked for.
    snapshot = {"calendar": sorted(events), "contacts": sorted(contacts)}
    truth = [_find(task, subject), _do(task, key, place)]
    return make_prompt(
      self.name, f"{task.opening}{subject}{MIDDLE}{place}",
      tools=self.schemas,
      ground_truth=[{"name": n, "arguments": json.dumps(arguments)} for n, arguments in truth],
      category=f"{ENVIRONMENT}_{task.category}", environment_name=ENVIRONMENT, snapshot=snapshot,
    )  # fmt: skip

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    (task,) = (t for t in TASKS if row["category"] == f"{ENVIRONMENT}_{t.category}")
    (_, found), (_, done) = true_calls(row)
    (subject,), (key, place) = found.values(), done.values()
    world = Workplace(row["snapshot"])
    messages: list[Message] = []

    def say(content: str, thought: str, call: tuple[str, dict[str, str]] | None = None):
      calls = {} if call is None else {"tool_calls": [_as_message(*call)]}
      messages.append(generator.assistant(content, thoughts=[thought] if thinking else None, **calls))
      if call is not None:
        messages.append({"role": "tool", "content": world.call(*call)})

    marker, errs = self.style.draw(rng)
    if errs:
      say("", f"{marker} {ASSUMED_KEY}", _do(task, ASSUMED_KEY, place))
    else:
      say("", marker, _find(task, subject))
      marker, errs = self.style.draw(rng)
      if errs:
        say("", f"{marker} {ASSUMED_PLACE}", _do(task, key, ASSUMED_PLACE))
      else:
        say("", marker, _do(task, key, place))
    say(DONE, DONE)
    return messages


def _some(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
  return rng.choice(words, count, replace=False).tolist()


def _subjects(rng: np.random.Generator, task: Task, count: int) -> list[str]:
  """`count` subjects of a task, which differ pairwise in both words."""
  words = zip(*(_some(rng, words, count) for words in task.words), strict=True)
  return [task.joint.join(pair) for pair in words]


def _find(task: Task, subject: str) -> tuple[str, dict[str, str]]:
  name, parameter = task.find
  return name, {parameter: subject}


def _do(task: Task, key: str, place: str) -> tuple[str, dict[str, str]]:
  name, of_key, of_place = task.do
  return name, {of_key: key, of_place: place}


def _as_message(name: str, arguments: dict[str, str]) -> dict[str, Any]:
  return {"type": "function", "function": {"name": name, "arguments": arguments}}
