"""An advantage and the other functions of an objective, in a user's own file: checked, used, never stale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.tiny import if_rl
from experiments import rl
from nemocascade.errors import UserError
from nemocascade.runtime import objective, own_functions
from nemocascade.runtime import workdir as workdir_lib
from nemocascade.state_files import write_json

ROOT = Path(__file__).parent.parent

ADVANTAGES = '''
"""My advantages."""

import jax.numpy as jnp

from nemocascade.advantage import needs


def everywhere(x_QG, r):
  return jnp.broadcast_to(x_QG[..., None], r.tokens_QGT.shape)


@needs(groups=True)
def centred(r, *, strength=1.0):
  """Reward minus the mean of its group, times `strength`."""
  mean_Q1 = jnp.mean(r.rewards_QG, axis=1, keepdims=True, where=r.valid_QG)
  return everywhere(strength * jnp.where(r.valid_QG, r.rewards_QG - mean_Q1, 0.0), r)


@needs(teachers=True)
def agreed(r, *, strength=1.0):
  return strength * jnp.sign(r.teacher_logprobs_QGT - r.behaviour_logprobs_QGT)
'''

OTHERS = """
import jax.numpy as jnp
import numpy as np

def unbounded(logprobs_BT, proximal_BT, a_BT, mean_of, *, top=10.0):
  return jnp.minimum(jnp.exp(logprobs_BT - proximal_BT), top) * a_BT, jnp.zeros(a_BT.shape, bool)

def halved(gap_BT, drawn_gap_BT, mean_of):
  return jnp.where(mean_of(gap_BT) > 0, 0.5, 1.0)

def square_root(mask_BT):
  weights_BT = mask_BT / jnp.sqrt(jnp.maximum(mask_BT.sum(1, keepdims=True), 1.0))
  return weights_BT, jnp.sum(weights_BT)

def absolute(logprobs_BT, reference_BT):
  return jnp.abs(logprobs_BT - reference_BT)

def apart(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature):
  return jnp.sum(jnp.square(x_BTD - rows["teacher_states"]), -1)

def likeliest(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature, *, k=4):
  return -rows["top_logprobs"][..., :k].sum(-1)

def late(rewards_QG, finished_QG, room_QG):
  return np.where(room_QG > 0, rewards_QG, np.float32(-1)), finished_QG
