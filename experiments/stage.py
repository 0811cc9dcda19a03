"""What every training stage does alike: where it starts, and what it leaves behind."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments import loading
from experiments.assembly import Assembly
from nemocascade.checkpoint import Store
from nemocascade.rollout.episode import Samples
from nemocascade.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Spent:
  """Tokens that a stage of RL has put through a model so far, by what was done with them."""

  sampled: int = 0  # Decoded one at a time.
  prefilled: int = 0  # Prompts, once each.
  scored: int = 0  # Under a teacher or a reference.
  trained: int = 0  # Forward and backward; documents that teach nothing are never in a row.

  def plus(self, **more: int) -> "Spent":
    return dataclasses.replace(self, **{name: getattr(self, name) + n for name, n in more.items()})

  def plus_rollout(self, samples: Samples) -> "Spent":
    given_QG = ((samples.segment_ids_QGT > 0) & ~samples.loss_mask_QGT).sum(-1)
    return self.plus(sampled=int(samples.loss_mask_QGT.sum()), prefilled=int(given_QG[:, 0].sum()))

  def flops(self, matmul_params: int) -> int:
    """2 a parameter and token forward, 6 with the backward pass.

    Args:
      matmul_params: those that multiply a token: the active ones without the embedding's rows.

    Attention's and the scan's own products are left out: they are few at these lengths.
    """
    return matmul_params * (2 * (self.sampled + self.prefilled + self.scored) + 6 * self.trained)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A finished stage."""

  params: Params
  checkpoint: str
  steps: int
  tokens: int  # Trained on or sampled, all steps.
  wall_s: float  # Of this process; a resumed stage adds what it had.


def start(
  a: Assembly, stage_dir: Path, tx: optax.GradientTransformation, init_from: str, init_params=None
) -> tuple[TrainState, dict, Store]:
  """The state to train from, its record and the store: the first of these that exists.

  1. This stage's own last checkpoint, data position included.
  2. The parameters at `init_from` (a checkpoint of ours, or hf:DIR), under a new optimizer.
  3. Fresh parameters.
  """
  init_params = init_params or a.fresh_params

  @jax.jit
  def under_new_optimizer(params):
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))

  def fresh(key):
    return under_new_optimizer(init_params(key))

  key = jax.random.key(a.c.seed)
  template = jax.eval_shape(fresh, key)
  store = Store(stage_dir / "checkpoints")
  if store.latest() is not None:
    state, record = store.restore(template)
  else:
    a.save_model_files(stage_dir)
    record = {}
    if init_from:
      state = under_new_optimizer(loading.load(init_from, template.params))
    else:
      state = fresh(key)
  # Committed to its device wherever it came from: else the second step would compile again.
  return jax.device_put(state, jax.local_devices()[0]), record, store
