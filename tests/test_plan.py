"""The plan of a cascade: its numbers against ones computed by hand, and that it writes nothing."""

import json

import pytest
from scripted_cascade import Script, cascade_config

from configs.tiny import cascade as config
from experiments import cascade
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model.size import count_params, matmul_params
from nemocascade.runtime import plan
from nemocascade.runtime.course import Choice
from nemocascade.runtime.outcome import Spent
from nemocascade.store.record import Record


def planned(c, record=None):
  return {line.stage: line for line in plan.plan(c, record or Record("", [], {}))}


def test_tokens_and_flops_of_each_kind_are_those_computed_by_hand():
  c = config.get_config()
  lines = planned(c)
  assert list(lines) == list(c.order)
  model = ModelConfig.from_fields(c.model.to_dict())
  assert lines["sft"].spent == Spent(trained=600 * 32 * 256)
  assert lines["sft"].flops == 6 * matmul_params(model) * 600 * 32 * 256
  assert lines["reward_model"].spent == Spent(trained=70 * 2 * 64 * 64)
  r, p = c.stages.mopd.rollout, c.stages.mopd.packing
  samples, steps = r.prompts * r.completions, c.stages.mopd.steps
  assert lines["mopd"].spent == Spent(
    sampled=steps * samples * (r.total_tokens - r.prompt_tokens), prefilled=steps * r.prompts * r.prompt_tokens,
    scored=steps * samples * r.total_tokens, trained=steps * p.rows * p.row_tokens,
  )  # fmt: skip
  assert lines["if_rl"].spent.scored == 0 and lines["rlhf"].spent.scored > 0  # Its KL to the start.
  assert (lines["mopd"].batch, lines["sft"].rows) == ("256 x 1", "32 x 256 / 4")
  assert lines["rlhf"].start == "mopd" and lines["rlhf_teacher"].start == "sft"


def test_a_checkpoint_has_parameters_and_two_moments_of_those_that_are_trained():
  c = config.get_config("smoke")
  model = ModelConfig.from_fields(c.model.to_dict())
  size = planned(c)["sft"].checkpoint
  # All but the routers' biases have moments. Counters of the optimizer are a few numbers more.
  biases = model.hybrid_override_pattern.count("E") * model.n_routed_experts
  arrays = 4 * (3 * count_params(model) - 2 * biases)
  assert arrays < size < arrays + 100
  gates = model.hybrid_override_pattern.count("E") * model.n_routed_experts * model.hidden_size
  assert planned(c)["if_rl"].checkpoint == size - 4 * 2 * gates  # RL freezes the routers.
  assert planned(c)["if_rl"].disk == 2 * planned(c)["if_rl"].checkpoint
  c.stages.if_rl.validation = dict(every=1)
  c.stages.if_rl.steps = 5
  assert planned(c)["if_rl"].disk == 3 * planned(c)["if_rl"].checkpoint


def test_it_says_what_is_done_and_what_a_gate_may_insert(tmp_path, monkeypatch):
  Script(monkeypatch)
  c = cascade_config(code_rl={"math": {"tolerance": 0.1, "action": "mopd"}})
  cascade.run(c, tmp_path, Choice(last="if_rl"))
  record = Record.open(tmp_path)
  c.stages.sft.steps = 8
  status = {name: line.status for name, line in planned(c, record).items()}
  assert status == {
    "sft": "more steps", "if_rl": "done", "multi_domain_rl": "to do", "mopd": "to do", "code_rl": "to do",
    "mopd_after_code_rl": "if a gate fires", "swe_rl": "to do",
  }  # fmt: skip


def dry_run(c, capsys, **flags):
  cascade.main(c, None, **dict(show=False, dry_run=True, compiled="", only="", until="") | {"from": ""} | flags)
  return capsys.readouterr().out


def test_the_table_has_a_line_for_each_stage_and_nothing_is_written(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  c = config.get_config()
  c.stages.rlhf.gates = {"math": {"tolerance": 0.05, "action": "back"}}
  lines = dry_run(c, capsys).split("\n")
  head, body = lines[0].split(), {line.split()[0]: line for line in lines[1 : 1 + len(c.order)]}
  assert head[:5] == ["stage", "status", "kind", "start", "domains"] and list(body) == list(c.order)
  assert "256 x 1" in body["mopd"] and "4.92M" in body["sft"]
  assert "gates of rlhf: math back at -0.05" in lines
  assert not any(tmp_path.iterdir())


def test_memory_is_that_of_the_last_compile(tmp_path, capsys):
  file = tmp_path / "compiled.jsonl"
  line = lambda **more: {"stage": "sft", "program": "step", "topology": "v5p:4x4x4", "peak_gib": 40.0} | more  # noqa: E731
  write = lambda *lines: file.write_text("".join(json.dumps(of) + "\n" for of in lines))  # noqa: E731
  write(line(), line(peak_gib=50.0, resident_gib=2.25, host_gib=12.0), line(stage="if_rl", peak_gib=1))
  assert plan.read_compiled(str(file)) == {"sft": (52.25, 12.0, "v5p:4x4x4"), "if_rl": (1, None, "v5p:4x4x4")}
  out = dry_run(config.get_config("smoke"), capsys, compiled=str(file))
  assert "v5p:4x4x4 device" in out and "52.2 GiB" in out
  write(line(), line(topology="v5e:16x16"))
  with pytest.raises(UserError, match="lines for v5p:4x4x4 and for v5e:16x16"):
    plan.read_compiled(str(file))
  write({"program": "step"})
  with pytest.raises(UserError, match="line 1.*lacks stage"):
    plan.read_compiled(str(file))
  with pytest.raises(UserError, match="--compiled=none.jsonl: there is no such file"):
    plan.read_compiled("none.jsonl")


def test_a_plan_of_some_stages_has_only_these(capsys):
  out = dry_run(config.get_config("smoke"), capsys, only="mopd").split("\n")
  assert out[1].startswith("mopd ") and not out[2]
  with pytest.raises(UserError, match="unknown stage in --only 'mopdd'"):
    dry_run(config.get_config("smoke"), capsys, only="mopdd")
  with pytest.raises(UserError, match="--compiled=x: is read for --dry_run"):
    dry_run(config.get_config("smoke"), capsys, dry_run=False, compiled="x")


def test_a_bad_field_of_any_stage_is_refused(capsys):
  c = config.get_config("smoke")
  c.stages.swe_agentic_rl.rollout.total_tokens = 3
  with pytest.raises(UserError, match="stages.swe_agentic_rl"):
    dry_run(c, capsys)


def test_files_that_are_not_here_are_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  c = config.get_config("smoke")
  (tmp_path / "math.jsonl").write_text("{}\n")
  c.domains.math = dict(rows="math.jsonl")
  c.domains.stem = dict(rows="stem/*.jsonl", heldout="math.jsonl")
  c.stages.sft.init_from = "hf:Base"
  assert plan.not_here(c) == ["domains.stem.rows", "stages.sft.init_from"]
