"""The record of a cascade, cascade.json: the state and scores of each stage, and the start of the next one."""

import dataclasses
from pathlib import Path

import jax

from nemocascade.errors import UserError, unknown
from nemocascade.evaluate.suites import DomainScore
from nemocascade.state_files import place, read_state, refused, stands, write_json

REMEDY = "remove it: finished stages are scored anew from their checkpoints"
NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
# Required fields of every finished stage but a reward model's.
SCORED = ("scores_after", "scores_intervals_after", "n_eval", "probe")
STAGE = {
  "type": "object",
  "required": ["name", "kind", "status", "start", "domains", "wall_s"],
  "properties": {
    "name": {"type": "string"},
    "kind": {"enum": ["sft", "rl", "reward_model"]},
    "status": {"enum": ["running", "done"]},
    "start": {"type": "string"},
    "domains": {"type": "array", "items": {"type": "string"}},
    "wall_s": {"type": "number"},
    "train_s": {"type": "number"},
    "eval_s_after": {"type": "number"},
    "steps": {"type": "integer", "minimum": 0},
    "tokens": {"type": "integer", "minimum": 0},
    "compilations": {"type": "integer", "minimum": 0},
    "checkpoint": {"type": "string", "minLength": 1},
    "probe": {
      "type": "object",
      "required": ["tokens", "logprobs", "entropy"],
      "properties": {
        "tokens": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "logprobs": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "entropy": {"type": "number"},
      },
    },
    "n_eval": {"type": "object", "additionalProperties": {"type": "integer"}},
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
    "teachers": {
      "type": "object",
      "additionalProperties": {
        "type": "object",
        "required": ["checkpoint", "score", "stage"],
        "properties": {
          "checkpoint": {"type": "string"}, "score": {"type": "number"}, "stage": {"type": "string"},
        },
      },
    },
  },
}  # fmt: skip


@dataclasses.dataclass
class Record:
  """The content of a work directory's cascade.json; `save` writes all of it.

  Attributes:
    path: of cascade.json.
    stages: one entry a stage, as in STAGE.
    teachers: domain -> {"checkpoint", "score", "stage"}.
  """

  path: Path
  stages: list[dict]
  teachers: dict[str, dict]

  @classmethod
  def open(cls, workdir: Path) -> "Record":
    path = place(workdir) / "cascade.json"
    if not stands(path):
      return cls(path, [], {})
    value = read_state(path, SHAPE, remedy=REMEDY)
    if len({entry["name"] for entry in value["stages"]}) < len(value["stages"]):
      raise refused(path, "a stage stands there twice", REMEDY)
    return cls(path, value["stages"], value["teachers"])

  def save(self) -> None:
    """Writes the file; only in the first process."""
    if jax.process_index() == 0:
      write_json(self.path, {"stages": self.stages, "teachers": self.teachers})

  def stage(self, name: str) -> dict | None:
    return next((entry for entry in self.stages if entry["name"] == name), None)

  def put(self, entry: dict) -> None:
    """Adds a stage's entry, or replaces the entry with the same name, and saves the file."""
    self.stages = [e for e in self.stages if e["name"] != entry["name"]] + [entry]
    self.save()

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
    if init_from == "previous":
      before = main_line[: main_line.index(name)] if name in main_line else main_line
      return self.checkpoint(before[-1]) if before else ""
    if self.stage(init_from) is not None:
      return self.checkpoint(init_from)
    return init_from


def columns(scores: dict[str, DomainScore], suffix: str, *, prefix: str = "scores") -> dict:
  """The fields of a stage's entry for one evaluation: means, intervals and counts of each domain.

  Args:
    suffix: "before" or "after" the stage.
    prefix: "scores" at temperature 1, "greedy" at temperature 0.
  """
  return {
    f"{prefix}_{suffix}": {name: score.mean for name, score in scores.items()},
    f"{prefix}_intervals_{suffix}": {name: [s.low, s.high] for name, s in scores.items()},
    f"{prefix}_masked_{suffix}": {name: score.masked for name, score in scores.items()},
    f"{prefix}_unfinished_{suffix}": {name: score.unfinished for name, score in scores.items()},
  }
