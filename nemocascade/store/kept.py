"""Checkpoints of a stage that outlive newer ones: kept.json in the stage's folder names their steps."""

from collections.abc import Sequence
from pathlib import Path

from orbax.checkpoint.checkpoint_managers import preservation_policy

from nemocascade.state_files import read_state, stands, write_json

KEPT = {  # JSON schema of kept.json: why -> step.
  "type": "object",
  "additionalProperties": {"type": "integer", "minimum": 1},
}


def keep_step(checkpoints: Path, why: str, step: int) -> None:
  """Keeps the checkpoint of a step, which may not be saved yet, instead of the one that was kept for the same reason.

  Args:
    checkpoints: the stage's folder of checkpoints.
    why: a word, such as "best".
  """
  before = kept_steps(checkpoints)
  if before.get(why) != step:
    write_json(checkpoints.parent / "kept.json", before | {why: step})


def kept_steps(checkpoints: Path) -> dict[str, int]:
  """Why a checkpoint is kept -> its step. Raises UserError if kept.json is damaged."""
  path = checkpoints.parent / "kept.json"
  return read_state(path, KEPT, remedy="restore it: it names checkpoints to keep") if stands(path) else {}


class NewestAndKept(preservation_policy.PreservationPolicy):
  """Tells Orbax to preserve the newest checkpoints and those of kept.json."""

  def __init__(self, checkpoints: Path, newest: int):
    self._checkpoints, self._newest = checkpoints, newest

  def should_preserve(self, checkpoints: Sequence, *, context) -> Sequence[bool]:
    del context
    steps = [info.step for info in checkpoints]
    wanted = {*sorted(steps)[-self._newest :], *kept_steps(self._checkpoints).values()}
    return [step in wanted for step in steps]
