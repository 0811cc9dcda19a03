"""What a run is watched with besides its own files: flags of the command line, so that a resumed run may differ."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from nemocascade import fields
from nemocascade.errors import UserError
from nemocascade.report import wandb_run
from nemocascade.report.metrics import MetricsWriter
from nemocascade.report.trace import traced

FLAGS = {
  "wandb": (fields.text("Project of Weights & Biases that the metrics are also sent to."), ""),
  "trace": (fields.text("Steps that JAX's profiler records into WORKDIR/trace, as FIRST:LAST."), ""),
}


@dataclasses.dataclass(frozen=True)
class Watching:
  """What the flags ask for.

  Attributes:
    wandb: the project; "" for none.
    trace: the first and the last step to trace, or None.
  """

  wandb: str = ""
  trace: tuple[int, int] | None = None

  @classmethod
  def of(cls, wandb: str, trace: str) -> "Watching":
    """Reads the flags. Raises UserError if a value is of another form, or wandb is not installed."""
    if wandb:
      wandb_run.check(wandb)
    if not trace:
      return cls(wandb)
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", trace)
    if not found or int(found[1]) > int(found[2]):
      raise UserError(f"--trace={trace}: must be FIRST:LAST, two steps from 0, such as 10:12")
    return cls(wandb, (int(found[1]), int(found[2])))

  def steps(self, steps: Iterable[int], stage_dir: Path) -> Iterator[int]:
    """Yields the steps of a stage, and traces those that the user asks for."""
    return traced(steps, self.trace, stage_dir.parent / "trace" / stage_dir.name)

  def end(self, stage_dir: Path, steps: int, c: ConfigDict, scores: Mapping[str, float]) -> None:
    """Shows the held-out scores at the end of a stage of a cascade beside its metrics, as heldout_end/DOMAIN."""
    with self.writer(stage_dir, steps, c) as writer:
      writer.write_scores(steps - 1, scores, "heldout_end")

  def writer(self, stage_dir: Path, start_step: int, c: ConfigDict) -> MetricsWriter:
    """The writer of a stage's metrics; `c` is the stage's config."""
    return MetricsWriter(stage_dir, start_step=start_step, wandb=self.wandb, config=c.to_dict())
