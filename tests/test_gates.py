"""Gates of a cascade: when they fire, what follows, and that a resumed cascade takes the same decisions."""

import numpy as np
import pytest
from scripted_cascade import Script, cascade_config, score

from experiments import cascade
from nemocascade.errors import StageStopped, UserError
from nemocascade.evaluate.statistics import paired_interval
from nemocascade.runtime import gates
from nemocascade.runtime.course import Choice
from nemocascade.store.record import Record, columns, differences, prompt_scores


def test_the_paired_interval_is_that_of_agresti_and_min():
  # 10 pairs: 4 fell, 1 rose. With half a pair in each cell: mean -3 / 12, mean square (4 + 1 + 1) / 12.
  low, high = paired_interval([-1] * 4 + [1] + [0] * 5)
  half = 1.959964 * np.sqrt((0.5 - 0.25**2) / 12)
  assert (low, high) == (pytest.approx(-0.25 - half), pytest.approx(-0.25 + half))
  assert paired_interval([]) == (-1.0, 1.0)


def test_one_prompt_or_none_decides_nothing_and_many_equal_ones_are_no_certainty():
  assert paired_interval([-1.0])[1] > 0
  low, high = paired_interval(np.zeros(100))
  assert low == -high and 0.01 < high < 0.03


def test_the_interval_covers_the_true_difference():
  rng, covered = np.random.default_rng(0), 0
  for _ in range(400):
    before, after = rng.random(64) < 0.6, rng.random(64) < 0.5
    low, high = paired_interval(after.astype(float) - before)
    covered += low <= -0.1 <= high
  assert 0.92 < covered / 400 < 0.98


def entry(name="x", **shares):
  return {"name": name} | columns({domain: score(share) for domain, share in shares.items()}, "after")


def gate(tolerance, action="back"):
  return {"tolerance": tolerance, "action": action}


def test_a_gate_fires_where_the_whole_interval_is_below_the_tolerance():
  # 16 of 64 prompts are lost: -0.25, with an interval of about [-0.36, -0.14].
  after, before = entry(math=0.5), entry(math=0.75)
  judged = lambda tolerance: gates.judge({"gates": {"math": gate(tolerance)}}, after, before)  # noqa: E731
  low, high = judged(0.0)["gates"]["math"]["interval"]
  assert low < -0.25 < high < -0.1
  assert judged(-high - 1e-6)["decision"] == "back" and judged(-high + 1e-6)["decision"] == "pass"
  assert judged(0.0)["gates"]["math"]["change"] == pytest.approx(-0.25)


def test_noise_does_not_fire_it():
  rng, fired = np.random.default_rng(1), 0
  for _ in range(200):
    words = [" ".join(map(str, rng.integers(0, 2, 64))) for _ in range(2)]
    after, before = ({"name": "x", "prompt_scores_after": {"math": of}} for of in words)
    fired += gates.judge({"gates": {"math": gate(0.0)}}, after, before)["decision"] != "pass"
  assert fired / 200 < 0.05


def test_the_strongest_of_the_gates_that_fire_counts():
  after, before = entry(math=0.2, code=0.2, swe=0.5), entry(math=0.8, code=0.8, swe=0.5)
  of = {"math": gate(0.1, "warn"), "code": gate(0.1, "mopd"), "swe": gate(0.1, "stop")}
  found = gates.judge({"gates": of}, after, before)
  assert found["decision"] == "mopd"
  assert {domain for domain, of in found["gates"].items() if of["fell"]} == {"math", "code"}
  assert gates.judge({}, after, before) == {}


def test_only_prompts_that_both_stages_have_a_score_for_are_compared():
  after = {"name": "b", "prompt_scores_after": {"math": "1 - 0.5 0"}}
  before = {"name": "a", "prompt_scores_after": {"math": "0 1 - 0.25"}}
  np.testing.assert_array_equal(differences(after, before, "math"), [1, -0.25])
  np.testing.assert_array_equal(prompt_scores(after, "math"), [1, np.nan, 0.5, 0])
  with pytest.raises(UserError, match="'a' and 'b' have scores of 4 and 1 prompts"):
    differences({"name": "b", "prompt_scores_after": {"math": "1"}}, before, "math")


FALL = {"code_rl": {"math": 0.1}}


def run(tmp_path, action, **choice):
  c = cascade_config(code_rl={"math": gate(0.2, action)})
  return cascade.run(c, tmp_path, Choice(**choice))


