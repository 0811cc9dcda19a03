"""Modules import only from the same or a lower layer, files and functions stay small, files have docstrings."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the lowest floor to the highest. A folder imports from lower floors and from itself.
FLOORS = [
  {
    "types",
    "segments",
    "config",
    "errors",
    "own_code",
    "fields",
    "field_table",
    "field_check",
    "mesh",
    "host_memory",
    "state_files",
  },
  {"kernels"},
  {"data"},
  {"model"},
  {"sandbox"},
  {"verifiers"},
  {"domains"},
  {"generated"},
  {"rollout"},
  {"advantage"},
  {"step"},
  {"evaluate"},
  {"store"},
  {"report"},
  {"runtime"},
]
FILES = [p for p in sorted((ROOT / "nemocascade").rglob("*.py")) if p.name != "__init__.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = FILES + TESTS + sorted((ROOT / "experiments").rglob("*.py")) + sorted((ROOT / "configs").rglob("*.py"))


def floor(name: str) -> int:
  return next(i for i, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> set[str]:
  """Parts of our package that a file imports, such as "step" for "nemocascade.step.loss"."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts == ["nemocascade"]:
        found |= {alias.name for alias in node.names}
      elif parts[0] == "nemocascade":
        found.add(parts[1])
      elif parts[0] in ("experiments", "configs"):
        found.add(parts[0])
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_look_down(path):
  here = path.relative_to(ROOT / "nemocascade").parts[0].removesuffix(".py")
  for name in imports(path):
    assert name not in ("experiments", "configs"), f"{here} imports {name}"
    assert name == here or floor(name) < floor(here) or floor(name) == floor(here) == 0, f"{here} imports {name}"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_one_purpose_and_says_it_and_its_functions_have_at_most_60_lines(path):
  text = path.read_text()
  parsed = ast.parse(text)
  assert len(text.splitlines()) <= 400
  if path.name != "__init__.py" or text:
    assert ast.get_docstring(parsed), "no docstring"
  assert path.stem not in ("utils", "util", "common", "helpers", "misc")
  for node in ast.walk(parsed):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      assert node.end_lineno - node.lineno < 60, node.name
