"""Applies gradients to a training state. All steps use it; an update that is not finite is not applied."""

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
  """Returns (next state, metrics): the norms of gradient, update and parameters, and SKIPPED (0 or 1).

  The update is skipped if the loss or one of these norms is not finite; the parameters' norm is the one after
  the update. Then parameters and optimizer state stay bitwise the same. `step` still advances, so that the
  order of the data and the numbers of checkpoints stay defined.

  Norms are square roots of sums of squares in fp32, so finite entries above about 1e19 are skipped too.
  The norms in the metrics are those of the attempted update, so they show what was not finite.
  Finite but useless parameters are not detected here; the next step's loss or gradient shows them.

  Args:
    tx: the optimizer.
    grads: a tree like state.params.
    loss: the batch's loss, a scalar.
    move: changes the parameters after the optimizer (the routers' bias); a skipped update undoes it too.
  """

  def attempt(grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return updates, opt_state, move(optax.apply_updates(params, updates))

  # The update is computed twice. The first pass finds out whether all of it is finite; keeping its result until
  # then would cost a second copy of parameters and moments. The barrier keeps XLA from merging both passes.
  updates, _, params = attempt(*jax.lax.optimization_barrier((grads, state.opt_state, state.params)))
  metrics = {
    "norm/grad": norm(grads),
    "norm/update": norm(updates),
    "norm/param": norm(params),
  }
  finite = jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(x, jnp.float32) for x in (loss, *metrics.values())])))
  _, opt_state, again = attempt(grads, state.opt_state, state.params)
  # A CPU has memory for the parameters of the first pass. Then only the moments' own updates read the old moments in
  # the second pass, and XLA updates them in place instead of copying them before.
  params = jax.lax.platform_dependent(params, again, cpu=lambda first, _: first, default=lambda _, second: second)
  keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
  params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
  metrics[SKIPPED] = 1.0 - finite.astype(jnp.float32)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics
