"""Validation inside a stage: held-out scores every few steps, the best checkpoint kept, an early end.

  c.validation = dict(every=20, metric="math", patience=3)

Scores go to validation.json in the stage's folder. The best step is named in kept.json there, so that its checkpoint
outlives newer ones, and it is the checkpoint that the stage hands on. A stage without `every` has none of this.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.errors import UserError, unknown
from nemocascade.runtime import hosts, loading
from nemocascade.runtime.heldout import Heldout
from nemocascade.runtime.outcome import Outcome, Spent
from nemocascade.runtime.parts import Parts
from nemocascade.state_files import place, read_state, stands, write_json
from nemocascade.store.kept import keep_step
from nemocascade.store.record import NUMBERS
from nemocascade.types import Params

MEAN = "mean"  # The metric that is the mean of all domains' scores.
NAME, REMEDY = "validation.json", "restore it, or choose another --workdir"
FILE = {  # JSON schema of validation.json: a list in the order of the steps.
  "type": "array",
  "items": {
    "type": "object",
    "required": ["step", "metric", "scores"],
    "properties": {"step": {"type": "integer", "minimum": 1}, "metric": {"type": "number"}, "scores": NUMBERS},
  },
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """The config's section `validation`, with its defaults."""

  every: int = 0  # Steps between validations; 0 is never.
  metric: str = MEAN  # A domain, or the mean over all of them.
  prompts: int = 64  # Held-out prompts of each domain, or all there are.
  patience: int = 0  # The stage ends after so many validations without a new best; 0 is never.


def settings(c: ConfigDict) -> Settings:
  return Settings(**c.get("validation", {}))


def check(c: ConfigDict) -> None:
  """Raises UserError if the stage's validation can't be done. Nothing is computed."""
  v = settings(c)
  if not v.every:
    if v != Settings():
      raise UserError(f"validation.every=0 with {_differs(v)}: without validation these have no effect; give every")
    return
  if v.every % c.save_every:
    raise UserError(
      f"validation.every={v.every}: must be a multiple of save_every={c.save_every}, since each validated step may be"
      " the one whose checkpoint is kept"
    )
  if v.metric != MEAN and v.metric not in c.domains:
    raise unknown("validation.metric", v.metric, [MEAN, *c.domains])


def _differs(v: Settings) -> str:
  of = dataclasses.asdict(Settings())
  return ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(v).items() if value != of[name])


class Validation:
  """A Watch (runtime/logbook.py) of a stage: it validates, remembers the best step, and says when to end."""

  def __init__(self, c: ConfigDict, stage_dir: Path, p: Parts, heldout: Heldout):
    """
    Args:
      c: the stage's config.
      heldout: of its prompts `validation.prompts` a domain are scored, with one completion each.
    """
    self._settings, self._last, self._dir, self._parts = settings(c), c.steps, stage_dir, p
    n = self._settings.prompts
    # Taken evenly over the list: prompts near its start are more common and so easier.
    some = {name: rows[:: max(1, len(rows) // n)][:n] for name, rows in heldout.rows.items()}
    self._heldout = dataclasses.replace(heldout, rows=some)
    self._path = stage_dir / NAME
    # What the first process reads, so that all decide alike.
    self._lines: list[dict] = hosts.exchange(self._read(), "validations")[0] if self._settings.every else []

  def __call__(self, steps: int, params: Params, spent: Spent) -> bool:
    """Validates if a validation is due after `steps` steps. Returns whether the stage ends here."""
    del spent
    v = self._settings
    if not v.every:
      return False
    found = self._found()
    if (steps % v.every == 0 or steps == self._last) and steps not in found:
      found = self._validate(steps, params)
    if not v.patience or not found:
      return False
    best = _best(found)
    ended = sum(best < step <= steps for step in found) >= v.patience
    hosts.decided([best, ended], "best step, and whether the stage ends")
    return ended

  def handed_on(self, outcome: Outcome) -> Outcome:
    """The outcome of a finished stage with its best checkpoint; unchanged without validation."""
    step = _best(self._found()) if self._settings.every else outcome.steps
    if step == outcome.steps:
      return outcome
    checkpoint = str(place(outcome.checkpoint).parent / str(step))
    params = loading.load(checkpoint, self._parts.programs.template)
    return dataclasses.replace(outcome, params=params, checkpoint=checkpoint)

  def _validate(self, steps: int, params: Params) -> dict[int, float]:
    """Scores the parameters and writes the scores. Returns step -> metric of all validations."""
    found = self._heldout.evaluate(self._parts, params, temperature=1.0)
    scores = {name: score.mean for name, score in found.items()}
    metric = float(np.mean(list(scores.values()))) if self._settings.metric == MEAN else scores[self._settings.metric]
    self._lines = [*self._lines, {"step": steps, "metric": metric, "scores": scores}]
    best = _best(self._found())

    def write() -> None:  # Before the step's checkpoint is saved, because saving removes old ones.
      write_json(self._path, self._lines)
      keep_step(self._dir / "checkpoints", "best", best)
      print(f"{self._dir.name}, step {steps}: {self._settings.metric} {metric:.3f}, best at {best}", file=sys.stderr)

    hosts.first_alone(write, "files of a validation")
    return self._found()

  def _read(self) -> list[dict]:
    if not stands(self._path):
      return []
    return read_state(self._path, FILE, remedy=REMEDY)

  def _found(self) -> dict[int, float]:
    """Step -> metric of all validations so far."""
    return {line["step"]: line["metric"] for line in self._lines}


def best_step(c: ConfigDict, stage_dir: Path) -> int:
  """The step whose checkpoint a finished stage hands on; 0 without validation."""
  if not settings(c).every or not stands(stage_dir / NAME):
    return 0
  lines = read_state(stage_dir / NAME, FILE, remedy=REMEDY)
  return _best({line["step"]: line["metric"] for line in lines})


def scores_at(c: ConfigDict, stage_dir: Path, steps: int) -> dict[str, float]:
  """Domain -> held-out score of the validation after `steps` steps; empty without one, and outside the first process."""
  v = settings(c)
  if jax.process_index() or not v.every or (steps % v.every and steps != c.steps) or not stands(stage_dir / NAME):
    return {}
  lines = read_state(stage_dir / NAME, FILE, remedy=REMEDY)
  return next((line["scores"] for line in lines if line["step"] == steps), {})


def _best(found: Mapping[int, float]) -> int:
  """The step with the highest metric, of equal ones the first."""
  return max(found, key=lambda step: (found[step], -step))
