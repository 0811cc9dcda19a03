"""Guards of a stage: named thresholds on what its steps report, that say when a run is going wrong.

A guard follows one metric by its moving average. What it remembers is plain JSON, so that a resumed stage
judges as the uninterrupted one does. experiments/OBJECTIVES.md has the table of thresholds and reasons.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

SMALL_REWARD = 0.1  # A fall from a reward below this is judged as a fall from this: else it is noise.


@dataclasses.dataclass(frozen=True)
class History:
  """Of one metric: `mean` is the plain mean of the first `window` steps, then the moving average."""

  steps: int = 0
  mean: float = 0.0
  first: float = 0.0  # The mean of the first `window` steps.
  best: float = -math.inf  # The largest mean since then.

  def plus(self, value: float, window: int) -> "History":
    steps = self.steps + 1
    mean = self.mean + (value - self.mean) / min(steps, window)
    if steps < window:
      return History(steps, mean)
    first = mean if steps == window else self.first
    return History(steps, mean, first, max(self.best, mean))


@dataclasses.dataclass(frozen=True)
class Guard:
  """Fires where fires(history, threshold) is true; `says` completes "METRIC is VALUE, "."""

  metric: str
  fires: Callable[[History, float], bool]
  says: Callable[[History, float], str]


def _fell(h: History, share: float) -> bool:
  return h.best - h.mean > share * max(abs(h.best), SMALL_REWARD)


GUARDS = dict(
  # Nats of a token: too little is left to explore with.
  entropy_collapse=Guard("policy/entropy", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} nats"),
  # Share of the best average so far that was lost. Raw verdicts: shaped rewards of filtered groups fall
  # to 0 also where everything is solved.
  reward_collapse=Guard(
    "rollout/verdict", _fell, lambda h, x: f"and was {h.best:.3g}: more than {x:g} of it is lost"
  ),
  # Sampled tokens of a completion, in units of the stage's first steps.
  length_explosion=Guard(
    "rollout/tokens", lambda h, x: h.mean > x * h.first, lambda h, x: f"more than {x:g} x the first {h.first:.3g}"
  ),
  # Mean |log(pi_train / pi_sampler)| of a token: the gradient is of another policy than the one that sampled.
  sampler_mismatch=Guard("policy/sampler_error", lambda h, x: h.mean > x, lambda h, x: f"above {x:g} nats a token"),
  # Share of tokens on which a teacher knows no more than the size of the vocabulary, of the worst teacher.
  uniform_teacher=Guard("teacher/uniform", lambda h, x: h.mean > x, lambda h, x: f"above {x:g} of the tokens"),
  # Share of groups whose verdicts differ: the others have no advantage.
  few_signals=Guard("rollout/groups_with_signal", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} of the groups"),
  # Checkpoints of this stage that still fit on the disk.
  disk_full=Guard("disk/checkpoints", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} checkpoints that still fit"),
)
AT_ONCE = ("disk_full",)  # Judged by the last value alone, which is of the machine and no part of the run's state.


@dataclasses.dataclass(frozen=True)
class Finding:
  """A guard that fires at this step."""

  guard: str
  action: str  # warn | stop
  line: str


def observe(
  histories: Mapping[str, History], metrics: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, History], list[Finding], dict[str, float]]:
  """(the histories with this step's metrics, the guards that fire, "guard/<name>" -> 0 or 1 of those that judged).

  A guard that is off, whose metric is not there or not finite, or that has seen less than `window` steps
  says nothing. `settings` is a section as `check` wants it.
  """
  histories, findings, flags = dict(histories), [], {}
  for name, guard in GUARDS.items():
    value = metrics.get(guard.metric)
    if settings[name]["action"] == "off" or value is None or not math.isfinite(value):
      continue
    if name in AT_ONCE:
      h = History().plus(float(value), 1)
    else:
      h = histories[name] = histories.get(name, History()).plus(float(value), settings["window"])
      if h.steps < settings["window"]:
        continue
    found = _judge(name, h, settings)
    flags[f"guard/{name}"] = float(bool(found))
    findings += found
  return histories, findings, flags


def standing(histories: Mapping[str, History], settings: Mapping[str, Any]) -> list[Finding]:
  """What the histories alone say: of a stage that a guard has ended, what ended it."""
  judged = [n for n, h in histories.items() if settings[n]["action"] != "off" and h.steps >= settings["window"]]
  return [finding for name in judged for finding in _judge(name, histories[name], settings)]


def _judge(name: str, h: History, settings: Mapping[str, Any]) -> list[Finding]:
  guard, x = GUARDS[name], settings[name]["threshold"]
  if not guard.fires(h, x):
    return []
  line = f"{name}: {guard.metric} is {h.mean:.3g}, {guard.says(h, x)} (guards.{name}.threshold)"
  return [Finding(name, settings[name]["action"], line)]


def to_json(histories: Mapping[str, History]) -> dict[str, Any]:
  """Plain JSON; an infinite `best` is left out. `from_json` gives the same histories, bit by bit."""
  fields = {name: dataclasses.asdict(h) for name, h in histories.items()}
  return {name: {k: v for k, v in of.items() if math.isfinite(v)} for name, of in fields.items()}


def from_json(value: Mapping[str, Any]) -> dict[str, History]:
  return {name: History(**fields) for name, fields in value.items()}
