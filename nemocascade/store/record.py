"""The record of a cascade, cascade.json: the state and scores of each stage, and the start of the next one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from nemocascade.errors import UserError, unknown
from nemocascade.evaluate.suites import DomainScore
from nemocascade.state_files import place, read_state, refused, stands, write_json

REMEDY = "remove it: finished stages are scored anew from their checkpoints"
NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
# Required fields of every finished stage but a reward model's.
SCORED = ("scores_after", "scores_intervals_after", "prompt_scores_after", "n_eval", "probe")
NO_SCORE = "-"  # In `prompt_scores_after`: every completion of the prompt is masked.
TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
NUMBER = r"-?\d{1,9}(\.\d{1,9})?(e[-+]?\d\d?)?"
WORDS = rf"^((-|{NUMBER})( (-|{NUMBER}))*)?$"  # A word a prompt.
TEACHERS = {
  "type": "object",
  "additionalProperties": {
    "type": "object",
    "required": ["checkpoint", "score", "stage"],
    "properties": {"checkpoint": {"type": "path"}, "score": {"type": "number"}, "stage": {"type": "path"}},
  },
}
GATES = {  # What runtime/gates.py found: domain -> finding.
  "type": "object",
  "additionalProperties": {
    "type": "object",
    "required": ["tolerance", "action", "change", "interval", "fell"],
    "properties": {
      "tolerance": {"type": "number"},
      "action": {"enum": ["warn", "mopd", "back", "stop"]},
      "change": {"type": "number"},
      "interval": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
      "fell": {"type": "boolean"},
    },
  },
}
STAGE = {
  "type": "object",
  "required": ["name", "kind", "status", "start", "domains", "wall_s"],
  "properties": {
    "name": {"type": "path"},
    "kind": {"enum": ["sft", "rl", "reward_model"]},
    "status": {"enum": ["running", "done"]},
    "start": {"type": "path"},
    "domains": {"type": "array", "items": {"type": "string"}},
    "wall_s": {"type": "number"},
    "train_s": {"type": "number"},
    "eval_s_after": {"type": "number"},
    "steps": {"type": "integer", "minimum": 0},
    "tokens": {"type": "integer", "minimum": 0},
    "compilations": {"type": "integer", "minimum": 0},
    "checkpoint": {"type": "path", "minLength": 1},
    "asked_steps": {"type": "integer", "minimum": 1},
    "config": {"type": "string"},
    "commit": {"type": "string"},
    "parent": {"type": "path"},
    "judge": {"type": "path"},
    "judge_stage": {"type": "string"},
    "teaches": {"type": "array", "items": {"type": "string"}},
    "teachers": TEACHERS,
    "gates": GATES,
    "decision": {"enum": ["pass", "warn", "mopd", "back", "stop"]},
    "prompt_scores_after": {"type": "object", "additionalProperties": {"type": "string", "pattern": WORDS}},
    "probe": {
      "type": "object",
      "required": ["tokens", "logprobs", "entropy"],
      "sameShape": ["tokens", "logprobs"],
      "properties": {
        "tokens": {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 2, "items": TOKEN}},
        "logprobs": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "entropy": {"type": "number"},
      },
    },
    "n_eval": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
  },
  "patternProperties": {
    "^(scores|greedy)_(before|after)$": NUMBERS,
    "^(scores|greedy)_intervals_(before|after)$": {
      "type": "object",
      "additionalProperties": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    },
  },
  "if": {"required": ["status"], "properties": {"status": {"const": "done"}}},
  "then": {
    "required": ["steps", "checkpoint", "tokens", "train_s", "compilations"],
    "if": {"required": ["kind"], "properties": {"kind": {"not": {"const": "reward_model"}}}},
    "then": {"required": list(SCORED)},
  },
}
SHAPE = {
  "type": "object",
  "required": ["stages", "teachers"],
  "properties": {
    "stages": {"type": "array", "items": STAGE},
    "teachers": TEACHERS,
    "set_aside": {"type": "array", "items": STAGE},
  },
}


@dataclasses.dataclass
class Record:
  """The content of a work directory's cascade.json; `save` writes all of it.

  Attributes:
    path: of cascade.json.
    stages: one entry a stage, as in STAGE.
    teachers: domain -> {"checkpoint", "score", "stage"}, those of the last stage that had some.
    set_aside: entries of stages that were trained anew; their names are those of their folders now.
  """

  path: Path
  stages: list[dict]
  teachers: dict[str, dict]
  set_aside: list[dict] = dataclasses.field(default_factory=list)

  @classmethod
  def open(cls, workdir: Path) -> "Record":
    path = place(workdir) / "cascade.json"
    if not stands(path):
      return cls(path, [], {})
    value = read_state(path, SHAPE, remedy=REMEDY)
    if len({entry["name"] for entry in value["stages"]}) < len(value["stages"]):
      raise refused(path, "a stage stands there twice", REMEDY)
    if found := circle({entry["name"]: [entry.get("parent", "")] for entry in value["stages"]}):
      raise refused(path, f"stages are parents of one another: {' <- '.join(found)}", REMEDY)
    return cls(path, value["stages"], value["teachers"], value.get("set_aside", []))

  def save(self) -> None:
    """Writes the file; only in the first process."""
    if jax.process_index() > 0:
      return
    aside = {"set_aside": self.set_aside} if self.set_aside else {}
    write_json(self.path, {"stages": self.stages, "teachers": self.teachers} | aside)

  def stage(self, name: str) -> dict | None:
    return next((entry for entry in self.stages if entry["name"] == name), None)

  def put(self, entry: dict) -> None:
    """Adds a stage's entry, or replaces the entry with the same name in its place, and saves the file."""
    if self.stage(entry["name"]) is None:
      self.stages = [*self.stages, entry]
    else:
      self.stages = [entry if e["name"] == entry["name"] else e for e in self.stages]
    self.save()

  def is_done(self, name: str) -> bool:
    entry = self.stage(name)
    return entry is not None and entry["status"] == "done"

  def made(self, checkpoint: str) -> str:
    """The stage whose final checkpoint this is; "" if there is none."""
    return next((e["name"] for e in self.stages if e.get("checkpoint") == checkpoint and e["status"] == "done"), "")

  def checkpoint(self, name: str) -> str:
    """The final checkpoint of a stage. Raises UserError if there is no such stage or it has not finished."""
    entry = self.stage(name)
    if entry is None:
      raise unknown("stage", name, [e["name"] for e in self.stages])
    if entry["status"] != "done":
      raise UserError(f"stage {name!r} has not finished: its status is {entry['status']!r}")
    return entry["checkpoint"]

  def start_of(self, name: str, init_from: str, main_line: list[str]) -> str:
    """The checkpoint from which the stage `name` starts, or "" for fresh parameters.

    Args:
      init_from: "", "previous", the name of a stage, or a checkpoint.
      main_line: the stages that "previous" may mean, in their order.

    Raises:
      UserError: the stage to start from has not finished.
    """
    if init_from == "":
      return ""
    parent = parent_of(name, init_from, main_line)
    if init_from == "previous":
      return self.checkpoint(parent) if parent else ""
    return self.checkpoint(parent) if self.stage(parent) is not None else init_from


def circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
  """The first circle of stages, each of which needs the next; its first stage is its last too. [] if there is none."""
  done: set[str] = set()

  def visit(name: str, path: tuple[str, ...]) -> list[str]:
    if name in path:
      return [*path[path.index(name) :], name]
    if name in needs and name not in done:
      for other in needs[name]:
        if found := visit(other, (*path, name)):
          return found
      done.add(name)
    return []

  return next((found for name in needs if (found := visit(name, ()))), [])


def parent_of(name: str, init_from: str, main_line: Sequence[str]) -> str:
  """The stage that `name` starts from, or the checkpoint that init_from names; "" for fresh parameters.

  Args:
    main_line: the stages that "previous" may mean, in their order.
  """
  if init_from != "previous":
    return init_from
  before = list(main_line[: main_line.index(name)] if name in main_line else main_line)
  return before[-1] if before else ""


def prompt_scores(entry: dict, domain: str) -> np.ndarray:
  """The scores of a domain's held-out prompts after a stage, NaN where all completions were masked; float [N]."""
  words = entry["prompt_scores_after"].get(domain, "").split()
  return np.array([np.nan if word == NO_SCORE else float(word) for word in words])


def differences(after: dict, before: dict, domain: str) -> np.ndarray:
  """Score after one stage minus score after another of the domain's prompts that both have a score for; float [N].

  Raises:
    UserError: the entries are of other numbers of prompts.
  """
  a_N, b_N = prompt_scores(after, domain), prompt_scores(before, domain)
  if len(a_N) != len(b_N):
    raise UserError(
      f"stages {before['name']!r} and {after['name']!r} have scores of {len(b_N)} and {len(a_N)} prompts of"
      f" {domain!r}, which can't be compared; {REMEDY}"
    )
  d_N = a_N - b_N
  return d_N[~np.isnan(d_N)]


def columns(scores: dict[str, DomainScore], suffix: str, *, prefix: str = "scores") -> dict:
  """The fields of a stage's entry for one evaluation: means, intervals and counts of each domain.

  Those of the scores at temperature 1 include each prompt's score, as text, so that stages can be compared on the
  same prompts: `prompt_scores`.

  Args:
    suffix: "before" or "after" the stage.
    prefix: "scores" at temperature 1, "greedy" at temperature 0.
  """
  word = lambda mean: NO_SCORE if mean is None else f"{mean:.6g}"
  prompts = {n: " ".join(map(word, s.of_prompts)) for n, s in scores.items()} if prefix == "scores" else {}
  return ({f"prompt_scores_{suffix}": prompts} if prompts else {}) | {
    f"{prefix}_{suffix}": {name: score.mean for name, score in scores.items()},
    f"{prefix}_intervals_{suffix}": {name: [s.low, s.high] for name, s in scores.items()},
    f"{prefix}_masked_{suffix}": {name: score.masked for name, score in scores.items()},
    f"{prefix}_unfinished_{suffix}": {name: score.unfinished for name, score in scores.items()},
  }
