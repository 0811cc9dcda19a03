"""The comparison of GRPO and MOPD at smoke size: it finishes, it resumes after kill -9, the notebook shows it."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from in_process import run_command
from refusals import assert_refused

from configs.tiny import grpo_vs_mopd as config

ROOT = Path(__file__).parent.parent


def flags(workdir, *more):
  return "--config=configs/tiny/grpo_vs_mopd.py:smoke", f"--workdir={workdir}", *more


def words(workdir):
  return [sys.executable, "-m", "experiments.ablation", *flags(workdir)]


def command(workdir):
  return subprocess.run(words(workdir), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("ablation") / "whole"
  done = command(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir


def test_the_record_holds_every_arm_seed_and_pair_and_its_numbers_are_finite(finished):
  c, found = config.get_config("smoke"), json.loads((finished / "ablation.json").read_text())
  assert found["seeds"] == list(c.seeds) and set(found["arms"]) == set(found["summary"]) == set(c.arms)
  for name, arm in found["arms"].items():
    assert arm["steps"] == [0, *c.compared.at, *c.compared.full_at, *([3] if name == "grpo_150" else [])]
    assert [len(scores) for scores in arm["scores"]] == [len(arm["steps"])] * len(c.seeds)
    assert arm["tokens"] == sorted(arm["tokens"]) and arm["flops"] == sorted(arm["flops"])
  assert {(p["a"], p["b"]) for p in found["paired"]} == {*c.compared.pairs, *c.compared.ends}
  assert all(math.isfinite(x) for p in found["paired"] for x in (p["difference"]["mean"], *p["difference"]["ci95"]))


def test_pictures_and_tables_are_there(finished):
  for name in ("curves.png", "differences.png"):
    assert (finished / name).stat().st_size > 20_000
  for name in ("curves.csv", "summary.csv", "paired.csv", "domains.csv"):
    assert len(list(csv.reader((finished / name).open()))) > 1


def test_a_killed_comparison_ends_as_if_it_had_not_been(finished, tmp_path):
  """Kills the command in the middle of an arm of the last seed, then runs it again."""
  shutil.copytree(finished, tmp_path / "cut")
  cut = tmp_path / "cut"
  shutil.rmtree(cut / "seed_1" / "arms")  # Student and compiled programs stay, to save time.
  for name in ("ablation.json", "curves.csv", "paired.csv"):
    (cut / name).unlink()
  run = subprocess.Popen(words(cut), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.time() + 300
  while not (cut / "seed_1" / "arms" / "mopd" / "evaluations.jsonl").exists():
    assert run.poll() is None and time.time() < deadline
    time.sleep(0.02)  # Polls another process.
  run.kill()
  run.wait()
  assert not (cut / "seed_1" / "arms" / "mopd" / "done.json").exists()
  done = command(cut)
  assert done.returncode == 0, done.stderr[-3000:]
  for name in ("ablation.json", "curves.csv", "paired.csv"):
    assert (cut / name).read_text() == (finished / name).read_text()


def test_a_teacher_that_is_damaged_is_one_line_that_names_it(finished, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(finished, broken)
  shutil.rmtree(broken / "seed_0" / "arms" / "mopd")  # This arm must be run again.
  record = broken / "seed_0" / "cascade.json"
  record.write_text(record.read_text().replace(str(finished), str(broken)))
  checkpoint = broken / "seed_0" / "teacher" / "checkpoints" / "2"
  largest = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
  largest.write_bytes(largest.read_bytes()[:-1])
  done = command(broken)
  assert done.returncode == 2, done.stderr[-2000:]
  assert str(checkpoint) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  "flag, word",
  [
    ("--config.arms.mopd.advantage=mpod", "did you mean 'mopd'"),
    ("--config.arms.mopd.teachers.math=teachr", "did you mean 'teacher'"),
    ("--config.budgt.amount=3", "budgt"),
  ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(tmp_path, flag, word):
  done = run_command("ablation", *flags(tmp_path / "run", flag))
  assert_refused(done, word)
  assert not (tmp_path / "run").exists()


def test_the_notebook_shows_equations_arms_and_pictures(finished, monkeypatch):
  """Runs the notebook on the finished comparison, which it loads and draws."""
  import nbformat
  from nbclient import NotebookClient

  monkeypatch.setenv("NEMOCASCADE_WORKDIR", str(finished))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  before = (finished / "ablation.json").read_text()
  notebook = nbformat.read(ROOT / "colab" / "grpo_vs_mopd.ipynb", as_version=4)
  sources = {cell.source for cell in notebook.cells if cell.cell_type == "code"}
  assert not any(word in source for source in sources for word in ("def ", "class ", "lambda "))
  NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  printed = "".join(output.get("text", "") for output in outputs)
  assert all(name in printed for name in config.get_config("smoke").arms)
  assert "def grpo" in printed and "def mopd" in printed and "steps to teacher" in printed
  assert all(f"\n{name:20} " in printed for name in ("student", "teacher of math", "grpo", "mopd"))
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
  assert (finished / "ablation.json").read_text() == before
  assert os.environ["NEMOCASCADE_WORKDIR"] == str(finished)
