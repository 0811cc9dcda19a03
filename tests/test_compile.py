"""Compiles the programs of a stage for absent TPU slices: one line each, and one line for each error."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs.nano_30b import cascade as nano
from configs.nano_30b import if_rl, meshes, mopd, rl, rlhf, sft
from configs.tiny import grpo_vs_mopd
from experiments import compile as compile_lib
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.runtime import course
from nemocascade.runtime.footprint import footprint
from nemocascade.runtime.programs import Programs

FIELDS = {
  "stage", "program", "topology", "chips", "tokens", "peak_gib", "argument_gib", "temp_gib", "resident_gib", "host_gib",
  "flops", "compile_s",
}  # fmt: skip
without_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@pytest.mark.parametrize(
  "topology, said",
  [
    ("v5q:4x4x4", "did you mean 'v5p'"),
    ("v5p", "give KIND:CHIPSxCHIPS"),
    ("v5p:4,4", "give KIND:CHIPSxCHIPS"),
  ],
)
def test_a_slice_that_cannot_be_is_refused_with_what_can(topology, said):
  with pytest.raises(UserError, match=said):
    compile_lib.run(sft.get_config(), topology)


def test_without_the_compiler_it_is_said_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="libtpu.*pip install"):
    compile_lib.run(sft.get_config(), "v5p:4x4x4")


@pytest.mark.parametrize(
  "config, flags, said",
  [
    (grpo_vs_mopd, {}, "unknown kind of config to compile 'ablation'"),
    (sft, {"stages": "sft"}, "--stages=sft: must be empty: this config is of one stage"),
    (nano, {"stages": "sft,mopt"}, "unknown stage in --stages 'mopt': did you mean 'mopd'"),
  ],
)
def test_what_there_is_not_to_compile_is_refused(config, flags, said):
  with pytest.raises(UserError, match=said):
    compile_lib.run(config.get_config("smoke"), "v5p:4x4x4", **flags)


@pytest.fixture(autouse=True)
def without_cache():
  """Compiles every program: one from the cache can report other memory. slice_of switches the cache off too."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def slice_of_cpus(monkeypatch):
  """Eight CPU devices stand for the devices of a TPU slice."""
  monkeypatch.setattr(compile_lib, "slice_of", lambda topology: ("v5e", jax.devices()))


@pytest.mark.parametrize(
  "field, value, said",
  [
    ("mesh.expert", 3, "mesh.expert=3 does not divide the 8 devices"),
    ("rows", 12, "12 rows over the 8 devices"),
    ("model.n_routed_experts", 9, "does not divide model.n_routed_experts=9"),
  ],
)
def test_what_does_not_divide_over_the_mesh_is_refused_with_the_numbers(slice_of_cpus, field, value, said):
  c = sft.get_config("smoke")
  c.mesh.expert, c.model.sequence_parallel = 8, False
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=said):
    compile_lib.run(c, "v5e:2x4")


def test_a_program_is_a_line_and_one_that_does_not_fit_is_said_with_what_to_change(slice_of_cpus, monkeypatch, capsys):
  monkeypatch.setitem(compile_lib.CHIPS, "v5e", (1e-9, 1))
  c = sft.get_config("smoke")
  c.model.hybrid_override_pattern = "*EM"  # The scan needs temporaries that a rounded number shows.
  with pytest.raises(UserError, match="sft_step needs .* more pieces than pieces=1, shorter rows than"):
    compile_lib.run(c, "v5e:2x4", programs="sft_step")
  line = json.loads(capsys.readouterr().out)
  assert line.keys() == FIELDS | {"work_ratio", "remat_ratio"}
  assert (line["program"], line["chips"], line["tokens"]) == ("sft_step", 8, 8 * 256)
  assert line["peak_gib"] >= line["temp_gib"] > 0


@pytest.fixture
def traced(slice_of_cpus, monkeypatch):
  """Programs are traced and not compiled. Returns the traced programs."""
  found = []

  def measure(trace):
    found.append(trace())
    assert found[-1].jaxpr.eqns
    return {"peak_gib": 1.0, "argument_gib": 1.0, "temp_gib": 0.0}

  monkeypatch.setattr(compile_lib, "measure", measure)
  return found


