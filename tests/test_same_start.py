"""Several processes compare code, data, devices and the work directory before they begin."""

import json
import re
from pathlib import Path

import pytest

from nemocascade import state_files
from nemocascade.errors import UserError
from nemocascade.runtime import same_start


class Others:
  """Stands for other processes: what they say in an exchange, made from what this process says."""

  def __init__(self, monkeypatch, **answers):
    self._answers = answers
    monkeypatch.setattr(same_start, "exchange", self)

  def __call__(self, value, what):
    value = json.loads(json.dumps(value))
    return [value, *(answer(value) for name, answer in self._answers.items() if name in what.replace(" ", "_"))]


@pytest.mark.parametrize("prefix", ["", "hf:"])
@pytest.mark.parametrize("place", ["", "deeper/"])
def test_data_of_the_same_size_and_another_content_is_another(tmp_path, prefix, place):
  (tmp_path / place).mkdir(exist_ok=True)
  file, name = tmp_path / place / "rows.jsonl", f"{prefix}{tmp_path}"
  seen = []
  for text in ("one", "two", "one"):
    file.write_text(text)
    same_start._said_of.cache_clear()
    seen.append(same_start.data({"sources": {"mine": {"path": name}}, "steps": 3}))
  assert set(seen[0]) == {name} and seen[0] == seen[2] != seen[1]


def test_files_that_flags_name_are_compared(tmp_path, monkeypatch):
  (given := tmp_path / "in.jsonl").write_text("{}")
  seen = []
  monkeypatch.setattr(same_start, "exchange", lambda here, what: [seen.append(here) or here])
  same_start.check(None, {"input": str(given), "checkpoint": "", "mesh": "data:1"})
  assert set(seen[0]["files of data"]) == {str(given)}


def test_packages_that_verdicts_depend_on_are_compared():
  assert {"python", "jax", "math-verify", "nltk", "grain", "tokenizers"} <= set(same_start.packages())
  assert same_start.packages()["jax"] != "absent"


def test_variables_that_change_programs_are_compared_and_those_of_a_host_are_not(monkeypatch):
  before = same_start.environment()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/here")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  assert same_start.environment() == before
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  assert same_start.environment() == before | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def test_other_numbers_of_devices_are_named(monkeypatch):
  Others(monkeypatch, start=lambda here: here | {"devices": here["devices"] | {"number": 3}})
  with pytest.raises(UserError, match="processes differ in devices.number: 8 in process 0, 3 in process 1"):
    same_start.check_devices()


@pytest.mark.parametrize("inside", ["", "run", "some/run"])
def test_a_work_directory_that_not_all_processes_share_is_refused(tmp_path, monkeypatch, inside):
  workdir = tmp_path / inside
  said = []
  Others(monkeypatch, trial=lambda there: said.append(there[1]) or there, sight=lambda seen: False)
  with pytest.raises(
    UserError, match=re.escape(f"--workdir={workdir}: process 1 can't see what process 0 writes there")
  ):
    same_start.check_shared(workdir)
  assert said == [len(Path(inside).parts)] and not list(tmp_path.iterdir())
  Others(monkeypatch, sight=lambda seen: seen)
  same_start.check_shared(workdir)
  assert not list(tmp_path.iterdir())


def test_a_process_that_finds_the_trial_in_no_folder_of_its_own_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(same_start, "SEEN_S", 0.2)
  monkeypatch.setattr(same_start, "index", lambda: 1)
  (tmp_path / "here").mkdir()
  (tmp_path / "there" / ".shared.x").mkdir(parents=True)
  said = []
  monkeypatch.setattr(
    same_start,
    "exchange",
    lambda value, what: said.append(value) or ([["/run", 1, ".shared.x"]] if "trial" in what else [True, value]),
  )
  with pytest.raises(UserError, match="--workdir=/run: process 1 can't see"):
    same_start.check_shared(tmp_path / "here" / "run")
  same_start.check_shared(tmp_path / "there" / "run")
  assert said == [[str(tmp_path / "here" / "run"), 1, None], False, [str(tmp_path / "there" / "run"), 1, None], True]


def test_hosts_whose_processes_have_one_number_write_under_other_temporary_names(tmp_path, monkeypatch):
  monkeypatch.setattr(state_files.os, "getpid", lambda: 1)
  path = tmp_path / "index"
  with state_files.whole(path) as one:
    one.write_text("one")
    monkeypatch.setattr(state_files.socket, "gethostname", lambda: "another")
    with state_files.whole(path) as other:
      other.write_text("other")
  assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
