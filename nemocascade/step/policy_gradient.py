"""The one policy-gradient step: GRPO, MOPD or any other advantage, in the same jitted program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nemocascade.data import packing
from nemocascade.segments import document_mean, masked_mean
from nemocascade.step import loss
from nemocascade.step.balance import AddToBias, RouterBalance, routing_metrics
from nemocascade.step.sft import apply_gradients, real_tokens, sum_over_parts
from nemocascade.types import Metrics, Params, Rollout, ScoreFn, TrainState

# name -> [B, T, ...]; each document of a row is one prompt and completion.
Rows = dict[str, jax.Array]


def to_rows(
  r: Rollout, advantages_QGT: jax.Array, aggregation: Callable = loss.token_mean
) -> tuple[Rows, jax.Array]:
  """What a rollout teaches, as [Q * G, T] rows of one document each, and the loss's count.

  Advantages and weights have seen whole groups and sequences, so rows may be packed and cut from
  here on. What multiplies a gradient is 0 where nothing is learned: a NaN that a loss only masks
  still reaches its gradient.
  """
  flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
  mask_BT = flat(r.loss_mask_QGT & r.valid_QG[..., None])
  weights_BT, count = aggregation(mask_BT)
  rows = {
    "tokens": flat(r.tokens_QGT),
    "segment_ids": flat(r.segment_ids_QGT),
    "mask": mask_BT,
    "weights": weights_BT,
    "behaviour": flat(r.behaviour_logprobs_QGT),
    "advantages": jnp.where(mask_BT, flat(jax.lax.stop_gradient(advantages_QGT)), 0.0),
  }
  if r.reference_logprobs_QGT is not None:
    rows["reference"] = flat(r.reference_logprobs_QGT)
  learned = lambda a: jnp.where(mask_BT[..., None], flat(a), 0)  # noqa: E731
  if r.teacher_states_QGTD is not None:
    rows["teacher_states"] = learned(r.teacher_states_QGTD)
    rows["teacher"] = flat(jnp.broadcast_to(r.teacher_Q[:, None, None], r.tokens_QGT.shape))
  if r.top_tokens_QGTK is not None:
    rows["top_tokens"] = learned(r.top_tokens_QGTK)
    rows["top_logprobs"] = learned(r.top_logprobs_QGTK)
  return rows, count


def rows_needed(documents: int, longest: int, T: int) -> int:
  """Rows of T tokens that surely hold so many documents of at most `longest`, best fit first."""
  return -(-documents // (T // longest))


def pack_rows(rows: Rows, *, B: int, T: int, accumulate: int = 1) -> dict[str, np.ndarray]:
  """The documents that teach something, packed into B rows of T; numbers stay what they are.

  Full rows come first in the order in which a step of `accumulate` pieces takes them, so that
  pieces without a document, which the step skips, are whole.
  """
  rows = {name: np.asarray(a) for name, a in rows.items()}
  kept = np.flatnonzero(rows["mask"].any(axis=1))
  lengths_N = (rows["segment_ids"][kept] > 0).sum(axis=1)
  packed = {name: np.zeros((B, T, *a.shape[2:]), a.dtype) for name, a in rows.items()}
  for i, documents in enumerate(packing.pack(lengths_N, capacity=T)):
    b = i % (B // accumulate) * accumulate + i // (B // accumulate)
    start = 0
    for segment, n in enumerate(documents, start=1):
      place = slice(start, start + lengths_N[n])
      for name, a in rows.items():
        packed[name][b, place] = a[kept[n], : lengths_N[n]]
      packed["segment_ids"][b, place] = segment
      start = place.stop
  return packed


def policy_gradient_step(
  score_fn: ScoreFn,
  tx: optax.GradientTransformation,
  *,
  ratio: Callable = loss.reinforce,
  correction: Callable = loss.no_correction,
  kl: Callable = loss.k3,
  kl_weight: float = 0.0,
  entropy_weight: float = 0.0,
  distillation: Callable = loss.reverse_kl,
  distillation_weight: float = 0.0,
  accumulate: int = 1,
  balance: RouterBalance = RouterBalance(),  # noqa: B008 (frozen)
  add_to_bias: AddToBias | None = None,
):
  """Returns step(state, rows, count, heads_ZDV=None) -> (state, metrics), pure and ready to jit; see to_rows.

  The proximal policy is rows["proximal"] where the batch is learned from more than once, and else
  the policy itself. The correction is of that policy against the sampler, the ratio of the policy
  against it. Clipping is judged by a token's advantage, so weights of the correction are at least 0.

  `accumulate` pieces of the rows one after another equal the whole; a piece that teaches nothing
  costs nothing. Tokens of samples that are not valid learn nothing and count nowhere, rows of which
  nothing is learned are padding to the routers' balance too. `heads_ZDV` are those of the teachers
  whose states the rows carry. `add_to_bias` is needed where `balance` moves the routers' bias.
  """

  def part(params, rows: Rows, scale: jax.Array, heads_ZDV):
    def distance(x_BTD, head_DV, wanted_BT):
      return distillation(x_BTD, head_DV, wanted_BT, rows, heads_ZDV)

    def loss_fn(params):
      scores = score_fn(
        params, rows["tokens"], rows["segment_ids"], rows["mask"], *[distance] * bool(distillation_weight)
      )
      logprobs_BT, mask_BT = scores.logprobs_BT, rows["mask"]
      # Without gradient, and the sampler's own where nothing is learned.
      own_BT = jax.lax.stop_gradient(logprobs_BT)
      proximal_BT = jnp.where(mask_BT, rows["proximal"], own_BT) if "proximal" in rows else own_BT
      gap_BT = sampler_gap(proximal_BT, rows)
      mean_of = lambda x_BT: document_mean(x_BT, mask_BT, rows["segment_ids"])  # noqa: E731
      ratios_BT = correction(jnp.exp(gap_BT), mean_of)
      a_BT = jax.lax.stop_gradient(ratios_BT * rows["advantages"])
      gain_BT, clipped_BT = ratio(logprobs_BT, proximal_BT, a_BT, mean_of)
      loss_BT = -gain_BT
      sums = {
        "policy/entropy": jnp.where(mask_BT, scores.entropy_BT, 0.0),
        "policy/sampler_kl": -gap_BT,
        "policy/sampler_error": jnp.abs(gap_BT),
        "policy/ratio_masked": mask_BT & (ratios_BT == 0),
        "policy/clipped": mask_BT & clipped_BT,
        "advantage/mean": rows["advantages"],
        "advantage/abs": jnp.abs(rows["advantages"]),
      }
      if kl_weight:
        kl_BT = reference_kl(logprobs_BT, rows, kl)
        loss_BT += kl_weight * kl_BT
        sums["policy/reference_kl"] = kl_BT
      if entropy_weight:
        loss_BT -= entropy_weight * scores.entropy_BT
      if distillation_weight:
        loss_BT += distillation_weight * scores.distance_BT
        sums["policy/teacher_kl"] = jnp.where(mask_BT, scores.distance_BT, 0.0)
      total = jnp.sum(jnp.where(mask_BT, rows["weights"] * loss_BT, 0.0), dtype=jnp.float32)
      sums = {name: jnp.sum(value_BT, dtype=jnp.float32) for name, value_BT in sums.items()}
      tokens = jnp.sum(mask_BT, dtype=jnp.float32)
      balanced = total + balance.loss(scores.routing, scale)
      return balanced, (total, tokens, sums, scores.routing, jnp.max(gap_BT))

    (_, (*sums, gap_max)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return (sums, grads), gap_max

  def step(state: TrainState, rows: Rows, count: jax.Array, heads_ZDV=None) -> tuple[TrainState, Metrics]:
    taught_B1 = jnp.any(rows["mask"], axis=1, keepdims=True)
    rows = rows | {"segment_ids": jnp.where(taught_B1, rows["segment_ids"], 0)}
    real = real_tokens(rows["segment_ids"])
    scale = count / jnp.maximum(real, 1.0)
    ((total, tokens, sums, routing), grads), gap_max = sum_over_parts(
      lambda rows: part(state.params, rows, scale, heads_ZDV), rows, accumulate,
      worth=lambda rows: jnp.any(rows["mask"]),
    )  # fmt: skip
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    state, metrics = apply_gradients(state, tx, grads)
    state = state.replace(params=balance.move(state.params, routing, add_to_bias))
    metrics |= {name: value / jnp.maximum(tokens, 1.0) for name, value in sums.items()}
    metrics |= {
      "loss/policy": total / count,
      "policy/ratio_max": jnp.exp(jnp.max(gap_max)),
      "tokens/learned": tokens,
    }
    return state, metrics | routing_metrics(routing, real)

  return step


def rollout_metrics(r: Rollout) -> Metrics:
  """Of the samples that are learned from."""
  return {
    "reward/mean": masked_mean(r.rewards_QG, r.valid_QG),
    "rollout/valid": jnp.mean(r.valid_QG, dtype=jnp.float32),
  }


def sampler_gap(proximal_BT: jax.Array, rows: Rows) -> jax.Array:
  """log(pi_train / pi_inf) of each learned token, without gradient; 0 elsewhere."""
  return jnp.where(rows["mask"], proximal_BT - rows["behaviour"], 0.0)


def reference_kl(logprobs_BT: jax.Array, rows: Rows, kl: Callable) -> jax.Array:
  """KL to the reference of each learned token, 0 elsewhere."""
  there_BT = jnp.where(rows["mask"], rows["reference"], jax.lax.stop_gradient(logprobs_BT))
  return jnp.where(rows["mask"], kl(logprobs_BT, there_BT), 0.0)


def proximal_logprobs(score_fn: ScoreFn, params: Params, rows: Rows, accumulate: int) -> jax.Array:
  """logprobs_BT of the learned tokens under the policy before its first update of this batch."""

  def part(piece: Rows):
    return (), score_fn(params, piece["tokens"], piece["segment_ids"], piece["mask"]).logprobs_BT

  _, logprobs = sum_over_parts(part, rows, accumulate)
  return logprobs.swapaxes(0, 1).reshape(rows["tokens"].shape)
