"""The lines of bench rollout, at tiny sizes and with a stand-in for transformers' `generate`."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import episodes, rl, rollout
from nemocascade.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_fast")
SMALL = dict(
  vocab_size=64, hidden_size=16, hybrid_override_pattern="M*E", num_attention_heads=4, head_dim=8, mamba_num_heads=4,
  mamba_head_dim=8, ssm_state_size=8, n_groups=2, n_routed_experts=8, moe_intermediate_size=16,
  moe_shared_expert_intermediate_size=16,
)  # fmt: skip
TINY = dataclasses.replace(
  rollout.SIZES,
  dtypes=("float32",),
  generate=(2, 4, 2),
  ticks=(2,),
  slots=(2,),
  prompts=(4,),
  new=2,
  tools=episodes.Sizes(slots=2, each=2, turns=2, tokens=3, result=1, tool_s=0.01, runs=1),
  side=16,
  copied=64,
)


class StandIn:
  """Takes two seconds, and computes our log-probabilities by another program."""

  name = "a stand-in"

  def __init__(self, folder, dtype):
    assert (folder / "config.json").exists() and dtype == "float32"

  def choose(self, prompts, new):
    return {"one form": self.generate(prompts, new)}

  def generate(self, prompts, new):
    assert np.shape(prompts) == (2, 4) and new == 2
    return 2.0

  def logprobs(self, row_BT):
    p = rl.make_parts(rl.config())
    params = rl.endless_params(p.programs, 0)
    return np.asarray(p.programs.score(params, row_BT, np.ones_like(row_BT)).logprobs_BT)[:, 1:]


def test_a_rollout_is_measured_against_transformers_and_its_limit(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(rl, "MODEL", rl.MODEL | SMALL)
  monkeypatch.setattr(rollout, "SIZES", TINY)
  monkeypatch.setitem(sys.modules, "experiments.bench.generate", types.SimpleNamespace(Peer=StandIn))
  bench.run("rollout", table=str(tmp_path / "table.md"))
  lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
  assert list(lines)[:2] == ["generate_float32", "tick_2_float32"]
  line = lines["generate_float32"]
  assert line["peer"] == 2 * 2 / 2.0 and line["ours"] > 0
  assert line["ratio"] == pytest.approx(line["ours"] / line["peer"])
  assert all(0.5 < lines[f"{name}_2_slots_4_occupancy_float32"]["ours"] <= 1 for name in ("equal", "long_tail"))
  whole = lines["long_tail_2_slots_4_decode_float32"]["peer"]
  parts = [lines[f"long_tail_2_slots_4_{part}_float32"]["ours"] for part in ("host", "prefill", "decode")]
  assert sum(parts) == pytest.approx(whole)
  line = lines["episodes_2_turns_10_ms_float32"]
  assert line["unit"] == "tokens/s" and line["ratio"] == pytest.approx(line["ours"] / line["peer"]) != 1
  assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_limit_is_the_longer_of_moving_and_multiplying():
  config = rl.make_parts(rl.config(**SMALL)).programs.config
  rates = rollout.Rates("float32", copy=1e9, matmul=1e30)
  one, many = rates.tick(config, 1, 8), rates.tick(config, 64, 8)
  state = 2 * 4 * 8 * 8 * 4  # Of the one Mamba block, read and written; the convolution's and the keys come on top.
  assert many - 64 * one < 0 and many > 64 * state / 1e9
  assert rates.tick(config, 64, 8) < dataclasses.replace(rates, matmul=1.0).tick(config, 64, 8)


def test_the_long_tail_has_its_99th_percentile_at_ten_times_the_median():
  drawn = rollout.lengths(20_000, 100)["long_tail"]
  median, last = np.percentile(drawn, (50, 99))
  assert last / median == pytest.approx(10, rel=0.15) and min(drawn) >= 1


def test_without_transformers_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "experiments.bench.generate", None)
  with pytest.raises(UserError, match=r"transformers.*pip install -e '\.\[bench\]'"):
    bench.run("rollout")
  with pytest.raises(UserError, match="--full with suite 'rl'"):
    bench.run("rl", full=True)
