"""The whole cascade at smoke size: it finishes, it resumes, it refuses invalid requests."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chaos
import pytest
from in_process import run_command
from refusals import assert_refused

from configs.tiny import cascade as config
from experiments import cascade
from nemocascade.errors import UserError
from nemocascade.report.tree import tree
from nemocascade.store.record import Record

ROOT = Path(__file__).parent.parent
DOMAINS = set(config.get_config("smoke").domains)


def words(workdir, *more):
  return "--config=configs/tiny/cascade.py:smoke", f"--workdir={workdir}", *more


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("cascade")
  command = [sys.executable, "-m", "experiments.cascade", *words(workdir)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


def test_every_stage_ends_with_a_score_for_every_domain(finished):
  stages = json.loads((finished / "cascade.json").read_text())["stages"]
  assert [s["name"] for s in stages] == list(config.get_config("smoke").order)
  for stage in stages:
    assert stage["status"] == "done"
    if stage["kind"] != "reward_model":
      assert set(stage["scores_after"]) == DOMAINS
      greedy = stage["name"] in config.get_config("smoke").evaluation.greedy
      assert set(stage.get("greedy_after", ())) == (DOMAINS if greedy else set())


def test_the_record_says_what_made_each_checkpoint(finished):
  record = Record.open(finished)
  mopd = record.stage("mopd")
  assert mopd["parent"] == "multi_domain_rl" and set(mopd["teachers"]) == set(mopd["domains"])
  saved = json.loads((Path(mopd["checkpoint"]) / "record" / "metadata").read_text())["lineage"]
  assert saved["stage"] == "mopd" and saved["config"] == mopd["config"] and saved["commit"] == mopd["commit"]
  assert saved["start"] == "multi_domain_rl/checkpoints/2"
  assert saved["teachers"] == {d: t["checkpoint"].removeprefix(f"{finished}/") for d, t in mopd["teachers"].items()}
  assert record.stage("rlhf")["judge_stage"] == "reward_model"
  drawn = tree(record)
  assert all(f"─ {name}: " in drawn for name in config.get_config("smoke").order)


def test_report_is_complete(finished):
  page = (finished / "report" / "index.html").read_text()
  assert "What started from what" in page and "<mark>" in page  # What SFT learns.
  assert "python -m experiments.cascade" in (finished / "config.json").read_text() and "A test of plumbing" in page
  assert "before, sft" in page and "before, multi domain rl" in page  # The same prompt before and after a stage.
  assert 10_000 < len(page) < 5_000_000 and "http-equiv=refresh" not in page


def test_a_workdir_of_another_config_is_refused(finished):
  assert_refused(run_command("cascade", *words(finished, "--config.seed=5")), "seed")


@pytest.mark.parametrize(
  "flag, word",
  [
    ("--config.sed=1", "sed"),
    ("--config.stages.if_rl.advantage=grop", "grpo"),
    ("--config.stages.if_rl.rollout.completions=1", "completions"),
    ("--config.model.hybrid_override_pattern=MEX", "X"),
    ("--config.stages.mopd.teachers.math=sfft", "sft"),
    ("--config.evaluation.greedy=('stf',)", "sft"),
    ("--config.evaluation.completions=0", "completions"),
  ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(tmp_path, flag, word):
  done = run_command("cascade", *words(tmp_path / "run", flag))
  assert_refused(done, word)
  assert not (tmp_path / "run").exists()


def test_a_mixture_of_an_unknown_domain_is_named():
  c = config.get_config("smoke")
  c.stages.if_rl.mixture = {"instructions": 1.0}
  with pytest.raises(UserError, match="instruction"):
    cascade.check(c)


def test_the_quickstart_notebook_runs_a_finished_cascade_which_does_nothing_again(finished, monkeypatch):
  """Runs the notebook on the finished smoke cascade, which it loads, draws and samples."""
  import nbformat
  from nbclient import NotebookClient

  before = (finished / "cascade.json").read_text()
  monkeypatch.setenv("NEMOCASCADE_CONFIG", "configs/tiny/cascade.py:smoke")
  monkeypatch.setenv("NEMOCASCADE_WORKDIR", str(finished))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
  printed = "".join(
    output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
  )
  assert "all stages were done before" in printed and "swe_agentic_rl" in printed
  assert (finished / "cascade.json").read_text() == before
  assert all(f"{domain}\n  asked: " in printed for domain in DOMAINS)
  assert "thinking=True" in printed and "thinking=False" in printed


def test_a_stage_that_is_killed_in_a_save_and_resumed_is_the_undisturbed_one_to_the_last_bit(tmp_path):
  """kill -9 while the first or the second checkpoint is written."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  words = [sys.executable, "-m", "experiments.reward_model", "--config=configs/tiny/reward_model.py:smoke"]
  start = lambda workdir: subprocess.Popen(
    [*words, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  assert start(whole).wait() == 0
  run, checkpoints, deadline = start(cut), cut / "reward_model" / "checkpoints", time.time() + 300
  while not (checkpoints.is_dir() and any("orbax-checkpoint-tmp" in p.name for p in checkpoints.iterdir())):
    assert run.poll() is None and time.time() < deadline
    time.sleep(0.001)  # Polls another process.
  run.kill()
  run.wait()
  assert not (checkpoints / "6").exists()
  assert start(cut).wait() == 0
  assert chaos.stage_differences(whole / "reward_model", cut / "reward_model") == []

  # The comparison itself must detect differences.
  (cut / "reward_model" / "checkpoints" / "3").rename(tmp_path / "3")
  shutil.copytree(cut / "reward_model" / "checkpoints" / "6", cut / "reward_model" / "checkpoints" / "3")
  lines = (cut / "reward_model" / "metrics.jsonl").read_text()
  (cut / "reward_model" / "metrics.jsonl").write_text(lines.replace('"step": 5', '"step": 4'))
  found = chaos.stage_differences(whole / "reward_model", cut / "reward_model")
  for what in ("metrics.jsonl", "checkpoint 3: params/backbone", "checkpoint 3: rest/step"):
    assert any(difference.startswith(what) for difference in found), (what, found)
