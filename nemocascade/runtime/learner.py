"""Updates of the policy on a rollout: the rows that a step trains on, and the updates of one batch."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.runtime.objective import rows_program, settings, step_program
from nemocascade.runtime.signals import Sources
from nemocascade.step.rows import after_prompts, pack_rows
from nemocascade.step.update import SKIPPED
from nemocascade.types import Metrics, Prompts, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """The rows of a batch, on the host.

  Attributes:
    rows: packed rows; with packing.shared_prompts what follows the prompts.
    prompts: the prompts, if they are shared.
    count: the loss's divisor.
    metrics: of the rollout.
  """

  rows: dict[str, np.ndarray]
  prompts: Prompts | None
  count: jax.Array
  metrics: Metrics

  @property
  def empty(self) -> bool:
    """Whether no token is learned, because every sample was filtered out."""
    return not self.rows["mask"].any()

  @property
  def tokens(self) -> int:
    """Tokens of one update's forward and backward pass."""
    return int((self.rows["segment_ids"] > 0).sum() + (self.prompts.length_Q.sum() if self.prompts else 0))


def arrange(c: ConfigDict, rollout: Rollout) -> TrainingRows:
  """Computes the advantages, and arranges the samples in rows for the training step."""
  rows, count, metrics = rows_program(settings(c, "advantage", "aggregation"))(rollout)
  p, prompts = c.packing, None
  if p.shared_prompts:
    rows, prompts = after_prompts(rows, c.rollout.prompts, P=c.rollout.prompt_tokens, T=p.row_tokens)
  else:
    rows = pack_rows(rows, B=p.rows, T=p.row_tokens, accumulate=p.pieces)
  return TrainingRows(rows, prompts, count, metrics)


def learn(state: TrainState, batch: TrainingRows, s: Sources) -> tuple[TrainState, dict[str, float], list[float]]:
  """Makes the stage's updates on one batch: (state, metrics, whether each update was skipped as not finite).

  An empty batch is counted, but changes no parameter, because momentum alone would move them.
  """
  updates, skipped, metrics = s.c.updates, [], {}
  if batch.empty:
    state = state.replace(step=state.step + updates)
  else:
    _, step_fn, proximal_fn = step_program(s.c, s.programs)
    rows, prompts, count = s.programs.put((batch.rows, batch.prompts, batch.count))
    if updates > 1:
      rows["proximal"] = proximal_fn(state.params, rows, prompts, s.temperature)
    for _ in range(updates):
      state, metrics = step_fn(state, rows, count, s.heads_ZDV, prompts, s.temperature)
      skipped.append(metrics[SKIPPED])
    skipped = jax.device_get(skipped)
    metrics[SKIPPED] = sum(skipped)
  return state, {name: float(x) for name, x in jax.device_get(metrics | batch.metrics).items()}, skipped
