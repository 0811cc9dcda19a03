"""The step of supervised fine-tuning: next-token loss on the assistant's tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nemocascade.errors import UserError
from nemocascade.segments import masked_sum
from nemocascade.step.balance import AddToBias, RouterBalance, routing_metrics
from nemocascade.step.loss import sft_loss
from nemocascade.step.update import apply_gradients
from nemocascade.types import Array, Batch, Metrics, ScoreFn, TrainState


def sum_over_parts(fn: Callable, parts, accumulate: int, *, worth: Callable | None = None):
  """Applies `fn` to `accumulate` equal pieces of `parts`, one after another; returns (sum, stack).

  A scan runs the pieces, so that only one piece's activations exist at a time. A piece is every
  `accumulate`-th row, so that rows sharded over devices stay on their devices.

  Args:
    fn: piece -> (summed, listed); `summed` is added up and `listed` is stacked over the pieces.
    parts: a tree of arrays with equal first axes.
    worth: piece -> scalar bool; pieces for which it is false are skipped and count as zeros.

  Raises:
    UserError: `accumulate` does not divide the rows.
  """
  B = jax.tree.leaves(parts)[0].shape[0]
  if B % accumulate:
    raise UserError(f"accumulate={accumulate} does not divide the {B} rows of a batch")
  if accumulate == 1:
    summed, listed = fn(parts)
    return summed, jax.tree.map(lambda a: a[None], listed)
  cut = lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731
  parts, fn = jax.tree.map(cut, parts), jax.jit(fn)  # The jit keeps eval_shape from tracing a second time.
  shapes = jax.eval_shape(fn, jax.tree.map(lambda a: a[0], parts))
  zero, nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, piece):
    summed, listed = fn(piece)
    return jax.tree.map(jnp.add, total, summed), listed

  def add_if_worth(total, piece):
    return jax.lax.cond(worth(piece), add, lambda total, _: (total, nothing), total, piece)

  return jax.lax.scan(add_if_worth if worth else add, zero, parts)


def real_tokens(segment_ids_BT: Array) -> jax.Array:
  """The number of tokens that are not padding; fp32 scalar."""
  return jnp.sum(segment_ids_BT > 0, dtype=jnp.float32)


def sft_step(
  score_fn: ScoreFn,
  tx: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  balance: RouterBalance = RouterBalance(),  # noqa: B008 (frozen)
  add_to_bias: AddToBias | None = None,
  z_loss: float = 0.0,
):
  """Returns step(state, Batch) -> (state, metrics), which is pure and can be jitted.

  Args:
    accumulate: the rows are processed in this many pieces; the result equals that of one piece.
    balance: the load balancing of the routers.
    add_to_bias: needed if `balance` moves the routers' bias.
    z_loss: weight of the mean squared log normalizer, which keeps logits small (PaLM, arXiv 2204.02311).
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    count, real = jnp.sum(batch.loss_mask_BT, dtype=jnp.float32), real_tokens(batch.segment_ids_BT)

    def part(piece: Batch):
      def loss_fn(params):
        scores = score_fn(params, piece.tokens_BT, piece.segment_ids_BT, piece.loss_mask_BT)
        total, _ = sft_loss(scores.logprobs_BT, piece.loss_mask_BT)
        loss = total + balance.loss(scores.routing, count / jnp.maximum(real, 1.0))
        z, _ = masked_sum(jnp.square(scores.normalizer_BT), piece.loss_mask_BT) if z_loss else (jnp.float32(0), 0)
        return loss + z_loss * z, (total, z, scores.routing)

      (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
      return (aux, grads), ()

    ((total, z, routing), grads), _ = sum_over_parts(part, batch, accumulate)
    learned = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / learned.astype(g.dtype), grads)
    move = lambda params: balance.move(params, routing, add_to_bias)  # noqa: E731
    state, metrics = apply_gradients(state, tx, grads, loss := total / learned, move)
    metrics |= {"loss/sft": loss, "tokens/learned": count} | ({"loss/z": z / learned} if z_loss else {})
    return state, metrics | routing_metrics(routing, real)

  return step
