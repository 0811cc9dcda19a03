"""RL and SFT start from a folder by save_pretrained with its model and tokenizer, and no field is copied."""

import json
import re
from pathlib import Path

import pytest
import tiny_checkpoint
import tokenizer_json
from in_process import run_command
from refusals import assert_refused

from configs.nano_30b import sft as nano_sft
from configs.tiny import cascade, if_rl, sft
from nemocascade.runtime import loading
from nemocascade.runtime.start_model import take_model

pytestmark = pytest.mark.usefixtures("compiled_fast")

transformers_folders = pytest.importorskip("transformers_folders")
V = 448


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("hf")
  transformers_folders.save(transformers_folders.random_model("M*E", vocab_size=V), path)
  (path / "tokenizer.json").write_bytes(tokenizer_json.make())
  return path


def command(kind: str, config: str, *words: str):
  return run_command(kind, f"--config=configs/tiny/{config}.py:smoke", *words)


def test_a_config_gets_the_folders_model_and_keeps_how_it_computes(folder):
  c = if_rl.get_config("smoke")
  c.init_from, c.model.remat = f"hf:{folder}", "block"
  take_model(c)
  there = loading.find(f"hf:{folder}").config
  assert (c.model.vocab_size, c.model.hidden_size, c.model.head_dim) == (V, there.hidden_size, there.head_dim)
  assert c.model.hybrid_override_pattern == "M*E" and c.model.moe_shared_expert_intermediate_size == 24
  assert c.model.time_step_limit == (0.001, float("inf"))  # transformers clamps dt so.
  assert c.model.remat == "block" and c.model.chunk_size == 16 and "dtype" not in c.model
  assert c.tokenizer.path == ""  # A single stage takes that of its start.


def test_a_cascade_gets_the_model_and_tokenizer_of_its_first_start(folder):
  c = cascade.get_config("smoke")
  c.stages.sft.init_from = f"hf:{folder}"
  take_model(c)
  assert c.model.vocab_size == V and c.tokenizer.path == str(folder)


def test_a_checkpoint_of_ours_gives_its_model_too(tmp_path):
  c = sft.get_config("smoke")
  c.init_from = tiny_checkpoint.make(tmp_path / "stage")
  take_model(c)
  assert {name: c.model[name] for name in tiny_checkpoint.MODEL} == tiny_checkpoint.MODEL


@pytest.mark.parametrize("config", [if_rl.get_config("smoke"), cascade.get_config("smoke"), nano_sft.get_config()])
def test_without_a_checkpoint_nothing_changes(config):
  before = config.to_json_best_effort()
  take_model(config)
  assert config.to_json_best_effort() == before


def test_rl_runs_from_a_folder_with_the_one_field_that_the_refusal_names_and_resumes(folder, tmp_path):
  words = (f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{folder}", "--config.steps=1")
  done = command("rl", "if_rl", *words)
  assert_refused(done, "the prompts of domain 'instruction' have")  # The folder's tokenizer makes longer prompts.
  (field,) = re.findall(r"--config\.rollout\.prompt_tokens=\d+", done.stderr)
  for _ in range(2):
    done = command("rl", "if_rl", *words, field)
    assert done.returncode == 0, done.stderr[-3000:]
  config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
  assert config["model"]["vocab_size"] == V
  found = loading.find(str(tmp_path / "run" / "rl" / "checkpoints" / "1"))
  assert found.config.hidden_size == 32
  assert found.tokenizer.fingerprint == loading.find(f"hf:{folder}").tokenizer.fingerprint


def test_sft_runs_from_a_folder(folder, tmp_path):
  words = (f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{folder}", "--config.row_tokens=4096")
  done = command("sft", "sft", *words, "--config.steps=1", "--config.save_every=1")
  assert done.returncode == 0, done.stderr[-3000:]
  assert loading.find(str(tmp_path / "run" / "sft" / "checkpoints" / "1")).config.vocab_size == V


def test_a_field_of_the_command_line_that_is_not_the_folders_is_one_line(folder, tmp_path):
  words = (f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{folder}", "--config.model.hidden_size=48")
  assert_refused(command("rl", "if_rl", *words), "is of another model: ")
  assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer_asks_for_one(folder, tmp_path):
  bare = tmp_path / "bare"
  bare.mkdir()
  for name in ("config.json", "model.safetensors"):
    (bare / name).symlink_to(folder / name)
  done = command("rl", "if_rl", f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{bare}")
  assert_refused(done, "has no tokenizer; give --config.tokenizer.path")
