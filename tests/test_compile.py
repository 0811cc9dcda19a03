"""Compiles the programs of a stage for absent TPU slices: one line each, and one line for each error."""

import importlib.util
import json

import jax
import pytest

from configs.nano_30b import cascade as nano
from configs.nano_30b import if_rl, meshes, sft
from configs.tiny import cascade
from experiments import compile as compile_lib
from nemocascade.errors import UserError

FIELDS = {"program", "topology", "chips", "tokens", "peak_gib", "argument_gib", "temp_gib", "flops", "compile_s"}
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


def test_a_config_without_a_stage_is_refused():
  with pytest.raises(UserError, match="unknown kind of stage to compile 'cascade'"):
    compile_lib.run(cascade.get_config(), "v5p:4x4x4")


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
  c.mesh.expert = 8
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=said):
    compile_lib.run(c, "v5e:2x4")


def test_a_program_is_a_line_and_one_that_does_not_fit_is_said_with_what_to_change(slice_of_cpus, monkeypatch, capsys):
  monkeypatch.setitem(compile_lib.CHIPS, "v5e", (1e-9, 1))
  c = sft.get_config("smoke")
  c.model.hybrid_override_pattern = "*EM"  # The scan needs temporaries that a rounded number shows.
  with pytest.raises(UserError, match="sft_step needs .* fewer rows or shorter ones than rows=8"):
    compile_lib.run(c, "v5e:2x4")
  line = json.loads(capsys.readouterr().out)
  assert line.keys() == FIELDS
  assert (line["program"], line["chips"], line["tokens"]) == ("sft_step", 8, 8 * 256)
  assert line["peak_gib"] >= line["temp_gib"] > 0


@pytest.mark.parametrize("top_p, correction", [(1.0, "none"), (0.95, "icepop")])
def test_a_step_behind_shared_prompts_takes_their_tokens_once(slice_of_cpus, monkeypatch, top_p, correction):
  def traced(trace):
    assert trace().jaxpr.eqns
    return {"peak_gib": 1.0, "argument_gib": 1.0, "temp_gib": 0.0}

  monkeypatch.setattr(compile_lib, "measure", traced)
  c = if_rl.get_config("smoke")
  c.mesh, c.updates, c.rollout.top_p, c.correction = dict(data=8, expert=1), 2, top_p, correction
  c.rollout.update(prompts=8, completions=4, prompt_tokens=32, total_tokens=80)
  c.packing.update(rows=32, row_tokens=48, pieces=2, shared_prompts=True)
  lines = {line["program"]: line for line in compile_lib.run(c, "v5e:2x4")}
  assert lines["rl_step"]["tokens"] == lines["proximal_logprobs"]["tokens"] == 32 * 48 + 8 * 32


@without_libtpu
def test_every_program_of_a_small_stage_compiles_for_a_real_slice(capsys):
  for c in (sft.get_config("smoke"), if_rl.get_config("smoke")):
    c.mesh.expert = 2
    lines = compile_lib.run(c, "v5e:2x2")
    assert all(0 < line["peak_gib"] < 16 and line["chips"] == 4 for line in lines)
  assert [line["program"] for line in lines] == ["prefill", "decode_step", "rl_step"]
  assert len(capsys.readouterr().out.splitlines()) == 4


@without_libtpu
def test_a_slice_that_the_compiler_does_not_know_is_refused():
  with pytest.raises(UserError, match="not a slice that the TPU compiler knows"):
    compile_lib.run(sft.get_config(), "v5p:3x5x7")


@pytest.mark.parametrize("name", meshes.SLICES)
def test_every_slice_of_the_published_scale_is_filled(name):
  devices = meshes.DEVICES[name]
  c = nano.get_config(name)
  assert c.stages.sft.rows == devices
  assert devices % c.mesh.expert == 0 and c.model.n_routed_experts % c.mesh.expert == 0
  for stage in (c.stages[name] for name in c.order if c.stages[name].kind == "rl"):
    assert stage.packing.rows // stage.packing.pieces == devices
