"""A run in a bucket (gs://): checkpoints, records, metrics, data and report, on a file system that is no POSIX path."""

import json
import runpy
import sys

import buckets
import chex
import pytest
import tiny_checkpoint
from ml_collections import ConfigDict
from test_checkpoint import state, template

from configs import recipe
from configs.tiny import cascade as tiny_cascade
from configs.tiny import sft as sft_config
from experiments import cascade, convert
from nemocascade import state_files
from nemocascade.errors import UserError
from nemocascade.report.metrics import MetricsWriter, read_lines
from nemocascade.runtime import json_rows, launch, loading
from nemocascade.state_files import place, read_state, write_json
from nemocascade.store import checksums
from nemocascade.store.checkpoint import Store, load_params
from nemocascade.store.record import Record

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def bucket():
  with pytest.MonkeyPatch.context() as patch, buckets.serving(patch):
    yield "gs://mine"


def objects(prefix: str) -> list[str]:
  return sorted(name for name in buckets.OBJECTS if name.startswith(prefix))


def test_a_state_comes_back_from_a_bucket_bitwise(bucket):
  with Store(f"{bucket}/one") as store:
    assert store.latest() is None
    store.start_save(7, state(3), {"frontier": {"math": 12}})
  store = Store(f"{bucket}/one")
  found, record = store.restore(template())
  chex.assert_trees_all_equal(found, state(3))
  assert store.latest() == 7 and record == {"frontier": {"math": 12}}
  chex.assert_trees_all_equal(load_params(f"{bucket}/one/7", template().params), state(3).params)


def test_a_checkpoint_counts_from_its_commit_file_on_and_only_the_newest_are_kept(bucket):
  store = Store(f"{bucket}/two")
  for step in (1, 2, 3):
    store.save(step, state(step), {"at": step})
  assert store.steps() == [2, 3] and not objects("mine/two/1/")
  del buckets.OBJECTS["mine/two/3/commit_success.txt"]  # As if killed while it was written.
  store = Store(f"{bucket}/two")
  assert store.latest() == 2 and store.restore(template())[1] == {"at": 2}
  store.save(3, state(9), {"at": "again"})
  assert Store(f"{bucket}/two").restore(template())[1] == {"at": "again"}


@pytest.mark.parametrize("harm", ["changed", "lost", "added"])
def test_an_object_that_is_not_as_it_was_written_is_noticed(bucket, harm, capsys):
  store = Store(f"{bucket}/{harm}")
  for step in (1, 2):
    store.save(step, state(step), {"at": step})
  (name, *_) = [name for name in objects(f"mine/{harm}/2/params/") if "/d/" in name]
  if harm == "lost":
    del buckets.OBJECTS[name]
  else:
    buckets.put(name + "x" * (harm == "added"), buckets.OBJECTS[name][0][:-1] + b"?")
  with pytest.raises(UserError, match=f"checkpoint {bucket}/{harm}/2: can't be read"):
    load_params(f"{bucket}/{harm}/2", template().params)
  assert Store(f"{bucket}/{harm}").restore(template())[1] == {"at": 1}
  assert f"checkpoint {bucket}/{harm}/2 is damaged" in capsys.readouterr().err
  assert objects(f"mine/{harm}/damaged-2/")


def test_state_files_are_objects(bucket):
  path = place(f"{bucket}/files/a.json")
  with pytest.raises(UserError, match="gs://mine/files/a.json is damaged: FileNotFoundError"):
    read_state(path, {}, remedy="")
  for value in ({"x": 1}, {"x": 2}):
    write_json(path, value)
    assert read_state(path, {}, remedy="") == value
  assert objects("mine/files/") == ["mine/files/a.json"]


def test_metrics_are_uploaded_now_and_then_and_resumed_steps_are_written_once(bucket, monkeypatch):
  path = f"{bucket}/stage/metrics.jsonl"
  with MetricsWriter(f"{bucket}/stage") as writer:
    writer.write(0, {"loss/sft": 0})
    assert not read_lines(path)  # An upload for every line would be too many.
    writer.upload()
    assert len(read_lines(path)) == 1
    monkeypatch.setattr(state_files, "UPLOAD_S", 0.0)
    writer.write(1, {"loss/sft": 1})
    assert len(read_lines(path)) == 2
  with MetricsWriter(f"{bucket}/stage", start_step=1) as writer:
    writer.write(1, {"loss/sft": 5})
  assert [(line["step"], line["loss/sft"]) for line in read_lines(path)] == [(0, 0), (1, 5)]


