"""The pages of docs/tutorials in order: their files are complete, and their commands run one after another."""

import json
import re
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from in_process import run_command
from test_docs import ROOT, commands

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
# Commands that are not run here: tests/test_terminal.py and tests/test_mesh_stages.py have their like.
LEFT_OUT = ("python -m experiments.chat", "--config.mesh.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_fast):
  """The working directory of all pages, with the clone's configs."""
  folder = tmp_path_factory.mktemp("tutorials")
  (folder / "configs").symlink_to(ROOT / "configs")
  return folder


def run(line: str, folder: Path) -> CompletedProcess:
  """Runs a command in this process, a stage in its smoke form."""
  _, _, module, *arguments = shlex.split(re.sub(r"(--config=\S+\.py)", r"\1:smoke", line), comments=True)
  done = run_command(module.removeprefix("experiments."), *arguments, cwd=folder)
  assert done.returncode == 0, f"{line}: {done.stderr[-3000:]}"
  return done


def test_the_pages_are_eight_and_each_leads_to_the_next():
  assert [page.name[:3] for page in PAGES] == [str(number) for number in range(101, 109)]
  for page, after in zip(PAGES, PAGES[1:], strict=False):
    assert f"({after.name})" in page.read_text().splitlines()[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_after_those_of_the_pages_before(page, folder):
  for name, text in re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", page.read_text(), re.DOTALL):
    (folder / name).write_text(text)
  lines = [line for line in commands(page) if not any(words in line for words in LEFT_OUT)]
  assert lines
  printed = "".join(run(line, folder).stdout for line in lines)
  if page.stem.startswith("101"):
    again = run(lines[0], folder)  # "When nothing is left to do it says so at once."
    assert "sft: all 6 steps were done before" in again.stderr
  if page.stem.startswith("102"):
    answers, scored = ([json.loads(line) for line in (folder / f"{n}.jsonl").open()] for n in ("answers", "scored"))
    assert [row["id"] for row in answers] == [1, 2] and all(
      len(row["tokens"]) == len(row["logprobs"]) for row in scored
    )
    assert "answers.jsonl: 2 rows" in printed and "scored.jsonl: 2 rows" in printed
  if page.stem.startswith("105"):
    assert "Capital of" in (folder / "runs" / "brief" / "rl" / "samples.jsonl").read_text()
  if page.stem.startswith("108"):
    lineage = json.loads((folder / "runs/taught/rl/checkpoints/2/record/metadata").read_text())["lineage"]
    assert lineage["teachers"] == {
      "instruction": "runs/centred/rl/checkpoints/2", "math": "runs/first/sft/checkpoints/6"
    }  # fmt: skip
