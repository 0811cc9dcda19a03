"""A stage's metrics in Weights & Biases, for users who ask for it. The package wandb is theirs to install."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemocascade.errors import UserError
from nemocascade.state_files import on_bucket


def check(project: str) -> None:
  """Raises UserError if the package is not installed."""
  if importlib.util.find_spec("wandb") is None:
    raise UserError(f"--wandb={project}: the package wandb is not installed; pip install wandb, or leave the flag out")


class WandbRun:
  """The run of one stage. A resumed stage goes on in the same run, which its directory identifies."""

  def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
    import wandb

    self._run = wandb.init(
      project=project, id=hashlib.sha256(str(directory).encode()).hexdigest()[:16], resume="allow",
      name=f"{directory.parent.name}/{directory.name}", group=directory.parent.name,
      dir=None if on_bucket(directory) else str(directory), config=dict(config),
    )  # fmt: skip
    # The x axis. wandb's own step must not go back, and steps after a checkpoint are done again after a kill.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    self._run.log({"step": step} | dict(numbers))

  def close(self) -> None:
    self._run.finish()