"""
SLOT_OF = dict(
  unbounded="ratio", halved="correction", square_root="aggregation", absolute="kl", apart="distillation",
  likeliest="distillation", late="overlong",
)  # fmt: skip


def config(**fields):
  c = if_rl.get_config("smoke")
  c.update_from_flattened_dict(fields)
  return c


def write(path: Path, text: str) -> Path:
  path.write_text(text)
  return path


@pytest.fixture
def mine(tmp_path) -> Path:
  return write(tmp_path / "my_advantages.py", ADVANTAGES)


def test_an_own_advantage_is_used_with_its_settings(mine):
  c = config(advantage=f"{mine}:centred", **{"options.centred": {"strength": 3.0}})
  rl.check(c)
  rollout = own_functions.small_rollout(c, 4, lambda *shape: np.zeros(shape, np.float32), taught=False)
  rows, _, _ = objective.rows_program(objective.settings(c, "advantage", "aggregation"))(rollout)
  np.testing.assert_allclose(np.unique(rows["advantages"]), [-2, -1.5, 0, 1, 1.5], atol=1e-6)


def test_an_own_advantage_states_what_it_needs(mine):
  needs = objective.needs(config(advantage=f"{mine}:centred"))
  assert needs.groups and not needs.teachers
  with pytest.raises(UserError, match="rollout.completions=1 under advantage='.*:centred'"):
    rl.check(config(advantage=f"{mine}:centred", **{"rollout.completions": 1}))
  with pytest.raises(UserError, match="advantage='.*:agreed': domain 'instruction' of the mixture has no teacher"):
    rl.check(config(advantage=f"{mine}:agreed"))
  rl.check(config(advantage=f"{mine}:agreed", teachers={"instruction": "best"}))


@pytest.mark.parametrize("name", SLOT_OF)
def test_every_other_slot_takes_an_own_function(name, tmp_path):
  spec = f"{write(tmp_path / 'mine.py', OTHERS)}:{name}"
  c = config(**{SLOT_OF[name]: spec}, teachers={"instruction": "best"}, distillation_weight=1.0)
  rl.check(c)
  assert objective.chosen(c, SLOT_OF[name]).func.__name__ == name
  assert spec in objective.settings(c, SLOT_OF[name])
  assert name != "likeliest" or objective.topk(c) == 4
  assert name != "apart" or objective.topk(c) is None


BAD = {
  "def f(r): return r.rewards_QG": r"returns advantages_QGT as float32 of shape \(3, 4\): must be float32 of shape \(3, 4, 6\)",
  "def f(r): return r.tokens_QGT": "returns advantages_QGT as int32 of shape",
  "def f(r): return r.teacher_logprobs_QGT * 1": "raises TypeError.*needs\\(teachers=True\\)",
  "def f(r): return 1 / 0": "raises ZeroDivisionError: division by zero .line 1 of mine.py.$",
  "def f(r): return r.behaviour_logprobs_QGT / 0": "returns advantages_QGT with a value that is not finite: ",
  "def f(r): return r.behaviour_logprobs_QGT if r.rewards_QG.sum() > 0 else 0": "raises TracerBoolConversionError",
  "def f(r): return 'much'": "raises TypeError|must be an array",
  "def f(r): return None": "returns advantages_QGT as NoneType None: must be an array",
  "def f(r, s): return 0": "must take 1 argument, and settings as keyword-only arguments with defaults",
  "def f(r, *, s): return 0": "must take 1 argument, and settings as keyword-only arguments with defaults",
  "def f(): return 0": "must take 1 argument",
  "def g(r): return 0": "has no 'f': did you mean 'g'|has no 'f': it defines g",
  "f = 3": "f in .*mine.py is int",
  "def f(r: return 0": "is not Python",
}  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_a_bad_function_is_one_line_that_names_field_and_file(source, tmp_path):
  spec = f"{write(tmp_path / 'mine.py', source)}:f"
  with pytest.raises(UserError, match=BAD[source]) as error:
    rl.check(config(advantage=spec))
  assert str(error.value).startswith(f"advantage='{spec}'") and "\n" not in str(error.value)


def test_a_slot_of_two_results_names_both(tmp_path):
  spec = f"{write(tmp_path / 'mine.py', 'def f(rewards_QG, finished_QG, room_QG): return rewards_QG')}:f"
  with pytest.raises(UserError, match=r"must return \(rewards_QG, kept_QG\)"):
    rl.check(config(overlong=spec))


def test_a_setting_that_an_own_function_does_not_have_is_named(mine):
  with pytest.raises(UserError, match="setting in options.centred 'strenght': did you mean 'strength'"):
    rl.check(config(advantage=f"{mine}:centred", **{"options.centred": {"strenght": 3.0}}))


def test_a_word_that_is_neither_a_name_nor_a_file_lists_both():
  with pytest.raises(UserError, match="advantage.*FILE.py:NAME.*grpo"):
    rl.check(config(advantage="mine.txt:f"))


def test_a_changed_file_is_not_served_the_program_of_the_old_one(mine):
  c = config(advantage=f"{mine}:centred")
  rollout = own_functions.small_rollout(c, 4, lambda *shape: np.zeros(shape, np.float32), taught=False)

  def largest() -> float:
    rows, _, _ = objective.rows_program(objective.settings(c, "advantage", "aggregation"))(rollout)
    return float(np.max(rows["advantages"]))

  rl.check(c)
  before = largest()
  write(mine, ADVANTAGES.replace("strength=1.0", "strength=5.0"))
  assert largest() == before  # A run keeps the code that it was checked with.
  rl.check(c)
  assert largest() == pytest.approx(5 * before)


def test_a_run_does_not_go_on_with_another_version_of_a_file(mine, tmp_path):
  c, workdir = config(advantage=f"{mine}:centred"), tmp_path / "run"
  rl.check(c)
  written = {
    "config": json.loads(c.to_json_best_effort()),
    "versions": {},
    "own_code": workdir_lib.own_versions(c.to_dict()),
  }
  write_json(workdir / "config.json", written)
  workdir_lib.check_owner(c, workdir)
  write(mine, ADVANTAGES + "\n# Changed.\n")
  rl.check(c)
  with pytest.raises(UserError, match="was begun with another version of the file of '.*my_advantages.py:centred'"):
    workdir_lib.check_owner(c, workdir)


def test_the_built_in_functions_pass_the_trial_of_their_slot():
  """The trial asks of a user's function no more than the built-in functions do."""
  for slot, functions in objective.SLOTS.items():
    for name, function in functions.items():
      own_functions._try(slot, config(**{slot: name, "rollout.top_p": 0.9, "kl_weight": 1.0}), function)


ABLATION = """
from configs.tiny.grpo_vs_mopd import grpo, sweep


def get_config(arg=""):
  centred, agreed = grpo(), grpo()
  centred.advantage = "my_advantages.py:centred"
  agreed.advantage, agreed.teachers = "my_advantages.py:agreed", dict(math="teacher")
  agreed.options.agreed = dict(strength=2.0)
  return sweep(arg, dict(centred=centred, agreed=agreed), pairs=(("centred", "agreed"),))
"""


def test_an_ablation_compares_own_advantages_from_one_config_file(mine, tmp_path):
  write(tmp_path / "my_ablation.py", ABLATION)
  words = ["--config=my_ablation.py:smoke", "--workdir=run", "--config.seeds=(0,)"]
  done = subprocess.run(
    [sys.executable, "-m", "experiments.ablation", *words],
    cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads((tmp_path / "run" / "ablation.json").read_text())
  assert set(found["arms"]) == {"centred", "agreed"}
  lines = {n: (tmp_path / f"run/seed_0/arms/{n}/rl/metrics.jsonl").read_text().splitlines() for n in found["arms"]}
  of = {name: json.loads(line[0])["advantage/abs"] for name, line in lines.items()}
  assert of == {"centred": 0.0, "agreed": 2.0}  # At smoke size every verdict is 0.
