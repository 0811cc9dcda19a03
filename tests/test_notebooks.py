"""The notebooks of colab/: their form, their first cell on other machines, and three of them executed.

tests/test_cascade.py executes quickstart.ipynb, tests/test_ablation_smoke.py grpo_vs_mopd.ipynb.
"""

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.version import Version

from colab import start

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
COLAB = dict(
  line.split("==") for line in (ROOT / "tests" / "colab_2026.01.txt").read_text().splitlines() if line[0] != "#"
)


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def printed(cells) -> str:
  return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_from_its_badge_begins_alike_and_explains_before_it_shows(path):
  cells = read(path.stem).cells
  assert f"(https://colab.research.google.com/github/nemocascade/nemocascade/blob/main/colab/{path.name})" in (
    cells[0].source
  )
  first = next(cell.source for cell in cells if cell.cell_type == "code")
  assert first == next(cell.source for cell in read("quickstart").cells if cell.cell_type == "code")
  assert all(not cell.outputs for cell in cells if cell.cell_type == "code")
  assert sum(cell.cell_type == "markdown" for cell in cells) >= 5
  assert f"colab/{path.name}" in (ROOT / "README.md").read_text()


def test_three_notebooks_run(tmp_path, monkeypatch):
  """Executes them in one kernel, so that they share imports."""
  monkeypatch.setenv("NEMOCASCADE_SIZE", "smoke")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  names, whole = ("your_data", "your_advantage", "look_inside"), read("quickstart")
  whole.cells, ends = [], []
  for name in names:
    place = f"import os; os.environ['NEMOCASCADE_WORKDIR'] = {str(tmp_path / name)!r}"
    whole.cells += [nbformat.v4.new_code_cell(place), *read(name).cells]
    ends.append(len(whole.cells))
  NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(ROOT / "colab")}}).execute()
  data, advantage, inside = (whole.cells[first:last] for first, last in zip([0, *ends], ends, strict=False))
  assert "CPU cores; computes on" in printed(data) and "words" in printed(data[-3:])
  assert "def below_the_best" in printed(advantage) and "student" in printed(advantage[-1:])
  assert "share of tokens of each expert, E block 0" in printed(inside) and "with thoughts" in printed(inside[-1:])
  pictures = ["image/png" in output.get("data", {}) for cell in whole.cells for output in cell.get("outputs", ())]
  assert sum(pictures) == 4
  said = [output for cell in whole.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
  assert not any("Warning" in output["text"] for output in said)
  assert json.loads((tmp_path / "your_advantage/arms/mine/config.json").read_text())["config"]["steps"] == 2


def required() -> dict[str, Requirement]:
  lines = map(Requirement, importlib.metadata.requires("nemocascade"))
  return {line.name.lower().replace("_", "-"): line for line in lines if line.marker is None}


def test_nothing_that_colab_has_is_newer_than_we_allow_and_what_is_older_is_installed_anew(monkeypatch):
  versions = {name.lower().replace("_", "-"): version for name, version in COLAB.items()}
  needed = required()
  for name in needed.keys() & versions.keys():
    upper = next(part for part in needed[name].specifier if part.operator in ("<", "=="))
    assert Version(versions[name]) < Version(upper.version), name

  def version(name):
    if name.lower().replace("_", "-") not in versions:
      raise importlib.metadata.PackageNotFoundError(name)
    return versions[name.lower().replace("_", "-")]

  monkeypatch.setattr(importlib.metadata, "version", version)
  lacking = start.lacking("")
  assert {"jax<0.12,>=0.10.2", "numpy<3,>=2.1"} <= set(lacking)
  assert not any(line.startswith(("pyarrow", "PyYAML", "tqdm")) for line in lacking)  # New enough there.


def test_the_extra_is_that_of_the_machine(monkeypatch, tmp_path):
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: x)'\n")
  smi.chmod(0o755)
  monkeypatch.setattr(start.glob, "glob", lambda pattern: [])
  monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
  monkeypatch.setattr(start.shutil, "which", lambda name: None)
  assert start.accelerator() == "CPU"
  monkeypatch.setattr(start.shutil, "which", lambda name: str(smi))
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  assert start.accelerator() == "GPU"
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  assert start.accelerator() == "TPU"
  monkeypatch.setattr(start.platform, "system", lambda: "Darwin")
  assert start.accelerator() == "CPU"
  assert set(start.EXTRAS.values()) - {""} <= set(importlib.metadata.metadata("nemocascade").get_all("Provides-Extra"))


def test_a_kernel_that_has_imported_an_older_package_is_restarted(monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(start, "lacking", lambda extra: [])
  monkeypatch.setattr(start, "restart", lambda: ended.append(True))
  monkeypatch.setitem(sys.modules, "numpy", types.SimpleNamespace(__version__="1.26.4"))
  start.start()
  assert ended and "numpy 1.26.4 and not" in capsys.readouterr().out
