"""Tests of the guards: each fires on its failure and on no healthy history, and resumes exactly."""

import json

import numpy as np
import pytest

from configs import recipe
from configs.tiny import if_rl
from nemocascade import field_check, field_table
from nemocascade.errors import UserError
from nemocascade.runtime import guards
from nemocascade.runtime.guards import GUARDS

DEFAULTS = recipe.guards().guards.to_dict()
STEPS = 60
RNG = np.random.default_rng(0)
NOISE = 1 + 0.1 * RNG.standard_normal(STEPS)
T = np.linspace(0, 1, STEPS)

# Modelled on the stages of the tiny cascade, seed 0: their last steps, with more noise than theirs.
HEALTHY = {
  "policy/entropy": (0.4 - 0.34 * T) * NOISE,
  "rollout/verdict": np.clip((0.2 + 0.7 * T) * NOISE, 0, 1),
  "rollout/tokens": (17 + 14 * T) * NOISE,
  "policy/sampler_error": 2e-2 * NOISE,  # As in bf16; fp32 has 2e-7.
  "teacher/uniform": 0.05 * NOISE,
  "rollout/groups_with_signal": np.clip((1 - 0.85 * T) * NOISE, 0, 1),
  "disk/checkpoints": 1000 * NOISE,
}
SICK = {
  "entropy_collapse": 0.3 * 0.85 ** np.arange(STEPS) * NOISE,
  "reward_collapse": np.where(T < 0.5, 0.1 + T, 0.1) * NOISE,
  "length_explosion": 20 * (1 + 5 * T) * NOISE,
  "sampler_mismatch": np.where(T < 0.3, 1e-3, 0.2) * NOISE,
  "uniform_teacher": 0.95 * NOISE,
  "few_signals": np.where(T < 0.5, 0.5, 0.0) * NOISE,
  "disk_full": np.where(T < 0.9, 50, 1.5),
}


def run(series, settings=DEFAULTS, histories=None):
  """Returns (histories, names that fired at each step, flags of each step)."""
  histories, fired, flags = histories or {}, [], []
  for step in range(STEPS):
    metrics = {name: float(values[step]) for name, values in series.items()}
    histories, findings, of_step = guards.observe(histories, metrics, settings)
    fired.append([f.guard for f in findings])
    flags.append(of_step)
  return histories, fired, flags


def test_a_healthy_run_is_told_nothing():
  _, fired, flags = run(HEALTHY)
  assert not any(fired)
  assert set(flags[-1]) == {f"guard/{name}" for name in guards.GUARDS} and not any(flags[-1].values())


@pytest.mark.parametrize("name", [name for name in SICK if name not in guards.AT_ONCE])
def test_one_odd_step_is_no_trend(name):
  metric = guards.GUARDS[name].metric
  odd = HEALTHY[metric].copy()
  odd[30] = {"entropy_collapse": 0.0, "reward_collapse": 0.0, "few_signals": 0.0, "uniform_teacher": 1.0,
             "sampler_mismatch": 0.2, "length_explosion": 4 * odd[0]}[name]  # fmt: skip
  assert not any(run(HEALTHY | {metric: odd})[1])


def test_every_guard_has_a_sick_run_here_and_a_default():
  assert set(SICK) == set(guards.GUARDS) == set(DEFAULTS) - {"window"}
  assert set(HEALTHY) == {g.metric for g in guards.GUARDS.values()}


@pytest.mark.parametrize("name", SICK)
def test_each_fires_on_what_it_is_for_and_no_other_does(name):
  _, fired, flags = run(HEALTHY | {guards.GUARDS[name].metric: SICK[name]})
  assert {g for step in fired for g in step} == {name}
  assert [bool(step) for step in fired] == [bool(of_step.get(f"guard/{name}")) for of_step in flags]
  assert fired[-1] == [name]


@pytest.mark.parametrize("name", SICK)
def test_one_that_is_off_says_nothing(name):
  off = DEFAULTS | {name: DEFAULTS[name] | {"action": "off"}}
  _, fired, flags = run(HEALTHY | {guards.GUARDS[name].metric: SICK[name]}, off)
  assert not any(fired) and not any(f"guard/{name}" in of_step for of_step in flags)


