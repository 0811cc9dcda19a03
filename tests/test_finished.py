"""A finished stage is found without opening its model; STAGE/latest is the newest checkpoint."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime import finished
from nemocascade.runtime.newest import name_newest, newest
from nemocascade.store import checksums
from nemocascade.store.checkpoint import Store
from nemocascade.types import TrainState

CONFIG = ConfigDict(dict(steps=4, guards=dict(window=2, reward_collapse=dict(action="warn", threshold=0.5))))


@pytest.fixture
def stage(tmp_path):
  """A stage with checkpoints after 2 and 4 steps."""
  with Store(tmp_path / "sft" / "checkpoints") as store:
    for step in (2, 4):
      store.save(step, TrainState(jnp.int32(step), {"w": jnp.ones(3)}, {}), {})
  return tmp_path / "sft"


def test_a_stage_is_finished_if_its_last_checkpoint_is_whole(stage, capsys):
  assert finished.stage(CONFIG, stage)
  last = stage / "checkpoints" / "4"
  assert capsys.readouterr().err == f"sft: all 4 steps were done before; checkpoint: {last}\n"
  more = CONFIG.copy_and_resolve_references()
  more.steps = 6
  assert not finished.stage(more, stage) and not finished.stage(CONFIG, stage.parent / "rl")
  (last / "record" / "metadata").write_text('{"tokens": 1}')
  assert not finished.stage(CONFIG, stage)  # A byte has changed.
  assert capsys.readouterr().err == ""


def test_with_validation_it_hands_on_the_best_checkpoint(stage, capsys):
  c = ConfigDict(CONFIG.to_dict() | {"validation": dict(every=2)})
  lines = [{"step": step, "metric": metric, "scores": {}} for step, metric in ((2, 0.5), (4, 0.25))]
  (stage / "validation.json").write_text(json.dumps(lines))
  assert finished.stage(c, stage) and "checkpoints/2\n" in capsys.readouterr().err


def test_a_stage_that_a_guard_ended_is_not_finished(stage, monkeypatch):
  c = ConfigDict(CONFIG.to_dict() | {"guards": dict(window=1, reward_collapse=dict(action="stop", threshold=0.5))})
  metadata = stage / "checkpoints" / "4" / "record" / "metadata"
  monkeypatch.setattr(checksums, "verify", lambda *_: None)
  assert finished.stage(c, stage)
  histories = {"reward_collapse": {"steps": 4, "mean": 0.1, "first": 1.0, "best": 1.0}}
  metadata.write_text(json.dumps({"supervisor": {"histories": histories}}))
  assert not finished.stage(c, stage)


def test_latest_is_the_newest_checkpoint_in_flags_and_fields(stage):
  last = str(stage / "checkpoints" / "4")
  (stage / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # An unfinished save does not count.
  assert newest(f"{stage}/latest") == newest(f"{stage}/checkpoints/latest") == last
  for name in (last, "", "latest", "previous", "hf:some/latest", f"{stage}/checkpoints"):
    assert newest(name) == name
  c = ConfigDict(
    dict(init_from="previous", stages=dict(a=dict(init_from=f"{stage}/latest", teachers=dict(math=f"{stage}/latest"))))
  )
  name_newest(c)
  assert c.init_from == "previous" and c.stages.a.init_from == c.stages.a.teachers.math == last
  c.stages.a.teachers.math = "nowhere/latest"
  with pytest.raises(UserError, match="stages.a.teachers.math='nowhere/latest': .* holds no checkpoint"):
    name_newest(c)
