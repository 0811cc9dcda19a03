"""A stage of RL: refused with the numbers, and the same to the last bit when it is resumed."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs.tiny import if_rl
from experiments import rl
from experiments.assembly import Assembly
from nemocascade.checkpoint import Store, load_params
from nemocascade.errors import UserError
from nemocascade.types import TrainState


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("packing.rows", 4, ["packing.rows=4", "at least"]),
    ("packing.row_tokens", 60, ["packing.row_tokens=60", "rollout.total_tokens=112"]),
    ("rollout.completions", 1, ["rollout.completions=1"]),
    ("overlong", "drop", ["overlong", "zero"]),
    ("correction", "icepopp", ["icepop"]),
  ],
)
def test_a_stage_that_cannot_run_is_refused_with_its_numbers(field, value, words):
  c = if_rl.get_config("smoke")
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError) as error:
    rl.check(c)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  """A stage of four steps from fresh parameters, with a checkpoint after every second."""
  root = tmp_path_factory.mktemp("rl")
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.steps, c.save_every, c.dynamic_filtering, c.overlong = 4, 2, False, "keep"
    c.rollout.update(prompts=4, completions=2)
    c.packing.update(rows=8, pieces=2)
  a = Assembly(c, root)
  params = a.fresh_params(jax.random.key(0))
  Store(root / "start" / "checkpoints").save(1, TrainState(np.int32(0), params, {}), {})
  start = str(root / "start" / "checkpoints" / "1")
  rl.run(c, root / "whole" / "if_rl", a, start)
  return c, a, root, start


def lines(stage_dir):
  rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_resumed_stage_is_the_uninterrupted_one_to_the_last_bit(stage):
  c, a, root, start = stage
  whole, cut = root / "whole" / "if_rl", root / "cut" / "if_rl"
  shutil.copytree(whole, cut)
  shutil.rmtree(cut / "checkpoints" / "4")  # As if killed in the fourth step.
  outcome = rl.run(c, cut, a, start)
  expected = load_params(whole / "checkpoints" / "4", jax.eval_shape(lambda p: p, outcome.params))
  jax.tree.map(np.testing.assert_array_equal, outcome.params, expected)
  assert lines(cut) == lines(whole)
  assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_step_learns_from_what_the_trainer_itself_would_have_sampled(stage):
  _, _, root, _ = stage
  for line in lines(root / "whole" / "if_rl"):
    assert abs(line["policy/sampler_kl"]) < 1e-4 and line["policy/sampler_error"] < 1e-4
