"""An incomplete folder is refused with one line that names everything wrong, and nothing is left behind."""

import json

import pytest
import torch
from in_process import run_command
from test_hf import rewrite, tensors
from transformers_folders import random_model, save, template

from experiments import convert
from nemocascade.data.tokenizer import train_sentencepiece
from nemocascade.errors import UserError
from nemocascade.runtime import loading
from nemocascade.store import checksums
from nemocascade.store.hf import load_params, open_source

NORM, GATE = "backbone.layers.0.norm.weight", "backbone.layers.1.mixer.gate.weight"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"


@pytest.fixture
def path(tmp_path):
  return save(random_model("MEM*"), tmp_path / "A", max_shard_size="20KB")


def refused(path, *parts):
  """Asserts that the error is one line with all parts, and that nothing was written at the target or beside it."""
  target = path.parent / "B"
  with pytest.raises(UserError) as raised:
    convert.run(f"hf:{path}", str(target))
  message = str(raised.value)
  for part in (*parts, str(path)):
    assert part in message, f"{part!r} is not in {message!r}"
  assert "\n" not in message
  assert sorted(p.name for p in path.parent.iterdir()) == ["A"]
  return message


def change_index(path, change):
  index = json.loads((path / "model.safetensors.index.json").read_text())
  change(index["weight_map"])
  (path / "model.safetensors.index.json").write_text(json.dumps(index))


def first_tensor(path, file):
  index = json.loads((path / "model.safetensors.index.json").read_text())
  return next(name for name, where in index["weight_map"].items() if where == file)


def test_missing_shards_are_all_named_with_their_tensors(path):
  files = sorted(file.name for file in path.glob("*.safetensors"))
  assert len(files) > 2
  for file in files[:2]:
    (path / file).unlink()
  refused(path, *(f"{file} is missing" for file in files[:2]), *(first_tensor(path, f) for f in files[:2]))


def test_an_index_naming_absent_files_is_named(path):
  change_index(path, lambda names: names.update({NORM: "model-9.safetensors", GATE: "elsewhere.safetensors"}))
  refused(path, "model-9.safetensors is missing", NORM, "elsewhere.safetensors is missing", GATE)


def test_an_index_at_odds_with_its_files_is_named(path):
  files = sorted(file.name for file in path.glob("*.safetensors"))
  change_index(path, lambda names: names.update({"backbone.made_up": files[0], "other": files[1]}))
  refused(path, f"{files[0]}: backbone.made_up is not in it", f"{files[1]}: other is not in it")


@pytest.mark.parametrize("harm, said", [
  (lambda file: file.write_bytes(file.read_bytes()[:-5]), "is cut short"),
  (lambda file: file.write_bytes(b"\x01"), "is cut short"),
  (lambda file: file.write_bytes(b"\x09" + b"\0" * 7 + b"not JSON!"), "is not a safetensors file"),
  (lambda file: file.write_bytes(b""), "is cut short"),
])  # fmt: skip
def test_damaged_files_are_all_named(path, harm, said):
  files = sorted(path.glob("*.safetensors"))[:2]
  for file in files:
    harm(file)
  refused(path, *(f"{file.name} {said}" for file in files))


def test_wrong_shapes_are_all_named_with_what_they_must_be(path):
  rewrite(path, lambda t: t | {NORM: torch.ones(31), EXPERT: torch.ones(16, 33)})
  refused(
    path, f"model.safetensors: {NORM} has shape (31,), must have (32,)",
    f"model.safetensors: {EXPERT} has shape (16, 33), must have (16, 32)",
  )  # fmt: skip


def test_a_vocabulary_that_the_config_does_not_have_is_named(path):
  rewrite(path, dict, {"vocab_size": 97})
  refused(path, "backbone.embeddings.weight has shape (96, 32), must have (97, 32)", "lm_head.weight")


def test_missing_and_unexpected_tensors_are_all_named(path):
  rewrite(path, lambda t: {n: v for n, v in t.items() if n not in (NORM, GATE)} | {"extra": torch.ones(2)})
  refused(path, f"{NORM} is missing", f"{GATE} is missing", "model.safetensors: extra is not a tensor of this model")


