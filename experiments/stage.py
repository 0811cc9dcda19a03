"""What every training stage does alike: where it starts, and what it leaves behind."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments import loading
from experiments.assembly import Assembly
from nemocascade.checkpoint import Store
from nemocascade.types import Params, TrainState


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
