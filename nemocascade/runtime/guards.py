"""Guards: thresholds on the metrics of a stage that detect a run that is going wrong.

A guard compares the moving average of one metric with its threshold. Its history is stored as JSON, so that a
resumed stage decides like an uninterrupted one. docs/objectives.md lists the thresholds and reasons.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

# reward_collapse measures a fall from a smaller reward than this relative to this, because it may be noise.
SMALL_REWARD = 0.1


@dataclasses.dataclass(frozen=True)
class History:
  """The history of one metric."""

  steps: int = 0
  mean: float = 0.0  # The plain mean of the first `window` steps; after them an exponential moving average.
  first: float = 0.0  # The mean of the first `window` steps.
  best: float = -math.inf  # The largest `mean` from step `window` on.

  def plus(self, value: float, window: int) -> "History":
    steps = self.steps + 1
    mean = self.mean + (value - self.mean) / min(steps, window)
    if steps < window:
      return History(steps, mean)
    first = mean if steps == window else self.first
    return History(steps, mean, first, max(self.best, mean))


@dataclasses.dataclass(frozen=True)
class Guard:
  """A guard of `metric`.

  fires: (history, threshold) -> whether the guard fires.
  says: (history, threshold) -> the end of the message that begins "METRIC is VALUE, ".
  """

  metric: str
  fires: Callable[[History, float], bool]
  says: Callable[[History, float], str]


def _fell(h: History, share: float) -> bool:
  return h.best - h.mean > share * max(abs(h.best), SMALL_REWARD)


GUARDS = dict(
  # Entropy in nats a token: the policy explores too little.
  entropy_collapse=Guard("policy/entropy", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} nats"),
  # Share of the best average reward that was lost. The metric is raw verdicts, because the shaped rewards of
  # filtered groups also fall to 0 when every prompt is solved.
  reward_collapse=Guard("rollout/verdict", _fell, lambda h, x: f"and was {h.best:.3g}: more than {x:g} of it is lost"),
  # Sampled tokens of a completion, relative to the mean of the stage's first steps.
  length_explosion=Guard(
    "rollout/tokens", lambda h, x: h.mean > x * h.first, lambda h, x: f"more than {x:g} x the first {h.first:.3g}"
  ),
  # Mean |log(pi_train / pi_sampler)| a token: the trainer's policy differs from the sampler's.
  sampler_mismatch=Guard("policy/sampler_error", lambda h, x: h.mean > x, lambda h, x: f"above {x:g} nats a token"),
  # Share of tokens on which a teacher is within a nat of the uniform distribution; the largest of all teachers.
  uniform_teacher=Guard("teacher/uniform", lambda h, x: h.mean > x, lambda h, x: f"above {x:g} of the tokens"),
  # Share of groups whose verdicts differ; in other groups every advantage is 0.
  few_signals=Guard("rollout/groups_with_signal", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} of the groups"),
  # Number of checkpoints of this stage for which the disk has room.
  disk_full=Guard("disk/checkpoints", lambda h, x: h.mean < x, lambda h, x: f"below {x:g} checkpoints that still fit"),
)
# These guards use the last value alone. It describes the machine, so no history of it is kept.
AT_ONCE = ("disk_full",)


@dataclasses.dataclass(frozen=True)
class Finding:
  """The report of a guard that fired."""

  guard: str
  action: str  # "warn" or "stop".
  line: str  # One line for the user.


def observe(
  histories: Mapping[str, History], metrics: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, History], list[Finding], dict[str, float]]:
  """Adds a step's metrics: (new histories, findings, {"guard/<name>": 1 if it fired, else 0}).

  A guard is skipped if it is off, if its metric is missing or not finite, or if it has seen fewer than
  `window` steps.

  Args:
    histories: guard -> History.
    settings: the validated section `guards` of the config.
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
  """The findings from the histories alone; for a stage that a guard has ended, these say which one."""
  judged = [n for n, h in histories.items() if settings[n]["action"] != "off" and h.steps >= settings["window"]]
  return [finding for name in judged for finding in _judge(name, histories[name], settings)]


def _judge(name: str, h: History, settings: Mapping[str, Any]) -> list[Finding]:
  guard, x = GUARDS[name], settings[name]["threshold"]
  if not guard.fires(h, x):
    return []
  line = f"{name}: {guard.metric} is {h.mean:.3g}, {guard.says(h, x)} (guards.{name}.threshold)"
  return [Finding(name, settings[name]["action"], line)]


def to_json(histories: Mapping[str, History]) -> dict[str, Any]:
  """The histories as JSON, without an infinite `best`; `from_json` restores them bitwise."""
  fields = {name: dataclasses.asdict(h) for name, h in histories.items()}
  return {name: {k: v for k, v in of.items() if math.isfinite(v)} for name, of in fields.items()}


def from_json(value: Mapping[str, Any]) -> dict[str, History]:
  return {name: History(**fields) for name, fields in value.items()}