def test_rows_are_read_from_a_bucket_and_written_to_one(bucket):
  given, out = f"{bucket}/rows/in.jsonl", f"{bucket}/rows/out.jsonl"
  place(given).write_bytes(b'{"tokens": [1, 2]}\n')
  json_rows.check_output(out, given)
  rows = [row for _, row in json_rows.read_rows(given)]
  json_rows.write_rows(out, rows, json_rows.instant())
  assert objects("mine/rows/") == ["mine/rows/in.jsonl", "mine/rows/out.jsonl"]
  assert json_rows.read_rows(out) == [(1, {"tokens": [1, 2]})]
  for output, said in (
    (given, "the file of --input"), (f"{bucket}/rows", "give the file to write"),
    (f"gs://{buckets.READ_ONLY}/out.jsonl", "cannot be written"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=said):
      json_rows.check_output(output, given)


@pytest.mark.parametrize(
  "source, target",
  [("gs://mine/s/1", "hf:there"), ("hf:gs://mine/s", "there"), ("hf:s", "gs://mine/s"), ("s", "hf:gs://mine/s")],
)
def test_a_conversion_is_refused_in_a_bucket_and_not_written_to_a_folder_of_its_name(
  source, target, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="is in a bucket; give a folder of this machine"):
    convert.run(source, target)
  assert not list(tmp_path.iterdir())


def test_scores_may_be_written_to_a_bucket(bucket, monkeypatch, capsys):
  words = ["--config=configs/tiny/if_rl.py:smoke", f"--workdir={bucket}/scores", "--checkpoint=none"]
  monkeypatch.setattr(sys, "argv", ["evaluate", *words])
  monkeypatch.setattr(launch.termination, "listen", lambda grace_s: None)  # Other tests need this process's SIGTERM.
  with pytest.raises(SystemExit):
    runpy.run_module("experiments.evaluate", run_name="__main__")
  assert capsys.readouterr().err.startswith("error: --checkpoint='none'")  # And not for its --workdir.


def test_a_bucket_needs_a_name():
  with pytest.raises(UserError, match="--workdir=gs://: names no bucket"):
    launch._workdir("gs://", True)


@pytest.mark.parametrize("takes", [False, True])
def test_a_bucket_that_cannot_be_written_is_refused(bucket, takes):
  with pytest.raises(UserError) as error:
    launch._workdir(f"gs://{buckets.READ_ONLY}/run", takes)
  said = "cannot be written .403: no storage.objects.create" if takes else "writes to a folder of this machine"
  assert error.match(f"--workdir=gs://{buckets.READ_ONLY}/run: .*{said}")
  if takes:
    assert str(launch._workdir(f"{bucket}/run", takes)) == f"{bucket}/run" and not objects("mine/run")


def cascade_config(verify: str) -> ConfigDict:
  """Three stages of SFT. The second one teaches the model to end its answers, and a gate guards that it does not."""
  c = tiny_cascade.get_config("smoke")
  with c.unlocked():
    c.model, c.tokenizer.vocab_size, c.tokenizer.conversations = ConfigDict(tiny_checkpoint.MODEL), 600, 60
    c.model.hybrid_override_pattern = "*"  # One block compiles fast.
    c.domains = {"endless": dict(rows="generated:instruction", verify=verify)}
    c.evaluation.update(prompts=32, batch=32, greedy=())
    c.order, c.side_line, c.stages = ("first", "ends", "last"), (), {}
    for name, steps in zip(c.order, (1, 12, 1), strict=True):
      stage = sft_config.stage("smoke")
      stage.update(steps=steps, save_every=6, init_from="previous", rows=2, row_tokens=256, look_ahead=2048)
      stage.sources = recipe.conversations(instruction=40)
      stage.optimizer.peak_lr = 2e-2
      c.stages[name] = stage
    c.stages.ends.gates = {"endless": dict(tolerance=0.1, action="back")}
  return c


def test_a_cascade_in_a_bucket_resumes_there_and_goes_back_from_a_stage_that_makes_a_domain_worse(
  bucket, tmp_path, monkeypatch, capsys
):
  (own := tmp_path / "own.py").write_text("def goes_on(row, completion):\n  return float(not completion.finished)\n")
  c, workdir = cascade_config(f"{own}:goes_on"), place(f"{bucket}/cascade")

  def interrupted(c, p, heldout, params, name, scores=cascade.scores):
    if name == "ends":
      raise KeyboardInterrupt
    return scores(c, p, heldout, params, name)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(cascade, "scores", interrupted)
    cascade.run(c, workdir)
  for name in objects("mine/cascade/ends/checkpoints/12/"):
    del buckets.OBJECTS[name]
  before = read_lines(workdir / "ends" / "metrics.jsonl")
  cascade.run(c, workdir)
  said = capsys.readouterr().err
  assert f"ends: goes on after 6 steps, from {workdir}/ends/checkpoints/6" in said
  after = read_lines(workdir / "ends" / "metrics.jsonl")
  assert [line["loss/sft"] for line in after] == [line["loss/sft"] for line in before] and len(after) == 12

  first, ends, last = Record.open(workdir).stages
  assert ends["decision"] == "back" and ends["start"] == last["start"] == first["checkpoint"]
  assert "gates of ends: endless changed by -0." in said and last["parent"] == "first"
  assert loading.find(f"{workdir}/last/checkpoints/1").config.hidden_size == c.model.hidden_size
  assert b"endless" in buckets.OBJECTS["mine/cascade/report/index.html"][0]
  cascade.run(c, workdir)
  assert f"all stages were done before: {workdir}/report/index.html" in capsys.readouterr().out
  c.seed = 9
  with pytest.raises(UserError, match=f"--workdir {workdir} belongs to another config: config.seed is 0"):
    cascade.run(c, workdir)


def test_the_checksums_of_a_bucket_read_no_object(bucket, monkeypatch):
  write_json(place(f"{bucket}/sums/a/b.json"), 1)
  monkeypatch.setattr(checksums, "_crc32", None)
  checksums.write(place(f"{bucket}/sums"))
  checksums.verify(place(f"{bucket}/sums"))
  assert json.loads(buckets.OBJECTS["mine/sums/checksums.json"][0]).keys() == {"a/b.json"}
