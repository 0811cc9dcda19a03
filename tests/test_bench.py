"""A line of a benchmark has the contract's keys, and an unknown suite is refused by name."""

import json
import subprocess
import sys

import pytest

from experiments import bench, bench_convert, bench_kernels
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


def test_the_routed_matmul_is_measured_against_ragged_dot(monkeypatch, capsys):
  monkeypatch.setattr(bench_kernels.cases, "__defaults__", (8, 8, 64))
  bench.run("kernels")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["case"] for line in lines] == ["forward_16_experts", "forward_128_experts"]
  for line in lines:
    assert list(line) == ["suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"]
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"])


def test_a_schedule_is_that_of_its_busiest_stretch_between_branches(tmp_path):
  """Six bundles of four slots: a label at the third and a branch at the fifth bound the loop."""
  texts = ["{ a }", "{ b }", "LB: > { c }", ": > { d }", ": > { sbr.rel (%p) target = $region2 }", ": { e }"]
  lines = [f" {hex(i)} {text if ':' in text else ': ' + text}" for i, text in enumerate(texts)]
  (tmp_path / "17-routed_product.1-72-final_bundles.txt").write_text("\n".join(lines))
  use = "== CAPACITY:\nMXU, XLU\n 4 3\n== UTILIZATION:\n" + "".join(f"{n} 0\n" for n in (1, 1, 4, 2, 0, 3))
  (tmp_path / "17-routed_product.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(use)
  assert bench_kernels.read_schedule(tmp_path) == (0.75, 2)


def test_only_kernels_are_compared_without_running_them():
  with pytest.raises(UserError, match="--static is of the suite kernels, not of convert"):
    bench.run("convert", static=True)


def test_an_unknown_suite_is_refused_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'convert'"):
    bench.run("converts")


def test_the_command_takes_the_suite_as_its_argument():
  done = subprocess.run([sys.executable, "-m", "experiments.bench", "none"], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith("error: unknown suite 'none'")
