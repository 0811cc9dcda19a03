"""Writes what each step of an RL stage leaves behind: metrics, samples, and a checkpoint now and then."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nemocascade.report.metrics import Phases, progress
from nemocascade.runtime.meter import BETWEEN, Meter
from nemocascade.runtime.objective import needs
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.validation import scores_at
from nemocascade.store.checkpoint import Store
from nemocascade.types import Params, TrainState

Watch = Callable[[int, Params, Spent], bool]  # (steps done, parameters, cost) -> end the stage?


class Logbook:
  """Records the steps of an RL stage, applies the guards and asks the stage's watcher. Use it in a `with`.

  At the end of the `with` the last checkpoint is on disk.

  Attributes:
    phases: the timer of the steps.
  """

  def __init__(
    self, c: ConfigDict, stage_dir: Path, p: Parts, store: Store, watch: Watch, *, first: int,
    record: Mapping[str, Any], title: str = "",
  ):  # fmt: skip
    """
    Args:
      first: the step that the stage begins or resumes with.
      record: that of the checkpoint that the stage resumes from, or empty.
      title: shown at the progress bar; "" is the name of `stage_dir`.

    Raises:
      StageStopped: a guard ended the stage at this checkpoint.
    """
    self._title = title or stage_dir.name
    self._c, self._dir, self._p, self._store, self._watch, self._first = c, stage_dir, p, store, watch, first
    self._spent, self.phases = Spent(**record.get("spent", {})), Phases()
    self._meter = Meter(p.programs.config, record.get("meter", {}))
    # few_signals watches the share of groups whose verdicts differ. Others lack a signal only if verdicts are
    # compared within groups.
    compares = needs(c).groups and c.reward == "verdict"
    self._supervisor = Supervisor(
      c, stage_dir, record.get("supervisor", {}), without=() if compares else ("few_signals",)
    )

  def __enter__(self) -> "Logbook":
    self._writer = self._p.watching.writer(self._dir, self._first, self._c)
    self._bar = progress(self._c.steps, initial=self._first, desc=self._title)
    return self

  def __exit__(self, kind, *_) -> None:
    self._writer.__exit__()
    self._store.__exit__(kind)
    if kind is None:
      self._bar.close()
      self._supervisor.finish()

  def steps(self, end: int) -> Iterator[int]:
    """Yields the steps that are left before `end`."""
    self.phases.end(BETWEEN)
    return self._p.watching.steps(range(self._first, end), self._dir)

  def record(
    self, step: int, state: TrainState, metrics: Mapping[str, float], skipped: Sequence[float], spent: Spent,
    samples: Callable[[], list[dict]], mixture: Mapping[str, Any],
  ) -> bool:  # fmt: skip
    """Writes a finished step. Returns whether the stage ends here.

    Args:
      state: after the step.
      skipped: for each update, whether it was skipped as not finite.
      spent: of the stage so far.
      samples: makes the lines for samples.jsonl; called if they are due, in every process.
      mixture: the position in the prompts, for the checkpoint.

    Raises:
      StageStopped: a guard ends the stage, or too many updates in a row were not finite.
      OSError: the checkpoint before could not be written.
    """
    c, supervisor = self._c, self._supervisor
    self._store.check()
    due = (step + 1) % c.save_every == 0
    counts = any(not refused for refused in skipped)
    times, _ = self._meter.step(self.phases, spent.minus(self._spent), counts=counts)
    self._spent = spent
    supervisor.write(self._writer, step, metrics | times, skipped=skipped, to_save=state if due else None)
    ended = self._watch(step + 1, state.params, spent) or step + 1 == c.steps
    self._writer.write_scores(step, scores_at(c, self._dir, step + 1))
    if step % c.samples_every == 0 or ended:
      self._writer.write_samples(step, samples())
    self._bar.update(1, reward=metrics["reward/mean"], tokens=spent.sampled)
    if due or ended or supervisor.stopping:
      parts = {
        "mixture": mixture, "spent": dataclasses.asdict(spent), "supervisor": supervisor.record(),
        "meter": self._meter.record(),
      }  # fmt: skip
      self._store.start_save(step + 1, state, parts)
      supervisor.end(self._store, step + 1)
    self.phases.end(BETWEEN)
    return ended