def test_numbers_of_other_types_are_all_named(path):
  rewrite(path, lambda t: t | {NORM: t[NORM].half(), GATE: t[GATE].double()})
  refused(path, f"{NORM} is F16", f"{GATE} is F64", "BF16")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_named_by_tensor(path, value, dtype):
  names = (EXPERT, NORM, "backbone.layers.3.mixer.o_proj.weight")

  def harm(found):
    for name in names:
      found[name] = found[name].to(dtype)
      found[name].view(-1)[-1] = value
    return found

  rewrite(path, harm)
  message = refused(path, "NaN or infinity in", *(f"model.safetensors: {name}" for name in names))
  assert message.count(".weight") == len(names)
  source = open_source(path)
  with pytest.raises(UserError, match="NaN or infinity") as raised:
    load_params(source, template(source))
  assert all(name in str(raised.value) for name in names)


def test_negative_zero_and_the_largest_numbers_are_numbers(path):
  extremes = torch.tensor([-0.0, 3.38e38, -3.38e38, 1e-45])
  rewrite(path, lambda t: t | {NORM: torch.cat([extremes, t[NORM][4:]])})
  convert.run(f"hf:{path}", str(path.parent / "B"))


@pytest.mark.parametrize("fields, said", [
  ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "unknown architecture LlamaForCausalLM"),
  ({"architectures": ["NemotronForCausalLM"]}, "unknown architecture NemotronForCausalLM"),
  ({"mlp_bias": True, "mlp_hidden_act": "gelu"}, "mlp_bias=True is not supported, only False; mlp_hidden_act='gelu'"),
  ({"layers_block_type": ["mamba", "attn"]}, "did you mean 'attention'?"),
  ({"layers_block_type": "absent"}, "names no blocks"),
  ({"dtype": "float16"}, "dtype='float16'"),
  ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
])  # fmt: skip
def test_a_config_of_another_function_is_refused(path, fields, said):
  rewrite(path, dict, fields)
  with pytest.raises(UserError, match=".*") as raised:
    convert.run(f"hf:{path}", str(path.parent / "B"))
  assert said in str(raised.value)
  assert not (path.parent / "B").exists()


def test_a_tokenizer_of_more_tokens_than_the_embedding_is_refused(path):
  words = train_sentencepiece(["some words to learn from"] * 9, vocab_size=300)
  words.save(path)
  refused(path, f"the tokenizer has {words.vocab_size} tokens", "the 96 rows of the embedding")
  with pytest.raises(UserError, match="rows of the embedding"):
    loading.find(f"hf:{path}")


def test_a_folder_without_weights_or_config_says_so(path, tmp_path):
  for file in path.glob("*.safetensors"):
    file.unlink()
  (path / "model.safetensors.index.json").unlink()
  refused(path, "neither model.safetensors nor model.safetensors.index.json")
  (path / "config.json").unlink()
  refused(path, "config.json: No such file")


def test_a_checkpoint_of_ours_with_nans_does_not_go_out(path, tmp_path):
  convert.run(f"hf:{path}", str(tmp_path / "B"))
  (file,) = (tmp_path / "B" / "params" / "norm_f.weight").glob("0")
  file.write_bytes(b"\xff" * file.stat().st_size)
  checksums.write(tmp_path / "B")  # As if it had been written so.
  with pytest.raises(UserError, match="NaN or infinity in backbone.norm_f.weight"):
    convert.run(str(tmp_path / "B"), f"hf:{tmp_path / 'C'}")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B"]


def test_a_target_that_is_there_is_left_alone(path, tmp_path):
  (tmp_path / "B").mkdir()
  (tmp_path / "B" / "mine").write_text("x")
  with pytest.raises(UserError, match="is there already"):
    convert.run(f"hf:{path}", str(tmp_path / "B"))
  assert [p.name for p in (tmp_path / "B").iterdir()] == ["mine"]


def test_a_folder_of_another_model_is_refused_by_its_first_array(path, tmp_path):
  other = open_source(save(random_model("MEM*", hidden_size=16), tmp_path / "other"))
  with pytest.raises(UserError, match=r"another model: embedding is \(96, 32\) there and \(96, 16\) here, and 19 more"):
    loading.load(f"hf:{path}", template(other))


@pytest.mark.parametrize("source, target", [("hf:a", "hf:b"), ("a", "b"), ("", "hf:b")])
def test_one_side_must_be_a_hugging_face_folder(source, target):
  with pytest.raises(UserError, match="one of them must be hf:DIR"):
    convert.run(source, target)


def test_the_command_prints_one_line_and_exits_with_2(path):
  rewrite(path, lambda t: t | {NORM: torch.full((32,), float("nan"))})
  done = run_command("convert", f"--source=hf:{path}", f"--target={path.parent / 'B'}")
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == f"error: hf:{path}: NaN or infinity in model.safetensors: {NORM}\n"
  assert NORM in tensors(path)
