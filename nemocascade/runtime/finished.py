"""Whether a run has nothing left to do, found before models and data are opened."""

import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime import course, guards, lineage, validation
from nemocascade.runtime.course import Choice
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.start import RECORD
from nemocascade.state_files import absolute, on_bucket, read_state
from nemocascade.store import checksums
from nemocascade.store.checkpoint import steps_in
from nemocascade.store.record import Record


def stage(c: ConfigDict, stage_dir: Path) -> bool:
  """Whether the stage's last checkpoint is there, and no byte of it has changed. Prints where it is.

  False if in doubt; the stage then finds out itself. Call it after check_owner: the work directory has this config.
  """
  found = exchange(_handed_on(c, stage_dir), "whether the stage is done")[0]
  if found and jax.process_index() == 0:
    print(f"{stage_dir.name}: all {c.steps} steps were done before; checkpoint: {found}", file=sys.stderr)
  return bool(found)


def _handed_on(c: ConfigDict, stage_dir: Path) -> str:
  """The checkpoint that the finished stage hands on; "" if it has not finished, or a file is damaged."""
  checkpoints = absolute(stage_dir) / "checkpoints"
  try:
    if not checkpoints.is_dir() or c.steps not in steps_in(checkpoints):
      return ""
    step = validation.best_step(c, stage_dir) or c.steps
    for i in {step, c.steps}:
      checksums.verify(checkpoints / str(i))
    record = read_state(checkpoints / str(c.steps) / "record" / "metadata", RECORD, remedy="")
  except (checksums.Damage, UserError, OSError):
    return ""
  histories = guards.from_json(record.get("supervisor", {}).get("histories", {}))
  if any(finding.action == "stop" for finding in guards.standing(histories, c.guards.to_dict())):
    return ""
  return str(checkpoints / str(step))


def cascade(c: ConfigDict, record: Record, choice: Choice, anew: list[str]) -> bool:
  """Whether all chosen stages of the cascade have finished, and its report is newer than its record.

  Args:
    record: that of the work directory.
    anew: the stages that are trained anew.
  """
  now = course.decided(c, record)
  done = not anew and all(record.is_done(n) and not lineage.is_grown(now, record, n) for n in choice.of(now))
  # The last file of the report, which is not written while the run goes on.
  picture = record.path.parent / "report" / "scores.png"
  done = done and picture.is_file() and _written(picture) >= _written(record.path)
  return exchange(bool(done), "whether the cascade is done")[0]


def _written(path: Path) -> int:
  """When the file was written; buckets count in seconds, folders in nanoseconds."""
  found = path.stat()
  return found.mtime if on_bucket(path) else found.st_mtime_ns  # type: ignore[attr-defined]
