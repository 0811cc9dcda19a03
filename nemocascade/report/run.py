"""What the report of a cascade reads of its work directory: record, config, metrics, samples and answers."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemocascade.evaluate.statistics import paired_interval
from nemocascade.report.metrics import LINE, read_lines
from nemocascade.state_files import read_state
from nemocascade.store.record import Record, differences

Stage = dict[str, Any]  # An entry of cascade.json.
# JSON schemas of a line of samples.jsonl and answers.jsonl, and of samples.jsonl of SFT.
SAMPLE = LINE | {
  "required": ["step", "domain", "prompt", "completion", "verdict", "reason", "masked"],
  "properties": LINE["properties"] | {
    "domain": {"type": "string"}, "completion": {"type": "string"},
    "verdict": {"type": "number"}, "masked": {"type": "boolean"},
  },
}  # fmt: skip
PIECE = {
  "type": "object", "required": ["text", "learned"],
  "properties": {"text": {"type": "string"}, "learned": {"type": "boolean"}},
}  # fmt: skip
DOCUMENT = LINE | {
  "required": ["step", "pieces"],
  "properties": LINE["properties"] | {"pieces": {"type": "array", "items": PIECE}},
}
CONFIG = {"type": "object", "properties": {"config": {"type": "object"}}}


@dataclasses.dataclass(frozen=True)
class Change:
  """The change of a score between two stages, on the same held-out prompts."""

  before: float
  after: float
  low: float  # Ends of the 95% interval of after - before.
  high: float

  @property
  def mean(self) -> float:
    return self.after - self.before

  @property
  def rose(self) -> bool:
    return self.low > 0

  @property
  def fell(self) -> bool:
    return self.high < 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A work directory of a cascade. The run may be unfinished.

  Attributes:
    made: the content of config.json; empty if there is none.
  """

  workdir: Path
  record: Record
  made: Mapping[str, Any]

  @classmethod
  def open(cls, workdir: Path) -> "Run":
    path = workdir / "config.json"
    made = read_state(path, CONFIG, remedy="remove it, or choose another --workdir") if path.exists() else {}
    return cls(workdir, Record.open(workdir), made)

  @property
  def config(self) -> Mapping[str, Any]:
    return self.made.get("config", {})

  @property
  def command(self) -> str:
    return self.made.get("begun", {}).get("command", "")

  @property
  def smoke(self) -> bool:
    """Whether the config is a `:smoke` form, whose scores mean nothing."""
    return bool(re.search(r"--config[= ][^ ]+:smoke\b", self.command))

  @property
  def stages(self) -> list[Stage]:
    return self.record.stages

  @property
  def done(self) -> list[Stage]:
    return [s for s in self.stages if s["status"] == "done"]

  @property
  def planned(self) -> list[str]:
    """The names of all stages in order, those that have not begun included, if the config has them."""
    begun = [s["name"] for s in self.stages]
    return [*begun, *(name for name in self.config.get("order", ()) if name not in begun)]

  @property
  def scored(self) -> list[Stage]:
    """The finished stages with held-out scores."""
    return [s for s in self.done if "scores_after" in s]

  def is_side(self, stage: Stage) -> bool:
    """Whether no later stage continues this one: side lines of the config, and stages that a gate went back from."""
    return stage["name"] in self.config.get("side_line", ()) or stage.get("decision") == "back"

  @functools.cached_property
  def main(self) -> list[Stage]:
    """The scored stages of the main line, in order. The last of them is the end of the run so far."""
    return [s for s in self.scored if not self.is_side(s)]

  @property
  def side(self) -> list[Stage]:
    return [s for s in self.scored if self.is_side(s)]

  @property
  def domains(self) -> list[str]:
    """The scored domains, in the order of the config."""
    return list(self.scored[0]["scores_after"]) if self.scored else list(self.config.get("domains", {}))

  def settings(self, stage: Stage) -> Mapping[str, Any]:
    """The stage's own fields of the config; empty if the config doesn't have the stage."""
    return self.config.get("stages", {}).get(stage["name"], {})

  def start_of(self, stage: Stage) -> Stage | None:
    """The scored stage whose checkpoint this one started from."""
    made = {s["checkpoint"]: s for s in self.scored}
    return made.get(stage["start"])

  def metrics(self, stage: Stage) -> list[dict[str, Any]]:
    return read_lines(self.workdir / stage["name"] / "metrics.jsonl")

  def samples(self, stage: Stage) -> list[dict[str, Any]]:
    return read_lines(self.workdir / stage["name"] / "samples.jsonl", DOCUMENT if stage["kind"] == "sft" else SAMPLE)

  def answers(self, stage: Stage) -> dict[str, list[dict[str, Any]]]:
    """Domain -> the answers to its first held-out prompts after the stage; empty before the stage has ended."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(self.workdir / stage["name"] / "answers.jsonl", SAMPLE):
      found.setdefault(line["domain"], []).append(line)
    return found


def change(after: Stage, before: Stage, domains: Sequence[str]) -> Change:
  """The change of the mean score over all held-out prompts of some domains, between two stages."""
  of = [differences(after, before, d) for d in domains]
  mean = lambda stage: float(np.mean([stage["scores_after"][d] for d in domains]))
  return Change(mean(before), mean(after), *paired_interval(np.concatenate(of)))


def percent_points(before: float, after: float) -> int:
  """The change of a score in percent points: the difference of the two whole percents that a reader sees."""
  return round(100 * after) - round(100 * before)


def words(name: str) -> str:
  """A stage's or domain's name as words."""
  return name.replace("_", " ")


def duration(seconds: float) -> str:
  """A time in words, such as "45 s", "4 min 10 s", "12 min" or "3 h 20 min"."""
  if seconds < 600:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float) -> str:
  """A large number with three digits, such as "155 thousand" or "4.81 million"."""
  for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
    if number >= size:
      digits = number / size
      return f"{digits:.0f} {name}" if digits >= 100 else f"{digits:.3g} {name}"
  return f"{number:g}"
