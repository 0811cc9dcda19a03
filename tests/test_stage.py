"""Failures within SFT and reward-model stages: non-finite updates, full disks, bad checkpoints, long prompts."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from in_process import run_command

from configs import recipe
from configs.recipe import generated
from configs.tiny import reward_model as judge_config
from configs.tiny import sft as sft_config
from experiments import reward_model, sft
from nemocascade.config import ModelConfig
from nemocascade.data.documents import to_documents
from nemocascade.errors import StageStopped, UserError
from nemocascade.generated import registry
from nemocascade.generated.generator import demonstrations
from nemocascade.mesh import make_mesh
from nemocascade.rollout import episode
from nemocascade.runtime import loading, parts, supervision
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.programs import Programs
from nemocascade.store.checkpoint import Store, load_params
from nemocascade.types import TrainState

pytestmark = pytest.mark.usefixtures("compiled_fast")


def lines(stage_dir):
  """The lines of metrics.jsonl without times."""
  found = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
  return [{name: x for name, x in line.items() if not name.startswith(("time/", "speed/"))} for line in found]


def test_a_rate_that_ruins_the_parameters_ends_the_command_with_one_line_and_good_checkpoints(tmp_path):
  flags = f"--workdir={tmp_path}", "--config.optimizer.peak_lr=1e30", "--config.save_every=1"
  done = run_command("sft", "--config=configs/tiny/sft.py:smoke", *flags)
  assert done.returncode == 1, done.stderr
  said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert said == [done.stderr.splitlines()[-1]] and len(said[0]) < 200 and "Traceback" not in done.stderr
  for word in ("sft, step 2", "3 updates in a row", "max_nonfinite=3", "optimizer.peak_lr"):
    assert word in said[0]
  assert [line["step/skipped_nonfinite"] for line in lines(tmp_path / "sft")] == [1, 1, 1]
  store = Store(tmp_path / "sft" / "checkpoints")
  programs = Programs(ModelConfig.from_fields(sft_config.get_config("smoke").model.to_dict()), make_mesh(1, 1))
  assert store.latest() == 2
  saved = load_params(store.path_of(2), programs.template)
  jax.tree.map(np.testing.assert_array_equal, saved, programs.fresh_params(jax.random.key(0)))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
  root = tmp_path_factory.mktemp("stages")
  c = sft_config.get_config("smoke")
  with c.unlocked():
    c.steps, c.save_every, c.rows, c.row_tokens = 4, 2, 2, 256
    c.domains, c.sources = recipe.generated("instruction", "preference"), recipe.conversations(instruction=40)
    c.tokenizer.conversations = 60
    c.sources.instruction.heldout = str(root / "heldout.jsonl")
  rows = demonstrations(registry.make("instruction", c.tasks), 1, 0, 5, non_thinking_share=0.1)
  (root / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return c, parts.build(c, root), root


@pytest.fixture(scope="module")
def fine(assembled):
  c, p, root = assembled
  sft.run(c, root / "fine" / "sft", p)
  return lines(root / "fine" / "sft")


def test_the_loss_of_held_out_conversations_is_written_at_every_checkpoint(assembled, fine):
  """That of the last checkpoint, against each document alone in a row."""
  c, p, root = assembled
  assert ["heldout_loss/instruction" in line for line in fine] == [False, True, False, True]
  store = Store(root / "fine" / "sft" / "checkpoints")
  params, total, count = load_params(store.path_of(4), p.programs.template), 0.0, 0
  for line in (root / "heldout.jsonl").read_text().splitlines():
    for document in to_documents(json.loads(line), p.text.tokenizer):
      rows_BT, n = np.zeros((2, c.rows, c.row_tokens), np.int32), len(document.tokens_T)
      rows_BT[0, 0, :n], rows_BT[1, 0, :n] = document.tokens_T, 1
      learned = np.asarray(p.programs.score(params, *rows_BT).logprobs_BT)[0, :n][document.loss_mask_T]
      total, count = total - float(learned.sum()), count + learned.size
  assert fine[-1]["heldout_loss/instruction"] == pytest.approx(total / count, rel=1e-4)


def poisoned_at(module, monkeypatch, bad):
  """Replaces the stage's step by one whose loss and gradient are NaN in the given steps."""
  jit_step, seen = module.jit_step, []

  def make(step, state, mesh):
    compiled = jit_step(step, state, mesh)

    def run(state, *batch):
      seen.append(len(seen))
      if seen[-1] in bad:
        state = state.replace(params=jax.tree.map(lambda p: p + jnp.nan, params := state.params))
        after, metrics = compiled(state, *batch)
        return after.replace(params=params), metrics
      return compiled(state, *batch)

    return run

  monkeypatch.setattr(module, "jit_step", make)
  return seen