def test_nothing_is_judged_before_the_window_is_full_but_the_disk():
  series = {guards.GUARDS[name].metric: values for name, values in SICK.items()}
  _, fired, flags = run(series | {"teacher/uniform": np.ones(STEPS), "disk/checkpoints": np.ones(STEPS)})
  assert all(step == ["disk_full"] for step in fired[: DEFAULTS["window"] - 1])
  assert "uniform_teacher" in fired[DEFAULTS["window"] - 1]


@pytest.mark.parametrize("best", [0.0, 0.05, -0.5])
def test_the_noise_of_a_small_or_negative_reward_is_no_collapse_but_its_fall_is(best):
  noise = np.random.default_rng(1).standard_normal(STEPS)
  quiet = {"rollout/verdict": best + 0.01 * noise}
  assert not any(run(quiet)[1])
  fallen = {"rollout/verdict": np.where(T < 0.5, best, best - 0.5)}
  assert run(fallen)[1][-1] == ["reward_collapse"]


def test_numbers_that_are_not_finite_leave_no_trace():
  bad = {name: values.copy() for name, values in HEALTHY.items()}
  histories, _, _ = guards.observe({}, {name: float("nan") for name in bad}, DEFAULTS)
  assert histories == {}
  for values in bad.values():
    values[20:23] = np.nan, np.inf, -np.inf
  histories, fired, _ = run(bad)
  assert not any(fired) and all(np.isfinite(h.mean) for h in histories.values())


@pytest.mark.parametrize("cut", [1, 9, 10, 37])
@pytest.mark.parametrize("name", ["reward_collapse", "length_explosion", "entropy_collapse"])
def test_histories_go_through_json_bit_by_bit(name, cut):
  series = HEALTHY | {guards.GUARDS[name].metric: SICK[name]}
  whole = run(series)
  histories, fired = {}, []
  for step in range(STEPS):
    if step == cut:
      histories = guards.from_json(json.loads(json.dumps(guards.to_json(histories), allow_nan=False)))
    histories, findings, _ = guards.observe(histories, {n: float(v[step]) for n, v in series.items()}, DEFAULTS)
    fired.append([f.guard for f in findings])
  assert (histories, fired) == whole[:2]
  assert [f.guard for f in guards.standing(histories, DEFAULTS)] == [
    name
  ]  # A resumed stage knows which guard ended it.


def test_a_finding_names_the_metric_its_value_and_the_field():
  _, findings, _ = guards.observe({}, {"disk/checkpoints": 1.5}, DEFAULTS)
  (finding,) = findings
  assert finding.action == "stop"
  assert all(word in finding.line for word in ("disk/checkpoints is 1.5", "below 2", "guards.disk_full.threshold"))


def test_every_guard_has_its_fields():
  """The table of fields, the default configs and the guards have the same names."""
  assert set(field_table.GUARDS) == set(GUARDS) == set(recipe.guards().guards) - {"window"}


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("entropy_collapse.action", "abort", ["guards.entropy_collapse.action", "stop"]),
    ("entropy_collapse.threshold", -1.0, ["guards.entropy_collapse.threshold=-1.0"]),
    ("disk_full.threshold", float("nan"), ["guards.disk_full.threshold=nan"]),
    ("few_signals.threshold", float("inf"), ["guards.few_signals.threshold=inf"]),
    ("window", 0, ["guards.window=0"]),
    ("window", 2.5, ["guards.window=2.5"]),
    ("disk_ful", {"action": "warn", "threshold": 1.0}, ["disk_ful", "disk_full"]),
  ],
)
def test_settings_that_cannot_be_are_refused(field, value, words):
  c = if_rl.get_config()
  field_check.check(c)
  section = c.guards
  *path, last = field.split(".")
  for part in path:
    section = section[part]
  with section.ignore_type(), c.unlocked():
    section[last] = value
  with pytest.raises(UserError) as error:
    field_check.check(c)
  assert all(word in str(error.value) for word in words)
