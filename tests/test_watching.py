"""How a run is watched: Weights & Biases, traces of steps, a learning rate, a line when no step has learned anything."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.tiny import if_rl as rl_config
from configs.tiny import sft as sft_config
from nemocascade.errors import UserError
from nemocascade.report import wandb_run
from nemocascade.report.metrics import MetricsWriter, read_lines
from nemocascade.report.trace import traced
from nemocascade.runtime import supervision
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.validation import scores_at
from nemocascade.runtime.watching import Watching
from nemocascade.state_files import write_json
from nemocascade.step.optimizer import make_schedule
from nemocascade.step.update import SKIPPED


@pytest.fixture
def wandb(monkeypatch):
  """A module that records what it is told."""
  fake = types.ModuleType("wandb")
  fake.runs = []

  class Run:
    def __init__(self, **how):
      self.how, self.lines, self.ended = how, [], False
      fake.runs.append(self)

    def define_metric(self, name, step_metric=None):
      self.how[name] = step_metric

    def log(self, line):
      self.lines.append(line)

    def finish(self):
      self.ended = True

  fake.init = Run
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: fake)
  return fake


def test_metrics_go_to_wandb_and_a_resumed_stage_goes_on_in_its_run(tmp_path, wandb):
  watching = Watching.of("mine", "")
  c = sft_config.get_config("smoke")
  for first in (0, 1):
    with watching.writer(tmp_path / "sft", first, c) as writer:
      writer.write(first, {"loss/sft": jnp.float32(2)})
  one, two = wandb.runs
  assert one.lines == [{"step": 0, "loss/sft": 2.0}] and two.lines == [{"step": 1, "loss/sft": 2.0}]
  assert one.how["id"] == two.how["id"] and one.how["project"] == "mine" and one.how["config"]["rows"] == c.rows
  assert one.how["*"] == "step" and one.ended and two.ended
  assert [line["step"] for line in read_lines(tmp_path / "sft" / "metrics.jsonl")] == [0, 1]


def test_without_the_flag_wandb_is_not_imported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # An import raises ImportError.
  with Watching.of("", "").writer(tmp_path / "sft", 0, sft_config.get_config("smoke")) as writer:
    writer.write(0, {"loss/sft": 1.0})


def test_wandb_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="--wandb=mine: the package wandb is not installed"):
    Watching.of("mine", "")


@pytest.mark.parametrize("said", ["3", "5:4", "a:b", "1:2:3", "-1:2"])
def test_a_trace_of_no_steps_is_refused(said):
  with pytest.raises(UserError, match=f"--trace={said}: must be FIRST:LAST"):
    Watching.of("", said)


def test_the_steps_asked_for_are_traced(tmp_path, monkeypatch, capsys):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  watching = Watching.of("", "2:3")
  for step in watching.steps(range(6), tmp_path / "sft"):
    calls.append(step)
  assert calls == [0, 1, str(tmp_path / "trace" / "sft"), 2, 3, "stop", 4, 5]
  assert f"trace written: {tmp_path / 'trace' / 'sft'}" in capsys.readouterr().err


def test_a_stage_that_ends_within_the_steps_writes_its_trace(tmp_path):
  for step in traced(range(9), (1, 7), tmp_path):
    jax.block_until_ready(jnp.ones(3) + step)
    if step == 2:
      break
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
  def full():
    raise RuntimeError("no space left")

  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
  monkeypatch.setattr(jax.profiler, "stop_trace", full)
  assert list(traced(range(3), (1, 1), tmp_path)) == [0, 1, 2]
  assert capsys.readouterr().err == f"trace {tmp_path}: cannot be written (no space left)\n"


def test_steps_that_are_not_done_are_said(tmp_path, capsys):
  assert list(traced(range(3), (5, 6), tmp_path)) == [0, 1, 2]
  assert "--trace=5:6: no such step was done" in capsys.readouterr().err


def test_samples_are_texts_in_tensorboard(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write_samples(4, [{"prompt": "1 + 1", "completion": "two\n\ud800 <b>", "reward": 1.0}])
  (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("samples/0")
  text = event.tensor_proto.string_val[0].decode()
  assert event.step == 4 and "**completion**\n\n    two\n    ? <b>\n" in text


def test_held_out_scores_of_a_validation_are_in_tensorboard(tmp_path):
  c = sft_config.get_config("smoke")
  with c.unlocked():
    c.steps, c.validation = 5, dict(every=2)
  lines = [{"step": step, "metric": 0.5, "scores": {"math": step / 8}} for step in (2, 4, 5)]
  write_json(tmp_path / "validation.json", lines)
  with MetricsWriter(tmp_path) as writer:
    for step in range(5):
      writer.write_scores(step, scores_at(c, tmp_path, step + 1))
  events = EventAccumulator(str(tmp_path)).Reload().Scalars("heldout/math")
  assert [(e.step, e.value) for e in events] == [(1, 0.25), (3, 0.5), (4, 0.625)]
  c.validation.every = 0
  assert scores_at(c, tmp_path, 2) == {}


def supervised(tmp_path, c, steps, *, record=None, without=()):
  """The supervisor after these steps, each (metrics, skipped), and the lines of metrics."""
  supervisor = Supervisor(c, tmp_path / "sft", record or {}, without=without)
  with MetricsWriter(tmp_path / "sft") as writer:
    for step, (metrics, skipped) in enumerate(steps):
      supervisor.write(writer, step, metrics, skipped=skipped)
  return supervisor, read_lines(tmp_path / "sft" / "metrics.jsonl")


def test_the_learning_rate_is_that_of_the_updates_that_were_applied(tmp_path):
  c = sft_config.get_config("smoke")
  c.steps, c.optimizer.warmup_steps = 6, 2
  o = c.optimizer
  rate = make_schedule(o.peak_lr, o.warmup_steps, c.steps, o.final_fraction, schedule=o.schedule)
  supervisor, lines = supervised(tmp_path, c, [({SKIPPED: bad}, None) for bad in (0.0, 1.0, 0.0, 0.0)])
  assert [line["optimizer/learning_rate"] for line in lines] == pytest.approx([float(rate(n)) for n in (0, 1, 1, 2)])
  _, lines = supervised(tmp_path, c, [({SKIPPED: 0.0}, None)], record=supervisor.record())
  assert lines[0]["optimizer/learning_rate"] == pytest.approx(float(rate(3)))


@pytest.mark.parametrize(
  "steps, says",
  [
    ([({}, [])] * 2, "2 had no token to learn"),
    ([({"tokens/learned": 0.0}, [0.0])], "1 had no token to learn"),
    ([({}, [1.0]), ({}, []), ({}, [1.0])], "1 had no token to learn .*; 2 had updates that were not finite"),
    ([({}, []), ({}, [0.0])], ""),
  ],
)
def test_a_stage_none_of_whose_steps_has_learned_anything_says_so(tmp_path, capsys, steps, says):
  c = rl_config.get_config("smoke")
  first, _ = supervised(tmp_path, c, steps[:1])
  resumed, _ = supervised(tmp_path, c, steps[1:], record=first.record())  # The count is that of the whole stage.
  resumed.finish()
  said = capsys.readouterr().err
  if says:
    assert re.search(f"warning: sft: no step changed what the model has learned: {says}", said)
  else:
    assert not said


def test_what_guards_find_is_compared_between_processes(tmp_path, monkeypatch):
  decided = []
  monkeypatch.setattr(supervision.hosts, "decided", lambda value, what: decided.append(value))
  c = rl_config.get_config("smoke")
  c.guards.entropy_collapse.update(action="warn", threshold=1.0)
  window = c.guards.window
  supervised(tmp_path, c, [({"policy/entropy": 0.5}, [0.0])] * window)
  assert decided == [[]] * (window - 1) + [[["entropy_collapse", "warn"]]]


def test_the_scores_at_the_end_of_a_stage_are_in_tensorboard_beside_its_metrics(tmp_path):
  c, watching = sft_config.get_config("smoke"), Watching.of("", "")
  with watching.writer(tmp_path / "sft", 0, c) as writer:
    for step in range(3):
      writer.write(step, {"loss/sft": 1.0})
  watching.end(tmp_path / "sft", 3, c, {"math": 0.25})
  found = EventAccumulator(str(tmp_path / "sft")).Reload()
  assert [(e.step, e.value) for e in found.Scalars("heldout_end/math")] == [(2, 0.25)]
  assert [e.step for e in found.Scalars("loss/sft")] == [0, 1, 2]
  assert [line["step"] for line in read_lines(tmp_path / "sft" / "metrics.jsonl")] == [0, 1, 2]
