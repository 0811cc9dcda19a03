"""Applies the guards in a stage's loop: prints a warning once, or ends the stage after a checkpoint."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.errors import StageStopped
from nemocascade.report.metrics import MetricsWriter
from nemocascade.runtime import guards, hosts, termination
from nemocascade.state_files import on_bucket
from nemocascade.step.optimizer import host_schedule
from nemocascade.step.update import SKIPPED
from nemocascade.store.checkpoint import Store
from nemocascade.types import TrainState


class Supervisor:
  """Writes each step's metrics and applies the guards to them.

  Attributes:
    stopping: whether a guard or SIGTERM has asked to end the stage. The loop then saves a checkpoint and calls `end`.
  """

  def __init__(self, c: ConfigDict, stage_dir: Path, record: Mapping[str, Any], *, without: Iterable[str] = ()):
    """
    Args:
      c: the stage's config; `guards`, `max_nonfinite`, `optimizer`, `steps` and `updates` are read.
      stage_dir: the stage's folder.
      record: the result of `record` in the checkpoint that the stage resumes from, or empty.
      without: guards to turn off for this stage.

    Raises:
      StageStopped: a guard ended the stage at this checkpoint.
    """
    self._dir, self._max_nonfinite = stage_dir, c.max_nonfinite
    self._settings = c.guards.to_dict()
    for name in without:
      self._settings[name] = self._settings[name] | {"action": "off"}
    self._histories = guards.from_json(record.get("histories", {}))
    self._warned = list(record.get("warned", ()))
    self._nonfinite = record.get("nonfinite", 0)  # Updates in a row that were not applied.
    self._learning_rate = host_schedule(c.optimizer, c.steps * c.get("updates", 1))
    self._applied = record.get("applied", 0)  # Updates that were.
    self._steps = {"learned": 0, "empty": 0, "refused": 0} | record.get("steps", {})
    self._stop = self._line = ""  # The guard that asked to end the stage, and its message.
    self._terminated = False
    termination.saves_at_steps()
    for finding in guards.standing(self._histories, self._settings):
      if finding.action == "stop":
        raise StageStopped(
          f"{stage_dir.name} was ended by {finding.line}; to go on: another --workdir, with init_from its last checkpoint"
        )

  @property
  def stopping(self) -> bool:
    return bool(self._stop) or self._terminated

  def record(self) -> dict[str, Any]:
    """The guards' state as plain JSON, for the stage's checkpoints."""
    return {
      "histories": guards.to_json(self._histories), "warned": self._warned, "nonfinite": self._nonfinite,
      "applied": self._applied, "steps": self._steps,
    }  # fmt: skip

  def write(
    self, writer: MetricsWriter, step: int, metrics: Mapping[str, Any], *,
    skipped: Sequence[float] | None = None, to_save: TrainState | None = None,
  ) -> None:  # fmt: skip
    """Writes the step's line of metrics, with the learning rate and the guards' flags, and reacts to guards that fire.

    Args:
      skipped: for each update of the step, whether it was skipped as not finite; none if there was no token to
        learn. By default the metric SKIPPED of a single update.
      to_save: the state, if a checkpoint follows this step: the room on the disk is then checked.

    Raises:
      StageStopped: max_nonfinite updates in a row were skipped.
    """
    metrics = {name: float(np.asarray(value)) for name, value in metrics.items()}
    if skipped is None:
      skipped = [metrics[SKIPPED]] if SKIPPED in metrics else []
    room = {} if to_save is None or on_bucket(self._dir) else {"disk/checkpoints": room_for(to_save, self._dir)}
    self._histories, findings, flags = guards.observe(self._histories, metrics | room, self._settings)
    writer.write(step, metrics | {"optimizer/learning_rate": self._learning_rate(self._applied)} | flags)
    if to_save is not None:  # What a checkpoint follows must not be lost to a kill.
      writer.upload()
    applied = sum(not refused for refused in skipped)
    self._applied += applied
    empty = not skipped or metrics.get("tokens/learned") == 0
    self._steps["empty" if empty else "learned" if applied else "refused"] += 1
    hosts.decided([[finding.guard, finding.action] for finding in findings], "guards")
    self._react(step, findings)
    self._terminated = termination.stopping() or self._terminated
    for refused in skipped:
      self._nonfinite = self._nonfinite + 1 if refused else 0
      if self._nonfinite >= self._max_nonfinite:
        raise StageStopped(
          f"{self._dir.name}, step {step}: {self._nonfinite} updates in a row were not finite, and not applied"
          f" (max_nonfinite={self._max_nonfinite}); lower optimizer.peak_lr, and start in another --workdir"
        )

  def end(self, store: Store, step: int) -> None:
    """Raises StageStopped if a guard asked to end the stage, Terminated if SIGTERM did, when `step` is on disk.

    The message names the checkpoint.
    """
    if not self._stop and not self._terminated:
      return
    store.wait()
    checkpoint = store.path_of(step)
    if self._stop in guards.AT_ONCE:
      raise StageStopped(f"{self._line}; the same command goes on from {checkpoint}")
    if self._stop:
      raise StageStopped(f"{self._line}; to go on: another --workdir with init_from={checkpoint}")
    raise termination.terminated(checkpoint)

  def finish(self) -> None:
    """Says on stderr, at the end of the stage, if none of its steps has learned anything, and why that may be."""
    if self._steps["learned"] or jax.process_index():
      return
    empty, refused = self._steps["empty"], self._steps["refused"]
    why = [
      f"{empty} had no token to learn (verdicts that never differ within a group, samples that are left out, or rows"
      " without an assistant's token: see rollout/ in metrics.jsonl)"
    ] * bool(empty) + [f"{refused} had updates that were not finite (lower optimizer.peak_lr)"] * bool(refused)
    print(f"warning: {self._dir.name}: no step changed what the model has learned: {'; '.join(why)}", file=sys.stderr)

  def _react(self, step: int, findings: list[guards.Finding]) -> None:
    for finding in findings:
      line = f"{self._dir.name}, step {step}: {finding.line}"
      if finding.action == "stop":
        if not self._stop:
          self._stop, self._line = finding.guard, line
      elif finding.guard not in self._warned:
        self._warned.append(finding.guard)
        if jax.process_index() == 0:
          print(f"warning: {line}", file=sys.stderr)


def room_for(state: TrainState, directory: Path) -> float:
  """How many checkpoints of the state still fit on the disk, as measured by the first process."""
  size = sum(array.nbytes for array in jax.tree.leaves(state))
  return hosts.exchange(shutil.disk_usage(directory).free / max(size, 1), "room on the disk")[0]
