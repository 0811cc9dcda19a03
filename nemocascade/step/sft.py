"""One step of supervised fine-tuning: next-token loss on what the assistant says."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nemocascade.errors import UserError
from nemocascade.step.loss import sft_loss
from nemocascade.types import Batch, Metrics, ScoreFn, TrainState


def sum_over_parts(fn: Callable, parts, accumulate: int, *, worth: Callable | None = None):
  """The first axis of `parts` cut in `accumulate` equal pieces, taken one after another.

  `fn(piece) -> (summed, listed)`; returns the sum of the first and a stack of the second. A scan, so
  that only one piece's activations exist at a time. A piece takes every `accumulate`-th row, so
  that rows sharded over devices stay where they are. Pieces that are not `worth(piece)` are skipped
  and count as zeros.
  """
  B = jax.tree.leaves(parts)[0].shape[0]
  if B % accumulate:
    raise UserError(f"accumulate={accumulate} does not divide the {B} rows of a batch")
  if accumulate == 1:
    summed, listed = fn(parts)
    return summed, jax.tree.map(lambda a: a[None], listed)
  cut = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731
  parts, fn = jax.tree.map(cut, parts), jax.jit(fn)  # So that asking for shapes is no second trace.
  shapes = jax.eval_shape(fn, jax.tree.map(lambda a: a[0], parts))
  zero, nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, piece):
    summed, listed = fn(piece)
    return jax.tree.map(jnp.add, total, summed), listed

  def add_if_worth(total, piece):
    return jax.lax.cond(worth(piece), add, lambda total, _: (total, nothing), total, piece)

  return jax.lax.scan(add_if_worth if worth else add, zero, parts)


def apply_gradients(state: TrainState, tx: optax.GradientTransformation, grads):
  """(the next state, norms of gradient, update and parameters)."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {
    "norm/grad": optax.tree.norm(grads),
    "norm/update": optax.tree.norm(updates),
    "norm/param": optax.tree.norm(params),
  }
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def load_metrics(load_LE: jax.Array) -> Metrics:
  """The largest share of a block's tokens that one expert gets, in units of the fair share."""
  if load_LE.shape[0] == 0:
    return {}
  share_LE = load_LE / jnp.maximum(jnp.sum(load_LE, axis=1, keepdims=True), 1.0)
  return {"expert/load_max": jnp.max(share_LE) * load_LE.shape[1]}


def sft_step(score_fn: ScoreFn, tx: optax.GradientTransformation, *, accumulate: int = 1):
  """Returns step(state, Batch) -> (state, metrics), pure and ready to jit.

  `accumulate` pieces of the batch's rows one after another equal the whole batch at once.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    def part(piece: Batch):
      def loss_fn(params):
        scores = score_fn(
          params, piece.tokens_BT, piece.segment_ids_BT, piece.loss_mask_BT
        )
        total, count = sft_loss(scores.logprobs_BT, piece.loss_mask_BT)
        return total, (count, scores.expert_load_LE)

      (total, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
      return (total, aux, grads), ()

    (total, (count, load_LE), grads), _ = sum_over_parts(part, batch, accumulate)
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    state, metrics = apply_gradients(state, tx, grads)
    metrics |= {"loss/sft": total / count, "tokens/learned": count} | load_metrics(load_LE)
    return state, metrics

  return step
