"""Which stages a command runs, what it does with a finished stage that gets more steps, and what the tree shows."""

import json
from pathlib import Path

import pytest
from scripted_cascade import LINE, Script, cascade_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import cascade
from nemocascade.errors import UserError
from nemocascade.report.tree import tree
from nemocascade.runtime import lineage, origin
from nemocascade.runtime.course import Choice
from nemocascade.store.kept import kept_steps
from nemocascade.store.record import Record


def run(workdir, *, more=None, only="", first="", last=""):
  """Runs the scripted cascade; `more` gives stages other numbers of steps."""
  c = cascade_config()
  for name, steps in (more or {}).items():
    c.stages[name].steps = steps
  return cascade.run(c, workdir, Choice(only, first, last))


def test_only_from_and_until_choose_stages(tmp_path, monkeypatch, capsys):
  script = Script(monkeypatch)
  run(tmp_path, last="if_rl")
  assert script.stages == ["sft", "if_rl"]
  capsys.readouterr()
  run(tmp_path, only="multi_domain_rl")
  assert "done before: sft, if_rl\n" in capsys.readouterr().out
  assert script.stages == ["sft", "if_rl", "multi_domain_rl"]
  run(tmp_path, first="mopd", last="code_rl")
  assert script.stages == list(LINE[:5])
  run(tmp_path)
  assert script.stages == list(LINE)


def test_the_choice_of_the_next_stage_is_compared_between_processes(tmp_path, monkeypatch):
  Script(monkeypatch)
  decided = []
  monkeypatch.setattr(cascade.hosts, "decided", lambda value, what: decided.append(value))
  run(tmp_path, last="if_rl")
  assert [value for value in decided if isinstance(value, list)] == [["sft", "if_rl"], ["if_rl"]]


@pytest.mark.parametrize(
  "choice, message",
  [
    (dict(only="if_rll"), "unknown stage in --only 'if_rll': did you mean 'if_rl'"),
    (dict(only="if_rl", last="mopd"), "--only=if_rl: must be given without --from and --until"),
    (dict(first="mopd", last="if_rl"), "--from=mopd: comes after --until=if_rl"),
    (dict(only="if_rl"), "stages.if_rl.init_from: stage 'sft' is not trained yet; --from=sft"),
  ],
)
def test_a_choice_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, choice, message):
  Script(monkeypatch)
  with pytest.raises(UserError) as error:
    run(tmp_path / "run", **choice)
  assert message in str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_trained_when_it_is_asked_for_is_refused():
  c = cascade_config()
  c.stages.mopd.teachers.math = "code_rl"
  with pytest.raises(UserError, match="stages.mopd: teachers.math='code_rl': comes later in `order`"):
    cascade.check(c)


def test_stages_in_a_circle_are_named():
  c = cascade_config()
  c.stages.if_rl.init_from = "mopd"
  c.stages.mopd.init_from = "if_rl"
  with pytest.raises(UserError, match="in a circle: if_rl <- mopd <- if_rl"):
    cascade.check(c)


@pytest.fixture
def finished(tmp_path, monkeypatch):
  script = Script(monkeypatch)
  run(tmp_path)
  script.runs.clear()
  return tmp_path, script


def test_the_scores_after_each_stage_are_in_its_tensorboard(finished):
  workdir, _ = finished
  for name in LINE:
    (event,) = EventAccumulator(str(workdir / name)).Reload().Scalars("heldout_end/math")
    assert event.value == 0.5


@pytest.mark.parametrize(
  "parents, message",
  [
    ({"sft": "if_rl", "if_rl": "sft"}, "parents of one another: sft <- if_rl <- sft"),
    ({"if_rl": "if_rl"}, "parents of one another: if_rl <- if_rl"),
  ],
)
def test_a_record_with_parents_in_a_circle_is_refused(finished, parents, message):
  workdir, _ = finished
  path = workdir / "cascade.json"
  record = json.loads(path.read_text())
  for entry in record["stages"]:
    entry["parent"] = parents.get(entry["name"], entry["parent"])
  path.write_text(json.dumps(record))
  with pytest.raises(UserError, match=message):
    Record.open(workdir)


def test_more_steps_make_the_stages_after_stale_and_they_are_named(finished):
  workdir, script = finished
  before = (workdir / "cascade.json").read_text()
  with pytest.raises(UserError, match="stages mopd, code_rl, swe_rl were made from multi_domain_rl, which gets more"):
    run(workdir, more=dict(multi_domain_rl=4))
  assert not script.runs and (workdir / "cascade.json").read_text() == before


def test_until_trains_the_stage_alone_and_from_then_the_others_anew(finished):
  workdir, script = finished
  more = dict(multi_domain_rl=4)
  record = run(workdir, more=more, last="multi_domain_rl")
  assert script.runs == [("multi_domain_rl", "if_rl", 4, None)]
  assert [e["name"] for e in record.stages] == list(LINE)  # In their order still.
  # Others started from step 2, which is kept.
  assert kept_steps(workdir / "multi_domain_rl" / "checkpoints") == {"end_2": 2}
  assert json.loads((workdir / "config.json").read_text())["config"]["stages"]["multi_domain_rl"]["steps"] == 4
  with pytest.raises(UserError, match="were made from multi_domain_rl, which is another now: --from=mopd trains"):
    run(workdir, more=more)
  record = run(workdir, more=more, first="mopd")
  assert script.stages[1:] == ["mopd", "code_rl", "swe_rl"]
  assert record.stage("mopd")["start"].endswith("multi_domain_rl/checkpoints/4")
  assert [e["name"] for e in record.set_aside] == ["mopd.was1", "code_rl.was1", "swe_rl.was1"]
  for aside in record.set_aside:
    assert Path(aside["checkpoint"], "params").is_dir()
  run(workdir, more=more)
  assert len(script.runs) == 4


