"""The training step of a Bradley-Terry reward model, on pairs of a chosen and a rejected answer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nemocascade.step.update import apply_gradients
from nemocascade.types import Metrics, TrainState

Rows = tuple[jax.Array, jax.Array]  # tokens_BT, segment_ids_BT.


def bradley_terry_loss(chosen_B: jax.Array, rejected_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum of -log sigmoid(chosen - rejected) in nats, number of pairs)."""
  losses_B = -jax.nn.log_sigmoid(chosen_B - rejected_B)
  return jnp.sum(losses_B), jnp.asarray(losses_B.shape[0], jnp.float32)


def reward_model_step(reward_fn: Callable, tx: optax.GradientTransformation):
  """Returns step(state, chosen rows, rejected rows) -> (state, metrics).

  Args:
    reward_fn: (params, tokens_BT, segment_ids_BT) -> reward_B.
    tx: the optimizer.
  """

  def step(state: TrainState, chosen: Rows, rejected: Rows) -> tuple[TrainState, Metrics]:
    def loss_fn(params):
      both = (jnp.concatenate(pair) for pair in zip(chosen, rejected, strict=True))
      chosen_B, rejected_B = jnp.split(reward_fn(params, *both), 2)
      total, count = bradley_terry_loss(chosen_B, rejected_B)
      return total / count, jnp.mean((chosen_B > rejected_B).astype(jnp.float32))

    (value, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, metrics = apply_gradients(state, tx, grads, value)
    return state, metrics | {"loss/reward_model": value, "pairs/accuracy": accuracy}

  return step