def test_back_starts_the_next_stage_before_this_one(tmp_path, monkeypatch):
  script = Script(monkeypatch, **FALL)
  record = run(tmp_path, "back")
  assert script.runs[-2:] == [("code_rl", "mopd", 2, None), ("swe_rl", "mopd", 2, None)]
  assert record.stage("code_rl")["decision"] == "back" and record.stage("swe_rl")["parent"] == "mopd"


def test_a_warning_changes_nothing_but_is_in_the_record(tmp_path, monkeypatch, capsys):
  script = Script(monkeypatch, **FALL)
  record = run(tmp_path, "warn")
  assert script.runs[-1][:2] == ("swe_rl", "code_rl")
  found = record.stage("code_rl")["gates"]["math"]
  assert found["fell"] and found["interval"][1] < -0.2
  assert "gates of code_rl: math changed by -0.4" in capsys.readouterr().err


def test_mopd_is_inserted_with_the_best_teachers(tmp_path, monkeypatch):
  script = Script(monkeypatch, **FALL, if_rl={"instruction": 0.9}, multi_domain_rl={"instruction": 0.1})
  run(tmp_path, "mopd")
  assert script.stages[-3:] == ["code_rl", "mopd_after_code_rl", "swe_rl"]
  assert script.runs[-2] == ("mopd_after_code_rl", "code_rl", 2, {"math": "sft", "instruction": "if_rl"})
  assert script.runs[-1][1] == "mopd_after_code_rl"


def test_a_stop_ends_the_cascade_each_time_until_from_goes_on(tmp_path, monkeypatch):
  script = Script(monkeypatch, **FALL)
  for _ in range(2):
    with pytest.raises(StageStopped, match="gates of code_rl: .*--from=swe_rl goes on"):
      run(tmp_path, "stop")
  assert script.stages[-1] == "code_rl" and script.stages.count("code_rl") == 1
  run(tmp_path, "stop", first="swe_rl")
  assert script.runs[-1][:2] == ("swe_rl", "code_rl")


@pytest.mark.parametrize("action", ["back", "mopd"])
def test_a_resumed_cascade_takes_the_decision_of_the_record(tmp_path, monkeypatch, action):
  Script(monkeypatch, **FALL)
  run(tmp_path, action, last="code_rl")
  again = Script(monkeypatch)  # Whose scores would decide otherwise.
  run(tmp_path, action)
  assert again.runs[-1][:2] == ("swe_rl", {"back": "mopd", "mopd": "mopd_after_code_rl"}[action])
  before = Record.open(tmp_path)
  run(tmp_path, action)
  assert Record.open(tmp_path) == before


@pytest.mark.parametrize(
  "stage, of, message",
  [
    ("code_rl", {"maths": gate(0.1)}, "domain in stages.code_rl.gates 'maths': did you mean 'math'"),
    ("code_rl", {"math": {"tolerance": 0.1}}, "stages.code_rl.gates.math.action is missing"),
    ("code_rl", {"math": gate(0.1, "retry")}, "unknown stages.code_rl.gates.math.action 'retry'"),
    ("code_rl", {"math": gate(1.5)}, "stages.code_rl.gates.math.tolerance=1.5"),
    ("code_rl", {"swe": gate(0.1, "mopd")}, "recovery='mopd' has no 'swe' in its mixture"),
    ("sft", {"math": gate(0.1)}, "stages.sft.gates.math: the stage starts from no stage"),
  ],
)
def test_a_gate_that_cannot_be_applied_is_refused_before_anything_is_written(tmp_path, stage, of, message):
  with pytest.raises(UserError) as error:
    cascade.run(cascade_config(**{stage: of}), tmp_path / "run")
  assert message in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_gate_of_a_side_line_may_not_change_the_main_line():
  c = cascade_config(code_rl={"math": gate(0.1)})
  c.side_line = ("code_rl",)
  with pytest.raises(UserError, match="'code_rl' is in side_line"):
    cascade.check(c)
  c = cascade_config(code_rl={"math": gate(0.1, "mopd")})
  c.recovery = ""
  with pytest.raises(UserError, match="needs `recovery`"):
    cascade.check(c)


def test_a_recovery_that_is_no_stage_is_refused_even_if_no_gate_needs_it():
  c = cascade_config()
  c.recovery = "mopdd"
  with pytest.raises(UserError, match="unknown stage in recovery 'mopdd': did you mean 'mopd'"):
    cascade.check(c)
