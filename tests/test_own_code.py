"""Functions and classes in a user's own file, and the one line that each bad name gives."""

import pytest

from nemocascade import own_code
from nemocascade.errors import UserError

FILE = """
import dataclasses

LOADS = []
LIMIT = 3

def score(row, completion, *, scale=1.0):
  return float(len(completion)) * scale

@dataclasses.dataclass
class World:
  n: int = 0

def fails():
  raise RuntimeError("first line\\nsecond")
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "my_rewards.py"
  path.write_text(FILE)
  return path


def test_a_function_and_a_class_are_found_and_the_file_runs_once(file):
  score = own_code.load(f"{file}:score", field="verify")
  world = own_code.load(f"{file}:World", field="environment")
  assert score({}, "abc") == 3.0
  assert world(2).n == 2
  assert score.__globals__ is own_code.load(f"{file}:fails", field="verify").__globals__
  assert own_code.parameters(score) == ("row", "completion")


def test_a_relative_path_starts_at_the_working_directory(file, monkeypatch):
  monkeypatch.chdir(file.parent)
  assert own_code.load("my_rewards.py:score", field="verify")({}, "ab") == 2.0


@pytest.mark.parametrize(
  "word, own", [("math", False), ("a.py:f", True), ("dir/a.py:f", True), ("generated:math", False)]
)
def test_a_name_of_a_file_is_told_from_a_built_in_name(word, own):
  assert own_code.is_own(word) is own


@pytest.mark.parametrize(
  "name, said",
  [
    ("scores", "did you mean 'score'?"),
    ("nothing_like_it", "it defines score, World, fails"),
    ("LIMIT", "LIMIT in .* is int, not a function"),
  ],
)
def test_a_name_that_is_not_in_the_file(file, name, said):
  with pytest.raises(UserError, match=said) as error:
    own_code.load(f"{file}:{name}", field="domains.mine.verify")
  assert str(error.value).startswith(f"domains.mine.verify='{file}:{name}'")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "content, said",
  [
    (b"def f(:\n", "is not Python.*line 1"),
    (b"\x89PNG\r\n\x00\x00", "is not Python"),
    (b'{"a": 1}\n}', "is not Python"),
    (b"import no_such_module_at_all", "importing .* failed: ModuleNotFoundError.*line 1 of f.py"),
    (b"x = 1\nraise SystemExit(3)", "importing .* failed: SystemExit.*line 2"),
  ],
)
def test_a_file_that_is_no_python_or_raises(tmp_path, content, said):
  path = tmp_path / "f.py"
  path.write_bytes(content)
  for _ in range(2):  # A failed import leaves nothing behind.
    with pytest.raises(UserError, match=said) as error:
      own_code.load(f"{path}:f", field="advantage")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["score", "rewards.txt:score", "rewards.py", ""])
def test_another_form_is_named(spec):
  with pytest.raises(UserError, match="allowed is FILE.py:NAME"):
    own_code.load(spec, field="verify")


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match="there is no file"):
    own_code.load(f"{tmp_path}/none.py:score", field="verify")


def test_an_exception_is_one_line_with_its_place(file):
  fails = own_code.load(f"{file}:fails", field="verify")
  with pytest.raises(RuntimeError) as error:
    fails()
  assert own_code.raised(error.value) == "RuntimeError: first line second (line 15 of my_rewards.py)"
