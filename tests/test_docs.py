"""The docs name only what exists: links, paths, commands with their flags and fields; and every floor of the code."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import test_layout

from nemocascade import host_memory
from nemocascade.domains.agents import AGENTS, UNSUPPORTED

ROOT = Path(__file__).parent.parent
README, CHANGELOG, ARCHITECTURE = ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "architecture.md"
PAGES = [README, CHANGELOG, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("nemocascade", "experiments", "configs", "tests", "docs", "colab", ".ci")
FOLDERS = [path.name for path in (ROOT / "nemocascade").iterdir() if path.is_dir()]


def name(page: Path) -> str:
  return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
  """The anchors that a Markdown page's headings get: lower case, spaces as hyphens, no other punctuation."""
  titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(page: Path) -> list[str]:
  """The command lines `python -m experiments.NAME ...` of a page's code, indented or between ```sh and ```."""
  text = page.read_text()
  shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
  indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
  lines = re.sub(r"\\\n\s*", "", f"{shell}\n{indented}").splitlines()
  parts = [part.strip() for line in lines for part in line.split("&&")]
  return [part for part in parts if part.startswith("python -m experiments.")]


def assert_accepted(line: str, monkeypatch, capsys) -> None:
  """Asserts that the command exists, and accepts the line's flags, config and fields. Nothing is run."""
  _, _, module, *arguments = shlex.split(line, comments=True)
  path = ROOT / module.replace(".", "/")
  path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  monkeypatch.setattr(host_memory, "keep", lambda: None)
  monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--help"])  # Parses all arguments, then prints the help.
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(path), run_name="__main__")
  assert ended.value.code == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_resolves(page):
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if link.startswith(("http:", "https:")):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG], ids=name)
def test_every_path_exists(page):
  for word in re.findall(r"`([\w./-]+)[`:]", page.read_text()):
    first, *rest = word.strip("/").split("/")
    if not rest or not rest[0]:
      continue
    if first in TOP:
      assert (ROOT / word).exists(), word
    elif first in FOLDERS and (word.endswith(".py") or page == ARCHITECTURE):  # Not metrics, such as `rollout/tokens`.
      path = ROOT / "nemocascade" / word
      assert path.exists() or path.with_suffix(".py").exists(), word


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "your_own.md"], ids=name)
def test_every_command_line_is_accepted(page, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  for line in commands(page):
    assert_accepted(line, monkeypatch, capsys)


def test_every_page_and_command_is_reached_from_the_readme():
  text = README.read_text()
  for page in (ROOT / "docs").glob("*.md"):
    assert f"(docs/{page.name})" in text, page
  for command in (ROOT / "experiments").glob("[!_]*.py"):
    assert f"python -m experiments.{command.stem}" in text, command


def test_the_readme_is_short_and_the_test_command_stands_alone():
  lines = README.read_text().splitlines()
  assert len(lines) <= 120
  first = next(line for line in lines if "pytest -n 2" in line)  # .ci/run executes this line.
  assert first.startswith("    pip install")


def test_every_sweep_has_results_or_a_word_that_it_has_none():
  text = (ROOT / "docs" / "results.md").read_text()
  for path in (ROOT / "configs" / "tiny").glob("sweep_*.py"):
    assert path.stem in text, path


def test_every_metric_has_a_line():
  """The test finds names that stand in the code as they are. Others are made of names of domains, guards and phases."""
  code = "\n".join(path.read_text() for part in ("nemocascade", "experiments") for path in (ROOT / part).rglob("*.py"))
  groups = (
    "loss|norm|rollout|policy|reward|time|speed|data|expert|tokens|pairs|advantage|teacher|exact|exchange|optimizer"
  )
  table = re.findall("^\\| `.*", (ROOT / "docs" / "objectives.md").read_text(), re.MULTILINE)
  for metric in sorted(set(re.findall(rf'"((?:{groups})/[a-z_]{{2,}})"', code))):
    group, last = metric.split("/")
    ends = "|".join(last[i:] for i, letter in enumerate(last) if letter == "_")  # `group/a`, `_b` names group/a_b.
    pattern = rf"`{metric}`|`{group}/.*`(?:{ends or metric})`"
    assert any(re.search(pattern, line) for line in table), f"objectives.md has no line of {metric}"


def test_every_floor_is_described():
  text = ARCHITECTURE.read_text()
  places = [(ROOT / "nemocascade" / file, file) for floor in test_layout.FLOORS for file in floor]
  for path, file in places:
    shown = f"`{file}/`" if path.is_dir() else f"`{file}.py`" if file == "advantage" else f"`{file}`"
    assert shown in text or not (path.is_dir() or path.with_suffix(".py").exists()), f"{file} is not described"


def test_every_agent_of_the_released_data_is_listed():
  lines = [line for line in (ROOT / "docs" / "domains.md").read_text().splitlines() if line.startswith("| `")]
  for agent, domain in AGENTS.items():
    assert agent == domain or any(f"`{agent}`" in line and f"| `{domain}` |" in line for line in lines), agent
  for agent, reason in UNSUPPORTED.items():
    assert any(f"`{agent}`" in line and f"| none | all: {reason} |" in line for line in lines), agent