@pytest.mark.parametrize("top_p, correction", [(1.0, "none"), (0.95, "icepop")])
def test_a_step_behind_shared_prompts_takes_their_tokens_once(traced, top_p, correction):
  c = if_rl.get_config("smoke")
  c.mesh, c.updates, c.rollout.top_p, c.correction = dict(data=8, expert=1), 2, top_p, correction
  c.rollout.update(prompts=8, completions=4, prompt_tokens=32, total_tokens=80)
  c.packing.update(rows=32, row_tokens=48, pieces=2, shared_prompts=True)
  lines = {line["program"]: line for line in compile_lib.run(c, "v5e:2x4", programs="proximal_logprobs,rl_step")}
  assert lines["rl_step"]["tokens"] == lines["proximal_logprobs"]["tokens"] == 32 * 48 + 8 * 32


ROLLOUT = ["prefill", "decode_step"]
TOOLS = [*ROLLOUT, "tool_results"]
EVALUATION = [f"evaluation_{name}" for name in TOOLS] + [f"long_evaluation_{name}" for name in ROLLOUT]
PROGRAMS = {  # Stage of the cascade -> its programs, without those of the evaluation.
  "sft": ["sft_step"],
  "reward_model": ["reward_step", "judge"],
  **dict.fromkeys(("if_rl", "long_context_rl", "code_rl", "swe_agentless_rl"), [*ROLLOUT, "rl_step"]),
  **dict.fromkeys(("multi_domain_rl", "swe_agentic_rl"), [*TOOLS, "rl_step"]),
  **dict.fromkeys(("rlhf_teacher", "rlhf"), [*ROLLOUT, "score", "judge", "rl_step"]),
  "mopd": [*TOOLS, "score", "judge", "rl_step"],
}


def test_every_program_of_every_stage_is_listed_and_equal_ones_are_compiled_once(traced, capsys):
  c = nano.get_config("smoke")
  lines = compile_lib.run(c, "v5e:2x4")
  of = {name: [line["program"] for line in lines if line["stage"] == name] for name in c.order}
  assert of == {name: own + EVALUATION * (name != "reward_model") for name, own in PROGRAMS.items()}
  assert len(lines) == len(capsys.readouterr().out.splitlines())
  # The steps of SFT, of the judge, with an advantage of groups, of teachers, with a KL, with a nucleus; two judges;
  # two lengths of evaluation; three shapes of rollouts, of which one records the nucleus; one of scores.
  assert len(traced) < len(lines) / 2
  rlhf = {line["program"]: line for line in lines if line["stage"] == "rlhf"}
  assert rlhf["score"]["resident_gib"] >= rlhf["prefill"]["resident_gib"] >= rlhf["rl_step"]["resident_gib"]


@pytest.mark.parametrize(
  "loss, program, replay", [("reverse_kl", "teacher_states", False), ("reverse_kl_topk", "teacher_likeliest", True)]
)
def test_what_teachers_send_and_which_experts_are_replayed_is_in_the_programs(traced, loss, program, replay):
  c = mopd.get_config("smoke")
  c.distillation, c.distillation_weight = loss, 1.0
  c.rollout.replay = c.rollout.replay_teachers = replay
  lines = compile_lib.run(c, "v5e:2x4", programs=f"score,{program},rl_step")
  assert [line["program"] for line in lines] == ["score", program, "rl_step"]
  experts = 2 * c.model.num_experts_per_tok  # Of a token, in the two MoE blocks.
  recorded = [[a.shape[-1] for a in jax.tree.leaves(of.in_avals) if a.dtype == jnp.uint8] for of in traced]
  assert recorded == [[experts] * replay] * 3


def test_a_rollout_in_fewer_slots_has_places_for_states_that_wait_for_tools(traced):
  c = mopd.get_config("smoke")
  for slots, parked, records in ((0, 0, False), (16, 32, True)):
    c.rollout.update(slots=slots, parked=parked, record_experts=records)
    compile_lib.run(c, "v5e:2x4", programs="prefill,decode_step,tool_results")
  whole, cut = (start.out_info for start in traced[::3])
  assert whole.parked is None and whole.logits_SV.shape == (64, c.model.vocab_size) and whole.experts_BTY is None
  assert (len(cut.parked.logits_KV), len(cut.logits_SV)) == (32, 16)
  assert cut.experts_BTY.shape == (64, c.rollout.total_tokens, 2 * c.model.num_experts_per_tok)


