"""A line of a benchmark has the contract's keys, and an unknown suite is refused by name."""

import json
import subprocess
import sys

import pytest

from experiments import bench, bench_convert
from nemocascade.errors import UserError

SMALL = dict(
  vocab_size=64, hidden_size=32, num_attention_heads=4, head_dim=8, mamba_num_heads=4, mamba_head_dim=8,
  ssm_state_size=8, n_groups=2, n_routed_experts=8, moe_intermediate_size=16,
  moe_shared_expert_intermediate_size=16,
)  # fmt: skip


def test_converting_is_measured_both_ways_against_copying(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bench_convert.cases, "__defaults__", (str(tmp_path),))
  monkeypatch.setattr(bench_convert, "MODEL", bench_convert.MODEL | SMALL)
  bench.run("convert")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["hf_to_ours", "ours_to_hf"]
  for line in lines:
    assert list(line) == ["suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"]
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"]) and line["suite"] == "convert"
  assert not list(tmp_path.iterdir())


def test_an_unknown_suite_is_refused_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'convert'"):
    bench.run("converts")


def test_the_command_takes_the_suite_as_its_argument():
  done = subprocess.run([sys.executable, "-m", "experiments.bench", "none"], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith("error: unknown suite 'none'")