def test_sft_passes_over_a_bad_step_and_ends_after_so_many_in_a_row(assembled, fine, monkeypatch):
  c, p, root = assembled
  bad = {1}
  seen = poisoned_at(sft, monkeypatch, bad)
  sft.run(c, root / "one" / "sft", p)
  found = lines(root / "one" / "sft")
  assert [line["step/skipped_nonfinite"] for line in found] == [0, 1, 0, 0]
  assert found[0]["loss/sft"] == fine[0]["loss/sft"] and found[1]["loss/sft"] is None
  assert np.isfinite([line["loss/sft"] for line in found[2:]]).all()
  bad.update(range(9))
  for _ in range(2):  # The second run starts from step 2, whose record already counts two bad updates of three.
    seen.clear()
    with pytest.raises(StageStopped, match=r"^sft, step 2: 3 updates in a row"):
      sft.run(c, root / "all" / "sft", p)
  assert Store(root / "all" / "sft" / "checkpoints").latest() == 2


def test_sft_asks_its_watcher_before_each_checkpoint_and_ends_where_it_says(assembled, fine):
  c, p, root = assembled
  asked = []

  def watch(steps, params, spent):
    assert not (root / "watched" / "sft" / "checkpoints" / str(steps)).exists() or len(asked) == 1
    assert spent.trained > 0
    asked.append(steps)
    return True

  for _ in range(2):  # The second run resumes after the last step of the first, and asks at once.
    outcome = sft.run(c, root / "watched" / "sft", p, watch=watch)
    assert (outcome.steps, Path(outcome.checkpoint).name) == (2, "2")
  assert asked == [2, 2]
  assert lines(root / "watched" / "sft") == fine[:2]


def test_more_steps_go_on_from_the_last_checkpoint_whose_record_says_what_made_it(assembled, fine):
  c, p, root = assembled
  shutil.copytree(root / "fine", root / "more")
  more = c.copy_and_resolve_references()
  more.steps = 6
  assert sft.run(more, root / "more" / "sft", p).steps == 6
  assert lines(root / "more" / "sft")[:4] == fine and len(lines(root / "more" / "sft")) == 6
  records = [Store(root / "more" / "sft" / "checkpoints").path_of(step) / "record" / "metadata" for step in (4, 6)]
  before, after = (json.loads(record.read_text())["lineage"] for record in records)
  assert before["stage"] == "sft" and before["start"] == "" and before["teachers"] == {}
  assert after == before | {"config": after["config"]} and after["config"] != before["config"]


def test_the_reward_model_does_too(assembled, monkeypatch):
  _, p, root = assembled
  c = judge_config.get_config("smoke")
  c.steps, c.save_every, c.pairs, c.heldout_pairs, c.max_nonfinite = 3, 1, 8, 8, 2
  bad = {0}
  seen = poisoned_at(reward_model, monkeypatch, bad)
  outcome = reward_model.run(c, root / "judge" / "one", p)
  assert [line["step/skipped_nonfinite"] for line in lines(root / "judge" / "one")] == [1, 0, 0]
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(outcome.params))
  bad.update(range(9))
  seen.clear()
  with pytest.raises(StageStopped, match=r"^all, step 1: 2 updates in a row"):
    reward_model.run(c, root / "judge" / "all", p)


