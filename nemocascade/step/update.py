"""The one place where a gradient changes a state, or does not: updates that are not finite are refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nemocascade.step.optimizer import norm
from nemocascade.types import Metrics, Params, TrainState

SKIPPED = "step/skipped_nonfinite"


def apply_gradients(
  state: TrainState,
  tx: optax.GradientTransformation,
  grads: Params,
  loss: jax.Array,
  move: Callable[[Params], Params] = lambda params: params,
) -> tuple[TrainState, Metrics]:
  """(the next state, norms of gradient, update and parameters, and whether the update was refused).

  The update is refused where the loss, or the norm of the gradient, of the update or of the parameters
  after it, is not finite. Then parameters, moments and the optimizer's own counts keep every bit; only
  `step` counts on, so that the data's order and the number of a checkpoint stay defined. Norms are sums
  of squares in fp32: entries beyond about 1e19, finite by themselves, are refused too.
  The norms and the loss are those of the attempt, so that they show what was not finite. A loss of
  finite but absurd parameters is not recognised here: the next loss or gradient is.

  Args:
    loss: the batch's loss, a scalar.
    move: what changes parameters after the optimizer (the routers' bias); undone with the rest.
  """
  def attempt(grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return updates, opt_state, move(optax.apply_updates(params, updates))

  # Computed twice, with a barrier before the first: whether to keep it is known only when all of it is
  # there, and holding it until then would cost a second copy of parameters and moments.
  updates, _, params = attempt(*jax.lax.optimization_barrier((grads, state.opt_state, state.params)))
  metrics = {
    "norm/grad": norm(grads),
    "norm/update": norm(updates),
    "norm/param": norm(params),
  }
  finite = jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(x, jnp.float32) for x in (loss, *metrics.values())])))
  _, opt_state, params = attempt(grads, state.opt_state, state.params)
  keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
  params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
  metrics[SKIPPED] = 1.0 - finite.astype(jnp.float32)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics
