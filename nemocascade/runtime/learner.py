"""Updates of the policy on a rollout: the rows that a step trains on, and the updates of one batch."""

import dataclasses

import jax
import numpy as np

from nemocascade.runtime.objective import rows_program, settings, step_program
from nemocascade.runtime.signals import Sources
from nemocascade.step.mismatch import AGREEMENT
from nemocascade.step.rows import Rows, after_prompts, lengths_of, pack_rows
from nemocascade.step.update import SKIPPED
from nemocascade.types import Metrics, Prompts, Rollout, TrainState

# Metrics of a batch's first update, which without a lag has the sampler's parameters; others are of the last one.
FIRST = (AGREEMENT,)


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """The rows of a batch, on the devices.

  Attributes:
    rows: packed rows; with packing.shared_prompts what follows the prompts.
    prompts: the prompts, if they are shared.
    count: the loss's divisor.
    tokens: tokens of one update's forward and backward pass; 0 if every sample was filtered out.
    metrics: of the rollout.
  """

  rows: Rows
  prompts: Prompts | None
  count: jax.Array
  tokens: int
  metrics: Metrics

  @property
  def empty(self) -> bool:
    """Whether no token is learned, because every sample was filtered out."""
    return not self.tokens


def arrange(rollout: Rollout, s: Sources) -> TrainingRows:
  """Computes the advantages, and arranges the samples in rows for the training step.

  The host reads three numbers of each sample, and no array of tokens. Each device packs its own prompts' samples.
  """
  mesh, p, prompts = s.programs.mesh, s.c.packing, None
  rollout = s.programs.put(rollout)
  rows, count, metrics = rows_program(settings(s.c, "advantage", "aggregation"), mesh)(rollout)
  lengths = lengths_of(rollout, mesh)
  tokens_QG = np.where(lengths.taught_QG, lengths.length_QG, 0)
  if p.shared_prompts:
    rows, prompts = after_prompts(rows, lengths, mesh=mesh, P=s.c.rollout.prompt_tokens, T=p.row_tokens)
    repeated = np.maximum(lengths.taught_QG.sum(axis=1) - 1, 0)  # Times that a prompt is not read again.
    tokens = tokens_QG.sum() - (lengths.prompt_Q * repeated).sum()
  elif s.c.rollout.exact:  # A row for each sample, where verification had it.
    tokens = tokens_QG.sum()
  else:
    rows = pack_rows(rows, lengths, mesh=mesh, B=p.rows, T=p.row_tokens, accumulate=p.pieces)
    tokens = tokens_QG.sum()
  return TrainingRows(rows, prompts, count, int(tokens), metrics)


def learn(state: TrainState, batch: TrainingRows, s: Sources) -> tuple[TrainState, dict[str, float], list[float]]:
  """Makes the stage's updates on one batch: (state, metrics, whether each update was skipped as not finite).

  An empty batch is counted, but changes no parameter, because momentum alone would move them. With rollout.lag, the
  parameters before the updates are kept, also if none was applied.
  """
  updates, skipped, metrics = s.c.updates, [], {}
  if batch.empty:
    state = state.replace(step=state.step + updates)
  else:
    _, step_fn, proximal_fn = step_program(s.c, s.programs)
    rows = dict(batch.rows)
    if updates > 1:
      rows["proximal"] = proximal_fn(state.params, rows, batch.prompts, s.temperature)
    for _ in range(updates):
      state, found = step_fn(state, rows, batch.count, s.heads_ZDV, batch.prompts, s.temperature)
      skipped.append(found[SKIPPED])
      metrics = found | {name: metrics[name] for name in FIRST if name in metrics}
    skipped = jax.device_get(skipped)
    metrics[SKIPPED] = sum(skipped)
  if s.c.rollout.lag and all(skipped):
    before = jax.tree.map(lambda a: jax.device_put(a, a.sharding, may_alias=False), state.params)
    state = state.replace(opt_state=state.opt_state._replace(before=before))
  return state, {name: float(x) for name, x in jax.device_get(metrics | batch.metrics).items()}, skipped
