"""Invalid files in a work directory: each is named in one line before anything is done with it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
from in_process import run_command
from ml_collections import ConfigDict
from refusals import assert_refused
from test_checkpoint import state, template

from configs.tiny import cascade as cascade_config
from configs.tiny import if_rl, sft
from experiments import ablation, rl
from experiments import cascade as cascade_command
from nemocascade import state_files
from nemocascade.data.tokenizer import train_sentencepiece
from nemocascade.errors import UserError
from nemocascade.report.metrics import MetricsWriter, read_lines
from nemocascade.runtime import loading
from nemocascade.runtime.sharing import own
from nemocascade.runtime.text import own_tokenizer
from nemocascade.runtime.workdir import check_owner, claim
from nemocascade.state_files import read_state
from nemocascade.store import checksums, conversion
from nemocascade.store.checkpoint import Store
from nemocascade.store.record import Record

ROOT = Path(__file__).parent.parent
CASES = json.loads((Path(__file__).parent / "cases" / "files.json").read_text())
READERS = {
  "config.json": lambda path: check_owner(sft.get_config("smoke"), path.parent),
  "cascade.json": lambda path: Record.open(path.parent),
  "model/config.json": lambda path: loading.read_config(path.parent),
  "metrics.jsonl": lambda path: MetricsWriter(path.parent, start_step=5),
  "start.json": lambda path: ablation.start_of(None, None, None, None, path.parent),
  "hf.json": lambda path: read_state(path, conversion.RECORD_SHAPE, remedy=conversion.AGAIN),
}


def put(path: Path, case: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  make = {
    "folder": path.mkdir,
    "pipe": lambda: os.mkfifo(path),
    "link": lambda: path.symlink_to(path.parent / "nowhere"),
  }
  if "make" in case:
    make[case["make"]]()
  elif "hex" in case:
    path.write_bytes(bytes.fromhex(case["hex"]))
  else:
    path.write_text(case["text"] if "text" in case else 100_000 * case["repeat"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_damaged_state_file_is_named_in_one_line(tmp_path, case):
  path = tmp_path / case["file"]
  put(path, case)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=case["says"]) as error:
    READERS[case["file"]](path)
  assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
  assert len(str(error.value)) - len(str(path)) < 200
  assert sorted(tmp_path.rglob("*")) == before  # Nothing was written or removed.


def test_a_last_line_that_a_kill_cut_off_is_made_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 1, "lo')
  assert read_lines(path) == [{"step": 0}]


# Token ids must keep the meaning they had when the checkpoint was trained.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.make(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """A tokenizer trained on other text; most of its ids mean other words."""
  path = tmp_path_factory.mktemp("other") / "tokenizer.model"
  train_sentencepiece(["a dog ran under a tree for 3 or 4 days"] * 20, vocab_size=600).save(path)
  return path


def test_a_stage_on_its_own_reads_its_checkpoints_tokens(checkpoint, other, tmp_path):
  c = if_rl.get_config("smoke")
  c.tokenizer.path = ""
  assert own_tokenizer(c, tmp_path, checkpoint).fingerprint == tiny_checkpoint.TOKENIZER.fingerprint
  assert own_tokenizer(c, tmp_path, "") is None
  c.tokenizer.path = str(loading.model_files(checkpoint))
  assert own_tokenizer(c, tmp_path, checkpoint).fingerprint == tiny_checkpoint.TOKENIZER.fingerprint
  c.tokenizer.path = str(other)
  with pytest.raises(UserError, match=f"init_from=.*{checkpoint[-30:]}: its tokenizer .* is not this run's"):
    own_tokenizer(c, tmp_path, checkpoint)


def test_a_resumed_stage_reads_the_tokens_it_began_with_wherever_its_start_is_now(checkpoint, tmp_path):
  c = if_rl.get_config("smoke")
  tiny_checkpoint.make(tmp_path / "rl")
  assert own_tokenizer(c, tmp_path / "rl", "/gone").fingerprint == tiny_checkpoint.TOKENIZER.fingerprint


@pytest.mark.parametrize("what", ["init_from", "teachers"])
def test_a_stage_whose_checkpoints_read_other_tokens_is_refused_before_anything_is_written(
  checkpoint, other, tmp_path, what
):
  c = if_rl.get_config("smoke")
  c.model = ConfigDict(tiny_checkpoint.MODEL)
  c.tokenizer.path, c.init_from = str(other), checkpoint
  if what == "teachers":
    c.init_from = tokens_of_another(tmp_path / "start", other)
    with c.unlocked():
      c.advantage, c.teachers = "mopd", {"instruction": checkpoint}
  with pytest.raises(UserError, match=f"{what}.*{checkpoint[-30:]}: its tokenizer"):
    rl.main(c, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def tokens_of_another(stage: Path, tokenizer: Path) -> str:
  """A copy of the checkpoint of tiny_checkpoint whose files say that it was trained with this tokenizer."""
  made = tiny_checkpoint.make(stage)
  files = Path(made) / "model"
  (files / "tokenizer.model").write_bytes(tokenizer.read_bytes())
  checksums.write(files)
  return made


@pytest.mark.parametrize("known", [False, True], ids=["trained later", "in the work directory"])
@pytest.mark.parametrize("what", ["init_from", "teacher"])
def test_a_cascade_refuses_checkpoints_of_other_tokens(checkpoint, other, tmp_path, known, what):
  c = cascade_config.get_config("smoke")
  if known:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(other.read_bytes())
  if what == "init_from":
    c.stages.sft.init_from = checkpoint
  else:
    c.stages.mopd.teachers.math = checkpoint
  with pytest.raises(UserError, match=r"stages\..*its tokenizer .* is not this run's.*tokenizer.path="):
    cascade_command.run(c, tmp_path)
  assert not (tmp_path / "config.json").exists()
  c.tokenizer.path = str(loading.model_files(checkpoint))
  with pytest.raises(UserError, match="of another model"):  # The tokenizers now agree, so the model is checked next.
    cascade_command.run(c, tmp_path)


def test_a_changed_file_beside_a_checkpoint_is_named(tmp_path):
  """Changes one digit of the model's config or one byte of the tokenizer; both files still parse."""
  for name in ("config.json", "tokenizer.model"):
    stage = tmp_path / name
    made = tiny_checkpoint.make(stage)
    file = Path(made) / "model" / name
    data = bytearray(file.read_bytes())
    place = data.index(b'"hidden_size": 32') + 16 if name == "config.json" else len(data) // 2
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} has changed"):
      loading.find(made)


