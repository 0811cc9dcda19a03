"""Folders written by transformers convert to our format and back with every byte of every tensor unchanged."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM
from transformers_folders import random_model, save, template

from experiments import convert
from nemocascade.mesh import make_mesh, shardings
from nemocascade.model.hybrid import init_params, logical_axes
from nemocascade.runtime import loading
from nemocascade.store import checkpoint
from nemocascade.store.hf import load_params, open_source
from nemocascade.store.hf_config import config_fields, model_config
from nemocascade.store.hf_layout import Tree, layout
from nemocascade.store.tensor_files import Folder
from nemocascade.types import TrainState

PATTERN = "MEMEMEM*-"  # A repeated unit, and three blocks that do not repeat.
TOKENIZER = {"tokenizer_config.json": '{"added": 1}\n', "chat_template.jinja": "{{ x }}", "notes.txt": "kept"}


def tensors(path) -> dict[str, torch.Tensor]:
  """All tensors of a folder, read by safetensors itself."""
  return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(path, change, config=None):
  """Rewrites the folder's tensors as one file after `change`, and updates the fields of its config."""
  found = {name: tensor.contiguous() for name, tensor in change(tensors(path)).items()}
  for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
    file.unlink()
  save_file(found, path / "model.safetensors", metadata={"format": "pt"})
  fields = json.loads((path / "config.json").read_text()) | (config or {})
  (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "absent"}))
  return path


def stacked(found):
  """The tensor names of transformers in memory: prefix `model.`, the experts of a layer stacked in one tensor."""
  out = {}
  for name, tensor in found.items():
    name = name.replace("backbone.", "model.")
    if ".experts." not in name:
      out[name] = tensor
      continue
    head, tail = name.split(".experts.")
    number, matrix, _ = tail.split(".")
    out.setdefault(f"{head}.experts.{matrix}", {})[int(number)] = tensor
  stack = lambda t: torch.stack([t[i] for i in range(len(t))]) if isinstance(t, dict) else t
  return {name: stack(tensor) for name, tensor in out.items()}


def mixed(found):
  """The published dtypes: bf16, with fp32 for the parameters that need it and for the first norm."""
  wide = ("A_log", "mixer.D", "e_score_correction_bias", "layers.0.norm.weight")
  return {name: t if name.endswith(wide) else t.to(torch.bfloat16) for name, t in found.items()}


FOLDERS = {
  "as_saved": lambda path: path,
  "stacked": lambda path: rewrite(path, stacked),
  "bf16": lambda path: rewrite(path, mixed, {"dtype": "bfloat16"}),
  "stacked_bf16": lambda path: rewrite(path, lambda t: stacked(mixed(t)), {"dtype": "bfloat16"}),
  "published_spelling": lambda path: rewrite(
    path, dict, {"layers_block_type": "absent", "hybrid_override_pattern": PATTERN, "unheard_of": {"a": 1}}
  ),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
  path = save(random_model(PATTERN, moe_latent_size=12), tmp_path / "A", max_shard_size="20KB")
  for name, text in TOKENIZER.items():
    (path / name).write_text(text)
  return FOLDERS[request.param](path)


def round_trip(path, tmp_path):
  convert.run(f"hf:{path}", str(tmp_path / "B"))
  convert.run(str(tmp_path / "B"), f"hf:{tmp_path / 'C'}")
  return tmp_path / "B", tmp_path / "C"


def assert_same_tensors(one, other):
  assert one.keys() == other.keys()
  for name, tensor in one.items():
    assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
    assert torch.equal(tensor.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


def test_there_and_back_every_byte_is_the_same_and_transformers_loads_it(folder, tmp_path):
  ours, back = round_trip(folder, tmp_path)
  assert_same_tensors(tensors(folder), tensors(back))
  for name in ("config.json", "generation_config.json", *TOKENIZER):
    assert (back / name).read_bytes() == (folder / name).read_bytes(), name
  _, info = NemotronHForCausalLM.from_pretrained(back, output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
  assert not list(tmp_path.glob(".*"))


def test_the_checkpoint_gives_what_the_folder_gives(folder, tmp_path):
  """Streaming through a checkpoint and reading the folder directly give the same parameters."""
  source = open_source(folder)
  convert.run(f"hf:{folder}", str(tmp_path / "B"))
  shapes = template(source)
  found = loading.find(str(tmp_path / "B"))
  assert found.config == source.config
  chex.assert_trees_all_equal(found.load(shapes), load_params(source, shapes))


def test_parameters_are_those_of_the_named_tensors(tmp_path):
  """Checked by hand for each kind of rearrangement."""
  path = save(random_model(PATTERN), tmp_path)
  source, t = open_source(path), {name: tensor.numpy() for name, tensor in tensors(path).items()}
  params = jax.device_get(load_params(source, template(source)))
  unit = params["units_0"]  # "ME" three times: blocks 0 to 5.
  layer = "backbone.layers.2.mixer."
  np.testing.assert_array_equal(unit["blocks_0"]["mixer"]["in_proj"][1], t[layer + "in_proj.weight"].T)
  np.testing.assert_array_equal(unit["blocks_0"]["mixer"]["conv1d"][1], t[layer + "conv1d.weight"][:, 0].T)
  expert = t["backbone.layers.3.mixer.experts.5.down_proj.weight"]
  np.testing.assert_array_equal(unit["blocks_1"]["mixer"]["down_proj"][1, 5], expert.T)
  q = params["units_1"]["blocks_1"]["mixer"]["q_proj"]  # Block 7; query head 3 is the second of group 1.
  np.testing.assert_array_equal(q[:, 1, 1], t["backbone.layers.7.mixer.q_proj.weight"][24:32].T)
  np.testing.assert_array_equal(params["lm_head"], t["lm_head.weight"].T)


def test_on_a_mesh_each_number_is_read_once_where_it_belongs(tmp_path, monkeypatch):
  path = save(random_model(PATTERN, moe_latent_size=16), tmp_path)
  source = open_source(path)
  shapes = template(source)
  mesh = make_mesh(data=4, expert=2)
  placed = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes, shardings(logical_axes(source.config), mesh, shapes),
  )  # fmt: skip
  read, original = {}, Folder.read

  def counting(self, name, index=()):
    part = original(self, name, index)
    read.setdefault(name, []).append(part.size)
    return part

  monkeypatch.setattr(Folder, "read", counting)
  params = load_params(source, placed)
  chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(load_params(source, shapes)))
  assert all(a.sharding == s.sharding for a, s in zip(jax.tree.leaves(params), jax.tree.leaves(placed)))
  whole = {name: math.prod(t.shape) for name, t in source.folder.tensors.items()}
  name = "backbone.layers.1.mixer.experts.0.up_proj.weight"  # [16, 16]; its second axis is sharded over "data".
  assert sorted(read[name])[:4] == [whole[name] // 4] * 4
  name = "backbone.layers.7.mixer.q_proj.weight"  # Its hidden axis is sharded over both mesh axes.
  assert sorted(read[name])[:8] == [whole[name] // 8] * 8


def test_the_tree_names_every_number_of_the_model_once():
  config = model_config({"model_type": "nemotron_h", "hybrid_override_pattern": "MEMEM*EMEM*-"}, "config.json")
  config = dataclasses.replace(config, hidden_size=64, moe_latent_size=32)
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  sizes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  for tree in (Tree(), Tree("model", stacked=True)):
    covered = {}
    for named in layout(config, tree).values():
      for place in named.parts:
        assert place.shape == sizes[place.leaf][len(place.index) :], named.name
        assert covered.setdefault(place.leaf, set()).isdisjoint({place.index})
        covered[place.leaf].add(place.index)
      assert math.prod(named.shape) == sum(math.prod(place.shape) for place in named.parts)
    assert covered.keys() == sizes.keys()
    for leaf, indices in covered.items():
      assert len(indices) == math.prod(sizes[leaf][: len(next(iter(indices)))])


@pytest.mark.parametrize("other", ["backbone.embedding.weight", "model.embed_tokens.weight"])
def test_other_names_of_the_embedding_are_read(other, tmp_path):
  path = save(random_model("M*"), tmp_path)
  expected = load_params(open_source(path), template(open_source(path)))
  prefix = other.split(".")[0]
  rename = lambda name: other if name.endswith("embeddings.weight") else name.replace("backbone", prefix)
  rewrite(path, lambda found: {rename(name): tensor for name, tensor in found.items()})
  chex.assert_trees_all_equal(load_params(open_source(path), template(open_source(path))), expected)


def test_a_tied_head_is_one_array_of_ours_and_two_tensors_of_theirs(tmp_path):
  path = save(random_model("M*", tie_word_embeddings=True), tmp_path / "A")
  source = open_source(path)
  assert source.config.tie_word_embeddings and "lm_head" not in template(source)
  _, back = round_trip(path, tmp_path)
  assert_same_tensors(tensors(path), tensors(back))


def test_a_tied_folder_without_a_head_gets_one_back(tmp_path):
  """transformers does not tie weights; without the tensor it would initialise a head at random."""
  path = save(random_model("M*", tie_word_embeddings=True), tmp_path / "A")
  head = tensors(path)["lm_head.weight"]
  rewrite(path, lambda found: {name: t for name, t in found.items() if name != "lm_head.weight"})
  _, back = round_trip(path, tmp_path)
  assert_same_tensors(tensors(back), tensors(path) | {"lm_head.weight": head})


def test_a_head_of_its_own_stays_though_the_config_says_tied(tmp_path, capsys):
  path = save(random_model("M*"), tmp_path / "A")
  rewrite(path, dict, {"tie_word_embeddings": True})
  _, back = round_trip(path, tmp_path)
  assert "kept apart" in capsys.readouterr().err
  assert_same_tensors(tensors(path), tensors(back))
  assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False


def test_heads_of_multi_token_prediction_are_left_out_and_said(tmp_path, capsys):
  path = save(random_model("M*"), tmp_path / "A")
  rewrite(path, lambda found: found | {"mtp.layers.0.norm.weight": torch.ones(4)})
  _, back = round_trip(path, tmp_path)
  assert "1 tensors of multi-token prediction are left out" in capsys.readouterr().err
  assert tensors(back).keys() == tensors(path).keys() - {"mtp.layers.0.norm.weight"}


def test_a_trained_checkpoint_goes_out_too(tmp_path):
  """Saved by the training store (compressed, one chunk per array), without an original folder to refer to."""
  source, rng = open_source(save(random_model(PATTERN), tmp_path / "A")), np.random.default_rng(0)
  config = dataclasses.replace(source.config, time_step_limit=(0.0, math.inf))
  params = jax.tree.map(lambda a: jnp.array(rng.standard_normal(a.shape), a.dtype), template(source))
  state = TrainState(step=jnp.int32(1), params=params, opt_state={})
  checkpoint.Store(tmp_path / "stage" / "checkpoints").save(1, state, {})
  (tmp_path / "stage" / "model").mkdir()
  (tmp_path / "stage" / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  convert.run(str(tmp_path / "stage" / "checkpoints" / "1"), f"hf:{tmp_path / 'C'}")
  source = open_source(tmp_path / "C")
  assert source.config == config
  chex.assert_trees_all_equal(load_params(source, template(source)), params)
  _, info = NemotronHForCausalLM.from_pretrained(tmp_path / "C", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_shards_stay_within_their_size_and_the_index_is_whole(tmp_path, monkeypatch):
  path = save(random_model(PATTERN), tmp_path / "A")
  monkeypatch.setattr("nemocascade.store.tensor_files.write_shards.__defaults__", (20_000,))
  _, back = round_trip(path, tmp_path)
  index = json.loads((back / "model.safetensors.index.json").read_text())
  files = sorted(file.name for file in back.glob("*.safetensors"))
  assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
  for file in files:
    with safe_open(back / file, "pt") as opened:
      size = sum(opened.get_tensor(name).nbytes for name in opened.keys())
      assert size <= 20_000 and all(index["weight_map"][name] == file for name in opened.keys())
  assert_same_tensors(tensors(path), tensors(back))
  NemotronHForCausalLM.from_pretrained(back)


@pytest.mark.parametrize("rows", [1, 7])
def test_matrices_of_many_chunks_are_whole(rows, tmp_path, monkeypatch):
  """Chunks of one row, and of 7 rows, which leaves the last chunk partly empty."""
  path = save(random_model(PATTERN), tmp_path / "A")
  monkeypatch.setattr("nemocascade.store.arrays.rows_within", lambda n, row_bytes: min(n, rows))
  ours, back = round_trip(path, tmp_path)
  assert_same_tensors(tensors(path), tensors(back))
  source = open_source(path)
  chex.assert_trees_all_equal(loading.find(str(ours)).load(template(source)), load_params(source, template(source)))


def test_a_changed_model_is_told_in_config_json():
  original = json.loads(json.dumps({"model_type": "nemotron_h", "layers_block_type": ["moe", "mlp"], "kept": 1}))
  config = model_config(original, "config.json")
  assert config_fields(config, original) == original
  free = dataclasses.replace(config, time_step_limit=(0.0, math.inf), n_group=4, topk_group=2)
  fields = config_fields(free, original)
  assert fields["kept"] == 1 and fields["n_group"] == 4 and fields["hybrid_override_pattern"] == "E-"
  assert model_config(fields, "config.json") == free


def test_sharded_reading_of_a_spec_without_an_axis_is_whole(tmp_path):
  path = save(random_model("*"), tmp_path)
  source = open_source(path)
  sharding = NamedSharding(make_mesh(), PartitionSpec())
  placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), template(source))
  chex.assert_trees_all_equal(
    jax.device_get(load_params(source, placed)), jax.device_get(load_params(source, template(source)))
  )