def test_a_disk_with_no_room_for_the_next_checkpoints_ends_the_stage_after_saving(assembled, fine, monkeypatch):
  c, p, root = assembled
  usage = shutil.disk_usage(root)
  monkeypatch.setattr(supervision.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
  with pytest.raises(
    StageStopped, match=r"^sft, step 1: disk_full: .*guards.disk_full.*the same command goes on from .*/2$"
  ):
    sft.run(c, root / "full" / "sft", p)
  assert lines(root / "full" / "sft")[-1]["guard/disk_full"] == 1
  monkeypatch.setattr(supervision.shutil, "disk_usage", lambda _: usage)
  assert sft.run(c, root / "full" / "sft", p).steps == 4  # With room on the disk again, the stage goes on.
  varies = ("guard/", "time/", "speed/")
  drop = lambda found: [{k: v for k, v in line.items() if not k.startswith(varies)} for line in found]  # noqa: E731
  assert drop(lines(root / "full" / "sft")) == drop(fine)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_a_value_that_is_not_finite_is_refused_by_its_name(tmp_path, value):
  tiny_checkpoint.make(tmp_path)
  programs = tiny_checkpoint.programs()
  params = programs.fresh_params(jax.random.key(0))
  params["lm_head"] = params["lm_head"].at[3, 5].set(value)
  Store(tmp_path / "checkpoints").save(2, TrainState(jnp.int32(0), params, {}), {})
  with pytest.raises(UserError, match="checkpoints/2: lm_head holds values that are not finite"):
    loading.load(str(tmp_path / "checkpoints" / "2"), programs.template)
  with pytest.raises(UserError, match="lm_head"):
    loading.find(str(tmp_path / "checkpoints" / "2")).load(programs.template)
  loading.load(str(tmp_path / "checkpoints" / "1"), programs.template)


def test_heldout_prompts_without_room_are_left_out_and_said_or_named_where_too_few_remain(assembled, capsys):
  c, p, root = assembled
  domain, tokenizer = p.domains["instruction"], p.text.tokenizer
  lengths = lambda rows: sorted(len(episode.prompt_of(row, domain, tokenizer)) for row in rows)  # noqa: E731
  all_fit = lengths(draw_heldout(c, p.domains, tokenizer).rows["instruction"])
  assert len(all_fit) == c.evaluation.prompts and "left out" not in capsys.readouterr().err
  short = c.copy_and_resolve_references()
  short.domains = generated("instruction")
  short.evaluation.prompt_tokens, short.evaluation.prompts = all_fit[len(all_fit) // 2], 8
  assert all_fit[0] < short.evaluation.prompt_tokens < all_fit[-1]
  found = lengths(draw_heldout(short, {"instruction": domain}, tokenizer).rows["instruction"])
  assert len(found) == 8 and found[-1] <= short.evaluation.prompt_tokens
  said = capsys.readouterr().err
  assert "domain 'instruction': left out" in said
  assert f"evaluation.prompt_tokens={short.evaluation.prompt_tokens} tokens" in said
  short.evaluation.prompt_tokens = 3
  with pytest.raises(UserError, match=r"domain 'instruction' has only 0 .*evaluation.prompt_tokens=3"):
    draw_heldout(short, {"instruction": domain}, tokenizer)


def test_a_checkpoint_goes_with_its_model_and_tokenizer(tmp_path):
  """Copied alone to another place, a checkpoint is still one that every command takes."""
  made = Path(tiny_checkpoint.make(tmp_path / "stage"))
  there = loading.find(str(made))
  shutil.copytree(made, tmp_path / "elsewhere" / "mine")
  shutil.rmtree(tmp_path / "stage")
  alone = loading.find(str(tmp_path / "elsewhere" / "mine"))
  assert alone.config == there.config and alone.tokenizer.fingerprint == tiny_checkpoint.TOKENIZER.fingerprint
  params = alone.load(tiny_checkpoint.programs().template)
  assert params["embedding"].shape == (640, 32)