# A full disk.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_with_what_is_needed_and_free(tmp_path, number):
  for raised in (
    OSError(number, os.strerror(number)),
    ValueError(f"Error writing: [OS error 28: {os.strerror(number)}]"),
  ):
    with (
      pytest.raises(OSError, match=r"12\.0 MB are needed and .* MB are free") as error,
      state_files.named(tmp_path / "sub" / "file", needed=12_000_000),
    ):
      raise raised
    assert error.value.errno == number and error.value.filename == str(tmp_path / "sub" / "file")


def test_other_errors_keep_their_kind(tmp_path):
  with pytest.raises(ValueError, match="shape"), state_files.named(tmp_path):
    raise ValueError("shape")
  with pytest.raises(PermissionError), state_files.named(tmp_path):
    raise PermissionError(errno.EACCES, "Permission denied")


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_checkpoint import Store, state
from nemocascade.state_files import write_json
import jax, jax.numpy as jnp
from nemocascade.runtime.launch import launch
def run():
  store = Store(Path({path!r}))
  store.save(1, state(1), dict(at=1))
  resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
  {what}
launch(run, config=False, workdir=False)
"""


@pytest.mark.parametrize(
  "what, names",
  [
    ("store.save(2, state(2), dict(at='x' * 100_000))", "2"),
    ("write_json(Path({path!r}) / 'a.json', ['x' * 100_000])", "a.json"),
  ],
)
def test_a_save_that_finds_no_room_is_one_line_and_the_good_checkpoint_stays(tmp_path, what, names):
  """RLIMIT_FSIZE stands for a full disk: the system refuses the write in the same way."""
  script = LIMITED.format(path=str(tmp_path), limit=50_000, what=what.format(path=str(tmp_path)))
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 1, done.stderr[-2000:]
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: {tmp_path / names}: File too large") and "MB are free" in line
  assert not (tmp_path / names).exists()
  store = Store(tmp_path)
  assert store.restore(template())[1] == {"at": 1}
  store.save(2, state(2), {})  # Again, now with room.
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # The remains of the failed save are gone.
  assert int(Store(tmp_path).restore(template())[0].step) == 2


# Only one writer.

OWNS = """
import sys
from pathlib import Path
from nemocascade.runtime.sharing import own
own(Path(sys.argv[1]), shared=bool(sys.argv[2:]))
print("in", flush=True)
sys.stdin.read()
"""


def process(*arguments):
  return subprocess.Popen(
    [sys.executable, "-c", OWNS, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
  )


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
  with process(str(tmp_path)) as first:
    assert first.stdout.readline() == b"in\n"
    for shared in (False, True):
      with pytest.raises(UserError, match=rf"--workdir {tmp_path}: another process \(process {first.pid} of "):
        own(tmp_path, shared=shared)
    with pytest.raises(UserError, match="another process"):
      claim(sft.get_config("smoke"), tmp_path, None)
    assert not (tmp_path / "config.json").exists()
    first.kill()
    first.wait()
    own(tmp_path)
    own(tmp_path)  # A process may take its own lock again.


def test_those_that_share_keep_out_only_one_that_does_not(tmp_path):
  with process(str(tmp_path), "shared") as first:
    assert first.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="another process"):
      own(tmp_path)
    own(tmp_path, shared=True)
    first.kill()


def test_a_command_that_writes_where_another_does_is_refused(tmp_path):
  with process(str(tmp_path)) as first:
    assert first.stdout.readline() == b"in\n"
    done = run_command("sft", "--config=configs/tiny/sft.py:smoke", f"--workdir={tmp_path}")
    first.kill()
  assert_refused(done, "another process")
  assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("text", ["[]", "null", "3", 100_000 * "["], ids=["list", "null", "number", "deep"])
def test_a_hugging_face_config_that_is_no_object_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=f"hf:{tmp_path}: config.json"):
    loading.find(f"hf:{tmp_path}")


TYPES = {"number": 1.5, "integer": 3, "path": "a", "string": "a\0\ud800"}


@pytest.mark.parametrize(
  ("kind", "text"),
  [("number", "NaN"), ("number", "true"), ("number", "Infinity"), ("number", "-1e999"), ("number", "1" + "0" * 400), ("integer", "3.0"), ("integer", "1e3"), ("integer", "NaN"),
   ("integer", "true"), ("path", '"a\\u0000"'), ("path", '"\\ud800"'), ("path", '"\\udfff.x"'), ("string", "1")],
)  # fmt: skip
def test_a_state_file_holds_no_value_that_would_fail_later(tmp_path, kind, text):
  path, shape = tmp_path / "state.json", {"type": "object", "properties": {"x": {"type": kind}}}
  path.write_text(json.dumps({"x": TYPES[kind]}))
  assert read_state(path, shape, remedy="") == {"x": TYPES[kind]}
  path.write_text(f'{{"x": {text}}}')
  with pytest.raises(UserError, match=f"x: is .*, must be of type {kind}"):
    read_state(path, shape, remedy="")