def test_from_the_stage_itself_does_both(finished):
  workdir, script = finished
  run(workdir, more=dict(multi_domain_rl=4), first="multi_domain_rl")
  assert script.stages == ["multi_domain_rl", "mopd", "code_rl", "swe_rl"]
  with pytest.raises(UserError, match="belongs to another config"):
    run(workdir)  # Fewer steps again.


def test_a_kill_while_the_stage_gets_more_steps_leaves_the_others_stale(finished, monkeypatch):
  workdir, script = finished
  more = dict(multi_domain_rl=4)

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cascade, "train", killed)
  with pytest.raises(KeyboardInterrupt):
    run(workdir, more=more, last="multi_domain_rl")
  monkeypatch.setattr(cascade, "train", script.train)
  with pytest.raises(UserError, match="--until=multi_domain_rl trains it alone"):
    run(workdir, more=more)
  run(workdir, more=more, last="multi_domain_rl")
  assert script.stages == ["multi_domain_rl"]


def test_a_stage_whose_teacher_changed_is_stale_too(tmp_path, monkeypatch):
  Script(monkeypatch, sft={"math": 0.9})
  c = cascade_config()
  c.stages.mopd.init_from = "if_rl"
  c.stages.mopd.teachers.instruction = "multi_domain_rl"
  record = cascade.run(c, tmp_path, Choice())
  assert lineage.stale(c, record, ["multi_domain_rl"]) == {
    "mopd": "multi_domain_rl", "code_rl": "mopd", "swe_rl": "code_rl",
  }  # fmt: skip


def test_setting_aside_goes_on_after_a_kill_between_folder_and_record(finished):
  workdir, _ = finished
  (workdir / "swe_rl").rename(workdir / "swe_rl.was1")
  lineage.set_aside(record := Record.open(workdir), ["swe_rl"])
  assert record.set_aside[0]["checkpoint"] == str(workdir / "swe_rl.was1" / "checkpoints" / "2")
  assert Record.open(workdir).stage("swe_rl") is None


def test_a_stage_resumes_only_with_the_teachers_that_it_began_with():
  stamp = lambda **teachers: {"stage": "mopd", "teachers": teachers}  # noqa: E731
  before = stamp(math="sft/checkpoints/6", code="if_rl/checkpoints/2")
  origin.check_same_teachers(before, stamp(code="if_rl/checkpoints/2", math="sft/checkpoints/6"))
  origin.check_same_teachers({}, before)
  for now, message in (
    (stamp(math="if_rl/checkpoints/2", code="if_rl/checkpoints/2"), "math=sft/checkpoints/6, which now is if_rl/check"),
    (stamp(math="sft/checkpoints/6"), "mopd began with teachers.code=if_rl/checkpoints/2, which now is none"),
  ):
    with pytest.raises(UserError, match=message):
      origin.check_same_teachers(before, now)


def test_the_entry_says_what_made_the_checkpoint(finished):
  workdir, _ = finished
  entry = Record.open(workdir).stage("mopd")
  assert entry["parent"] == "multi_domain_rl" and entry["commit"] == origin.commit()
  assert entry["teachers"]["math"]["stage"] == "sft" and len(entry["config"]) == 12
  other = Record.open(workdir).stage("code_rl")
  assert other["config"] != entry["config"] and "teachers" not in other


def test_the_tree_is_drawn_from_the_record_alone(tmp_path, monkeypatch):
  script = Script(monkeypatch, code_rl={"math": 0.1, "code": 0.75})
  c = cascade_config(code_rl={"math": {"tolerance": 0.2, "action": "back"}})
  cascade.run(c, tmp_path, Choice())
  assert tree(Record.open(tmp_path)).split("\n") == [
    "fresh parameters",
    "└─ sft: 6 steps, mean 0.500",
    "   └─ if_rl: 2 steps, mean 0.500, instruction 0.500 -> 0.500",
    "      └─ multi_domain_rl: 2 steps, mean 0.500, math 0.500 -> 0.500",
    "         └─ mopd: 2 steps, mean 0.500, instruction 0.500 -> 0.500, math 0.500 -> 0.500",
    "            │  teachers: instruction=sft, math=sft",
    "            ├─ code_rl: 2 steps, mean 0.461, code 0.500 -> 0.750",
    "            │     gate of math: -0.406 [-0.516, -0.272] against -0.2: back",
    "            └─ swe_rl: 2 steps, mean 0.500, swe 0.500 -> 0.500",
  ]
  c.stages.mopd.steps = 4
  cascade.run(c, tmp_path, Choice(first="mopd"))
  drawn = tree(Record.open(tmp_path))
  assert "code_rl.was1: 2 steps, mean 0.461, code 0.500 -> 0.750 (trained anew since)" in drawn
  assert len(script.runs) == len(LINE) + 3
