"""Output of a run: metrics.jsonl, samples.jsonl, TensorBoard events, the progress bar; timers and counters."""

import contextlib
import io
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TextIO

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from nemocascade.errors import UserError
from nemocascade.report.wandb_run import WandbRun
from nemocascade.state_files import (
  Appended,
  append_to,
  check_shape,
  named,
  parsed,
  place,
  read_text,
  stands,
  whole,
)

_numbers = itertools.count()  # Numbers the event files of this process.
# JSON schema of a line of metrics.jsonl and samples.jsonl.
LINE: dict[str, Any] = {
  "type": "object",
  "required": ["step"],
  "properties": {"step": {"type": "integer", "minimum": 0}},
}


class MetricsWriter:
  """Writes metrics to metrics.jsonl, one line a step, and to TensorBoard. Only the first process writes.

  On resume, lines from `start_step` on are removed, because the stage writes them again.
  """

  def __init__(
    self, directory: str | Path, *, start_step: int = 0, wandb: str = "", config: Mapping[str, Any] | None = None
  ):
    """
    Args:
      wandb: a project of Weights & Biases that the metrics are also sent to; "" for none.
      config: the fields that the run has there.
    """
    self._files: dict[str, IO[Any] | Appended] = {}
    self._wandb: WandbRun | None = None
    if jax.process_index() > 0:
      return
    directory = place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.jsonl" for name in ("metrics", "samples")}
    for path in files.values():
      _drop_from(path, start_step)
    steps = {line["step"] for line in read_lines(files["metrics"])}
    if lost := set(range(start_step)) - steps:
      print(
        f"{files['metrics']} lacks steps {min(lost)} to {max(lost)}: the stage goes on without them", file=sys.stderr
      )
    self._files = {name: append_to(path) for name, path in files.items()}
    # TensorBoard finds its files by this pattern and reads them in the order of their names.
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
    self._files["events"] = append_to(directory / name, "ab")
    self._event(file_version="brain.Event:2")
    # This event makes TensorBoard drop what an earlier process wrote from this step on.
    self._event(step=start_step, session_log=SessionLog(status=SessionLog.START))
    if wandb:
      self._wandb = WandbRun(wandb, directory, config or {})

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes a step's metrics, "part/quantity" -> number; metrics.jsonl has null for one that is not finite."""
    if not self._files:
      return
    numbers = {name: float(np.asarray(value)) for name, value in metrics.items()}
    finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    self._line("metrics", {"step": step} | finite)
    values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
    self._event(step=step, summary=Summary(value=values))
    if self._wandb:
      self._wandb.write(step, numbers)

  def write_scores(self, step: int, scores: Mapping[str, float], part: str = "heldout") -> None:
    """Writes held-out scores after a step to TensorBoard, as PART/NAME. On disk validation.json has those of validations,
    and cascade.json those at the end of a stage."""
    if not self._files or not scores:
      return
    numbers = {f"{part}/{name}": score for name, score in scores.items()}
    self._event(step=step, summary=Summary(value=[Summary.Value(tag=n, simple_value=x) for n, x in numbers.items()]))
    if self._wandb:
      self._wandb.write(step, numbers)

  def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
    """Writes samples of one step (prompt, completion, verdict, ...) to samples.jsonl, one line each, and as texts
    to TensorBoard."""
    if not self._files:
      return
    for sample in samples:
      self._line("samples", {"step": step} | sample)
    texts = [_text(f"samples/{i}", sample) for i, sample in enumerate(samples)]
    self._event(step=step, summary=Summary(value=texts))

  def upload(self) -> None:
    """Uploads all of the files to the bucket, if they are in one; a file of a folder always has all lines."""
    for file in self._files.values():
      if isinstance(file, Appended):
        file.upload()

  def _line(self, name: str, value: dict[str, Any]) -> None:
    with named(place(self._files[name].name)):
      self._files[name].write(_dumps(value) + "\n")
      self._files[name].flush()

  def _event(self, **fields: Any) -> None:
    """Writes an event in this thread: TensorBoard's own writer has a thread, which dies if the disk is full."""
    file = self._files["events"]
    with named(place(file.name)):
      RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())
      file.flush()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    if self._wandb:
      self._wandb.close()
    for file in self._files.values():  # All data is flushed. After a write error, close() fails again.
      with contextlib.suppress(OSError):
        file.close()


