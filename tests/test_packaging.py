"""The requirements of the package: each has an upper bound, and a package is required alike wherever it is named."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.fixture(scope="module")
def required():
  """Place ("" is the core, else an extra) -> package -> its bounds."""
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", found.update)
    patch.chdir(SETUP.parent)
    runpy.run_path(str(SETUP))
  split = lambda line: re.fullmatch(r"([\w.-]+(?:\[\w+\])?)(.*)", line.split(";")[0].strip()).groups()
  places = {"": found["install_requires"]} | found["extras_require"]
  return {place: dict(split(line) for line in lines) for place, lines in places.items()}


def test_every_requirement_has_an_upper_bound(required):
  open_ended = [
    name
    for packages in required.values()
    for name, bounds in packages.items()
    if "<" not in bounds and "==" not in bounds
  ]
  assert not open_ended


def test_errors_and_pages_name_extras_that_exist(required):
  """The package is installed from a clone: `pip install 'nemocascade[hf]'` would ask an index that does not have it."""
  root, said = SETUP.parent, set()
  for path in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("[en]*/**/*.py")]:
    text = path.read_text()
    assert "pip install 'nemocascade[" not in text, path
    for names in re.findall(r"pip install (?:-q )?-e '\.\[([\w,]+)\]'", text):
      said |= set(names.split(","))
  assert {"tpu", "gcs", "hf", "bench"} <= said - {"NAME"} <= required.keys()


def test_what_the_tests_compare_with_is_what_the_benchmarks_compare_with(required):
  shared = required["test"].keys() & required["bench"].keys()
  assert {"trl", "torch", "transformers"} <= shared
  assert {name: required["bench"][name] for name in shared} == {name: required["test"][name] for name in shared}
