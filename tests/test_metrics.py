"""Metrics: lines are complete, resumed steps are written once, compilations are counted."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemocascade.report import metrics
from nemocascade.report.metrics import CompileCounter, MetricsWriter, Phases, Progress, read_lines
from nemocascade.state_files import write_json

# Settings that keep every program in the cache folder.
CACHE = {
  "jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1, "jax_enable_compilation_cache": True,
}  # fmt: skip


def test_resumed_steps_are_written_once(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(5):
      writer.write(step, {"loss/sft": step})
      writer.write_samples(step, [{"domain": "math"}])
  with MetricsWriter(tmp_path, start_step=3) as writer:
    writer.write(3, {"loss/sft": jnp.float32(9)})
  lines = read_lines(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines] == [0, 1, 2, 3]
  assert lines[-1]["loss/sft"] == 9
  assert len(read_lines(tmp_path / "samples.jsonl")) == 3


def test_tensorboard_shows_each_step_once(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(5):
      writer.write(step, {"loss/sft": step})
  first = next(tmp_path.glob("events.*"))
  first.rename(tmp_path / "events.out.tfevents.0000000001.first")  # TensorBoard reads files in order of their names.
  with MetricsWriter(tmp_path, start_step=3) as writer:
    for step in (3, 4):
      writer.write(step, {"loss/sft": 10 * step})
  events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/sft")
  assert [(e.step, e.value) for e in events] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 1, "lo')
  assert read_lines(path) == [{"step": 0}]
  with MetricsWriter(tmp_path, start_step=1) as writer:
    writer.write(1, {"loss/sft": 2})
  assert [line["step"] for line in read_lines(path)] == [0, 1]


@pytest.mark.parametrize(
  "text", ["a\u2028b\u2029c\x85d\x0b\x1c", "\ud800 alone", "\x00\r\n", "</pre><script>", "é漢😀"]
)
def test_any_completion_is_one_line_and_comes_back(tmp_path, text):
  with MetricsWriter(tmp_path) as writer:
    writer.write_samples(0, [{"completion": text}])
  assert read_lines(tmp_path / "samples.jsonl") == [{"step": 0, "completion": text}]
  with MetricsWriter(tmp_path, start_step=1):
    pass  # Resuming rewrites the file.
  assert read_lines(tmp_path / "samples.jsonl") == [{"step": 0, "completion": text}]


@pytest.mark.parametrize("value", [float("nan"), jnp.inf, jnp.float32(-jnp.inf)])
def test_a_number_that_is_not_finite_is_null(tmp_path, value):
  with MetricsWriter(tmp_path) as writer:
    writer.write(0, {"loss/sft": value, "reward/mean": jnp.bfloat16(0.5)})
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "step": 0, "loss/sft": None, "reward/mean": 0.5,
  }  # fmt: skip


def test_json_is_replaced_whole(tmp_path):
  write_json(tmp_path / "a" / "b.json", {"x": 1})
  write_json(tmp_path / "a" / "b.json", {"x": 2})
  assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 2}
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_json_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
  write_json(tmp_path / "b.json", {"x": 1})
  with pytest.raises(TypeError):
    write_json(tmp_path / "b.json", {"x": object()})
  assert json.loads((tmp_path / "b.json").read_text()) == {"x": 1}


def test_away_from_a_terminal_progress_is_few_whole_lines():
  out = io.StringIO()
  bar = Progress(1000, initial=10, desc="mopd", file=out, every_s=60.0)
  for step in range(990):
    bar.update(1, reward=0.25, tokens=100 * step)
  bar.close()
  assert out.getvalue().count("\n") == 1 and "\r" not in out.getvalue()
  assert "1000/1000" in out.getvalue() and "reward=0.250" in out.getvalue()


def test_progress_is_printed_when_it_is_due():
  out = io.StringIO()
  bar = Progress(4, initial=0, desc="sft", file=out, every_s=0.0)
  for _ in range(4):
    bar.update(1, loss=2.0)
  bar.close()
  assert [line.split("|")[-1].split()[0] for line in out.getvalue().splitlines()] == [
    "1/4", "2/4", "3/4", "4/4",
  ]  # fmt: skip


def test_a_terminal_gets_a_bar_with_time_left_and_speed():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  bar = Progress(4, initial=0, desc="sft", file=out)
  bar.update(1, tokens=100, reward=0.5)
  bar.update(1, tokens=200, reward=0.5)
  bar.close()
  assert "tokens/s=" in out.getvalue() and "2/4" in out.getvalue()


def test_times_and_speeds_of_a_bar_leave_out_compilation(monkeypatch):
  clock, compiled, out = [100.0], [7.0], io.StringIO()
  monkeypatch.setattr(metrics.time, "time", lambda: clock[0])
  monkeypatch.setattr(metrics, "compile_seconds", lambda: compiled[0])
  bar = Progress(4, initial=0, desc="sft", file=out, every_s=0.0)
  bar._bar.start_t, bar._bar._time = 100.0, lambda: clock[0]
  for passed, built in ((40, 38), (2, 0), (12, 50)):  # 50 s of several threads in 12 s.
    clock[0], compiled[0] = clock[0] + passed, compiled[0] + built
    bar.update(1, tokens=100)
  first, second, third = out.getvalue().splitlines()
  assert "00:02<00:06" in first and "compiled=38s" in first
  assert "00:04<00:04" in second and "00:04<00:01" in third and "compiled=88s" in third


def test_a_passing_bar_that_has_printed_nothing_prints_nothing_at_its_end():
  for every_s, lines in ((60.0, 0), (0.0, 1)):
    out = io.StringIO()
    bar = Progress(1, initial=0, desc="evaluate", unit="prompt", passing=True, file=out, every_s=every_s)
    bar.update(1)
    bar.close()
    assert out.getvalue().count("\n") == lines


def test_a_phase_that_comes_again_adds_up(monkeypatch):
  instants = iter([10.0, 11.0, 14.0, 14.5, 15.0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(instants))
  phases = Phases()
  for phase in ("rollout", "verdict", "rollout"):
    phases.end(phase)
  assert (taken := phases.take()) == {"rollout": 1.5, "verdict": 3.0} and phases.take() == {}
  phases.end("verdict")
  phases.add(taken)
  assert phases.take() == {"rollout": 1.5, "verdict": 3.5}


def test_compilations_are_counted_and_reads_from_the_cache_are_not_among_them(tmp_path):
  def program():
    return jax.jit(lambda x: jnp.sin(x) * 3.25)

  fn, x = program(), jnp.ones(7)
  before = {name: getattr(jax.config, name) for name in CACHE}
  try:
    for name, value in CACHE.items():
      jax.config.update(name, str(tmp_path) if value is None else value)
    compilation_cache.reset_cache()
    with CompileCounter() as first:
      fn(x)
    with CompileCounter() as again:
      fn(x)
    with CompileCounter() as elsewhere:  # Simulates another process: only the cache files remain.
      program()(x)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  assert (first.count, first.loaded, len(first.programs)) == (1, 0, 1)
  assert (again.count, again.loaded, again.programs) == (0, 0, [])
  assert (elsewhere.count, elsewhere.loaded, elsewhere.programs) == (0, 1, first.programs)


def test_a_program_for_other_places_of_its_arguments_is_another_compilation():
  """jit's trace cache has one entry for both, but two programs are compiled."""
  fn = jax.jit(lambda x: x + 1)
  x = np.ones(8, np.float32)
  here, there = (jax.device_put(x, device) for device in jax.devices()[:2])
  fn(here)
  with CompileCounter() as compiled:
    fn(there)
  assert len(compiled.programs) == 1