def _text(tag: str, sample: Mapping[str, Any]) -> Summary.Value:
  """A sample for TensorBoard's page of texts: Markdown in which every field is a block of code."""
  blocks = [f"**{name}**\n\n" + "".join(f"    {line}\n" for line in str(of).split("\n")) for name, of in sample.items()]
  text = "\n".join(blocks).encode(errors="replace")  # A completion may contain lone surrogates.
  of_texts = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
  return Summary.Value(tag=tag, metadata=of_texts, tensor=TensorProto(dtype=DT_STRING, string_val=[text]))


def _dumps(value: Any) -> str:
  """JSON in ASCII, because a completion may contain lone surrogates or Unicode line separators."""
  return json.dumps(value, ensure_ascii=True)


def read_lines(path: str | Path, shape: dict = LINE) -> list[dict[str, Any]]:
  """The objects of a .jsonl file; [] if there is no file. An incomplete last line is left out.

  Args:
    shape: the JSON schema of a line.

  Raises:
    UserError: a line is not JSON or does not match the schema; the file and the line are named.
  """
  path, lines = place(path), []
  if not stands(path):
    return []
  remedy = "remove the line, or the file"
  *whole, rest = read_text(path, remedy="remove it").split("\n")  # splitlines() would also split at U+2028.
  for number, line in enumerate([*whole, rest], start=1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    try:
      value = parsed(line, where, remedy=remedy)
    except UserError:
      if number > len(whole):
        break
      raise
    check_shape(value, shape, where, remedy=remedy)
    lines.append(value)
  return lines


def _drop_from(path: Path, step: int) -> None:
  """Removes the lines of `step` and later steps."""
  if not stands(path):
    return
  kept = [line for line in read_lines(path) if line["step"] < step]
  with whole(path) as partial:
    partial.write_text("".join(_dumps(line) + "\n" for line in kept), encoding="utf-8")


class Phases:
  """Measures the seconds of each phase of the steps. Repeated phases add up."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def end(self, phase: str) -> None:
    """Ends a phase, which began when the previous one ended (the first: at construction)."""
    now = time.perf_counter()
    self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
    self._last = now

  def take(self) -> dict[str, float]:
    """The seconds of each phase since the last call. The next phase has begun when the last one ended."""
    taken, self.seconds = self.seconds, {}
    return taken

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds the seconds that an earlier `take` returned, for a step that has not ended then."""
    for phase, of in seconds.items():
      self.seconds[phase] = self.seconds.get(phase, 0.0) + of


class Progress:
  """A progress bar with the stage's figures. Without a terminal it prints a line every `every_s` seconds.

  Its times and speeds leave out compilation, whose seconds it shows beside them.
  """

  def __init__(
    self, total: int, *, initial: int, desc: str, unit: str = "step", passing: bool = False,
    file: TextIO | None = None, every_s: float = 10.0,
  ):  # fmt: skip
    """
    Args:
      passing: the bar disappears at its end, and one that has printed no line until then prints none.
    """
    self._file = file or sys.stderr
    self._terminal, self._every_s, self._passing = self._file.isatty(), every_s, passing
    self._bar = tqdm(
      total=total, initial=initial, desc=f"{desc:16}", unit=unit, dynamic_ncols=self._terminal,
      # Without a terminal tqdm only counts; its output would be one long line of carriage returns.
      file=self._file if self._terminal else io.StringIO(), ascii=not self._terminal,
      mininterval=0.5 if self._terminal else 1e9, leave=not passing,
    )  # fmt: skip
    self._began = self._updated = time.time()
    self._compiled = self._compiled_before = compile_seconds()
    self._first_tokens: int | None = None
    self._printed = time.monotonic()
    self._shown = 0  # The step of the last line.

  def update(self, steps: int, *, tokens: int | None = None, **figures: float) -> None:
    """Advances the bar.

    Args:
      steps: number of finished steps since the last call.
      tokens: total tokens since the stage's beginning; the bar shows their rate.
      figures: numbers to show, such as reward and loss.
    """
    shown = {name: f"{value:.3f}" for name, value in figures.items()}
    self._leave_out_compilation()
    if tokens is not None:
      if self._first_tokens is None:  # The first step compiles, so the speed is measured from its end.
        self._began, self._first_tokens = time.time(), tokens
      else:
        speed = (tokens - self._first_tokens) / max(time.time() - self._began, 1e-9)
        shown["tokens/s"] = f"{speed:.0f}"
    if (compiled := self._compiled - self._compiled_before) >= 1:
      shown["compiled"] = f"{compiled:.0f}s"
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(steps)
    if not self._terminal and time.monotonic() - self._printed >= self._every_s:
      self._print()

  def _leave_out_compilation(self) -> None:
    """Moves the beginnings that times are measured from by what was compiled since the last call."""
    now, compiled = time.time(), compile_seconds()
    # Threads may compile at once, so the sum of their seconds may exceed those that passed.
    spent = min(compiled - self._compiled, now - self._updated)
    self._updated, self._compiled = now, compiled
    self._began += spent
    self._bar.start_t += spent
    self._bar.last_print_t += spent

  def close(self) -> None:
    if not self._terminal and self._bar.n != self._shown and (self._shown or not self._passing):
      self._print()
    self._bar.close()

  def _print(self) -> None:
    self._printed, self._shown = time.monotonic(), self._bar.n
    print(str(self._bar), file=self._file, flush=True)


def progress(total: int, *, initial: int, desc: str, **more: Any) -> Progress:
  """A Progress over `total` steps, of which `initial` are done; it writes in the first process alone."""
  nowhere = None if jax.process_index() == 0 else io.StringIO()
  return Progress(total, initial=initial, desc=desc, file=nowhere, **more)


# JAX reports _BUILT for compilations and for reads from the persistent cache; before a read it reports _READ.
_BUILT = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"
_lock = threading.Lock()
_built: list[str] = []  # Names of all programs of this process, compiled or read from the cache.
_built_s = 0.0  # Seconds that took.
_read = 0


def _on_duration(event: str, duration_secs: float, **of_event: str | int) -> None:
  global _built_s
  if event == _BUILT:
    with _lock:
      _built.append(str(of_event.get("fun_name", "")))
      _built_s += duration_secs


def _on_event(event: str, **_) -> None:
  global _read
  if event == _READ:
    with _lock:
      _read += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def compile_seconds() -> float:
  """Seconds in which this process has compiled programs so far, or read them from the persistent cache."""
  return _built_s


class CompileCounter:
  """Context manager that counts XLA compilations, including those of operations outside jitted programs.

  The attributes may be read inside the context and after it.

  Attributes:
    count: number of programs compiled.
    loaded: number of programs read from the persistent cache instead.
    programs: the names of both, in order.
  """

  def __enter__(self) -> "CompileCounter":
    self._before = len(_built), _read
    return self

  def __exit__(self, *_) -> None:
    self._after = len(_built), _read

  def _now(self) -> tuple[int, int]:
    return getattr(self, "_after", (len(_built), _read))

  @property
  def programs(self) -> list[str]:
    return _built[self._before[0] : self._now()[0]]

  @property
  def loaded(self) -> int:
    return self._now()[1] - self._before[1]

  @property
  def count(self) -> int:
    return len(self.programs) - self.loaded