def test_a_stage_holds_the_bytes_counted_by_hand():
  """30B-A3B on 8 devices of one host: parameters of 4 bytes and two moments, each device with an eighth."""
  c = nano.get_config()
  programs = Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(data=1, expert=8))
  of = {}
  for name in ("sft", "mopd", "rlhf"):
    stage = course.flat(c, name)
    state, _ = compile_lib.PROGRAMS[stage.kind](stage, programs)
    of[name] = footprint(stage, programs, state, devices=8)
  params = 4 * 31_577_940_288
  for held in of.values():
    assert held.chip["params"] == pytest.approx(params / 8, rel=0.002)  # Small vectors are on every device.
    assert held.host["saving"] == pytest.approx(3 * params, rel=0.002)
  assert of["sft"].resident(("params", "moments")) == 0 and "teachers" not in of["sft"].host
  assert of["mopd"].host["teachers"] == pytest.approx(3 * params, rel=0.002)  # SFT, RLHF's teacher, multi-domain RL.
  assert of["mopd"].host["samples"] == 512 * 98_304 * 4
  assert of["rlhf"].host["reference"] == pytest.approx(params, rel=0.002) and of["rlhf"].host["teachers"] == 0
  assert of["rlhf"].host["judge"] == pytest.approx(params, rel=0.002)


def test_a_batch_that_is_sampled_beside_an_update_is_held_beside_it():
  held, programs = {}, None
  for lag in (1, 0):
    c = if_rl.get_config("smoke")
    c.mesh, c.rollout.lag, c.model.dtype = dict(data=1, expert=1), lag, "float32"
    programs = Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(**c.mesh))
    state, found = compile_lib.PROGRAMS["rl"](c, programs)
    of = footprint(c, programs, state, devices=1)
    held[lag] = of.chip | {program.name: of.resident(program.arguments) for program in found}
  params = 4 * sum(math.prod(a.shape) for a in jax.tree.leaves(programs.template))
  tokens = 9 * c.rollout.prompts * c.rollout.completions * c.rollout.total_tokens  # Id, mask and log-probability.
  more = held[1]["sampler"] + held[1]["decoding"]
  assert held[1]["sampler"] == params and held[1]["decoding"] > tokens
  assert held[1]["rl_step"] == more and held[0]["rl_step"] == 0
  assert held[1]["moments"] == held[0]["moments"] + params  # The parameters that sample.
  assert held[1]["decode_step"] == params + held[1]["moments"] and held[0]["decode_step"] == held[0]["moments"]
  assert held[1]["evaluation_decode_step"] == held[1]["moments"] + more


@without_libtpu
def test_every_program_of_a_small_stage_compiles_for_a_real_slice(capsys):
  for config in (sft, rlhf):
    c = config.get_config("smoke")
    c.mesh.expert = 2
    lines = compile_lib.run(c, "v5e:2x2", programs=",".join(set(PROGRAMS[config.__name__.split(".")[-1]])))
    assert all(0 < line["peak_gib"] < 16 and line["chips"] == 4 for line in lines)
  assert [line["program"] for line in lines] == PROGRAMS["rlhf"]
  assert len(capsys.readouterr().out.splitlines()) == 1 + len(PROGRAMS["rlhf"])


@without_libtpu
def test_a_slice_that_the_compiler_does_not_know_is_refused():
  with pytest.raises(UserError, match="not a slice that the TPU compiler knows"):
    compile_lib.run(sft.get_config(), "v5p:3x5x7")


@pytest.mark.parametrize("name", meshes.SLICES)
def test_every_slice_of_the_published_scale_is_filled(name):
  devices = meshes.DEVICES[name]
  c = nano.get_config(name)
  s = c.stages.sft
  at_once = s.rows // s.get("pieces", 1)
  # Each device has a row, or each group of mesh.expert devices shares one.
  assert at_once in (devices, devices // c.mesh.expert) and s.rows * s.row_tokens in (1 << 21, 1 << 24)
  assert devices % c.mesh.expert == 0 and c.model.n_routed_experts % c.mesh.expert == 0
  for stage in (c.stages[name] for name in c.order if c.stages[name].kind == "rl"):
    share = c.mesh.expert if stage.packing.row_tokens > rl.LONGEST else 1
    assert stage.packing.rows // stage.packing.pieces == devices // share
