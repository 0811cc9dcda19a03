"""The one policy-gradient step: GRPO, MOPD or any other advantage, in the same jitted program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nemocascade.segments import document_mean, masked_mean
from nemocascade.step import loss
from nemocascade.step.balance import AddToBias, RouterBalance, routing_metrics
from nemocascade.step.rows import Rows
from nemocascade.step.sft import real_tokens, sum_over_parts
from nemocascade.step.update import apply_gradients
from nemocascade.types import Metrics, Params, Prompts, Rollout, ScoreFn, TakeInFn, TrainState


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
  take_in_fn: TakeInFn | None = None,
):
  """Returns step(state, rows, count, heads_ZDV=None, prompts=None, temperature=1.0) -> (state, metrics).

  Pure and ready to jit.

  Rows and count are those of rows.to_rows, packed or not. `temperature`, a scalar, is what the rows were
  sampled at: the policy's distribution is softmax(logits / temperature) wherever the loss reads it.

  The proximal policy is rows["proximal"] where the batch is learned from more than once, and else
  the policy itself. The correction is of that policy against the sampler and, where rows have "drawn",
  against the nucleus that it drew from; the ratio is of the policy against the proximal one. Clipping is judged by a token's advantage, so weights of the correction are at least 0.

  `accumulate` pieces of the rows one after another equal the whole; a piece that teaches nothing
  costs nothing. Tokens of samples that are not valid learn nothing and count nowhere, rows of which
  nothing is learned are padding to the routers' balance too. `heads_ZDV` are those of the teachers
  whose states the rows carry. `add_to_bias` is needed where `balance` moves the routers' bias.

  With `prompts` (rows.after_prompts) each is taken in once, by `take_in_fn`, and so is its gradient: pieces
  are of the samples of every prompt, and add up what they say of it. The balance's loss, whose documents
  would lie in two parts, must then be without weight.
  """

  def part(params, after, rows: Rows, scale: jax.Array, heads_ZDV, temperature):
    """`after`: None, or (Prefix, length_Q) of the prompts; gradients are of the parameters and of the prefix."""
    prefix, length_Q = after or (None, None)
    # In fp32 while the pieces add theirs.
    prefix_32 = jax.tree.map(lambda a: a.astype(jnp.float32), prefix)

    def distance(x_BTD, head_DV, wanted_BT):
      return distillation(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature)

    def loss_fn(params, prefix_32):
      own = jax.tree.map(lambda a, like: a.astype(like.dtype), prefix_32, prefix)
      scores = score_fn(
        params, rows["tokens"], rows["segment_ids"], rows["mask"], *[distance] * bool(distillation_weight),
        **({"after": (own, length_Q)} if after else {}), temperature=temperature,
      )  # fmt: skip
      logprobs_BT, mask_BT = scores.logprobs_BT, rows["mask"]
      # Without gradient, and the sampler's own where nothing is learned.
      own_BT = jax.lax.stop_gradient(logprobs_BT)
      proximal_BT = jnp.where(mask_BT, rows["proximal"], own_BT) if "proximal" in rows else own_BT
      gap_BT = sampler_gap(proximal_BT, rows, "behaviour")
      drawn_gap_BT = sampler_gap(proximal_BT, rows, "drawn") if "drawn" in rows else gap_BT
      mean_of = lambda x_BT: document_mean(x_BT, mask_BT, rows["segment_ids"])  # noqa: E731
      ratios_BT = correction(gap_BT, drawn_gap_BT, mean_of)
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

    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (_, (*sums, gap_max)), grads = grad_fn(params, prefix_32)
    return (sums, *grads), gap_max

  def step(
    state: TrainState, rows: Rows, count: jax.Array, heads_ZDV=None, prompts: Prompts | None = None,
    temperature: float | jax.Array = 1.0,
  ) -> tuple[TrainState, Metrics]:  # fmt: skip
    taught_B1 = jnp.any(rows["mask"], axis=1, keepdims=True)
    rows = rows | {"segment_ids": jnp.where(taught_B1, rows["segment_ids"], 0)}
    real, after = real_tokens(rows["segment_ids"]), None
    if prompts is not None:
      after, pull, of_prompts = _take_in(take_in_fn, state.params, prompts)
      real += jnp.sum(after[1], dtype=jnp.float32)
    scale = count / jnp.maximum(real, 1.0)
    ((total, tokens, sums, routing), grads, dprefix), gap_max = sum_over_parts(
      lambda rows: part(state.params, after, rows, scale, heads_ZDV, temperature), rows, accumulate,
      worth=lambda rows: jnp.any(rows["mask"]),
    )  # fmt: skip
    if prompts is not None:
      grads = jax.tree.map(jnp.add, grads, pull(dprefix))
      routing = jax.tree.map(jnp.add, routing, of_prompts)
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    move = lambda params: balance.move(params, routing, add_to_bias)  # noqa: E731
    state, metrics = apply_gradients(state, tx, grads, mean := total / count, move)
    metrics |= {name: value / jnp.maximum(tokens, 1.0) for name, value in sums.items()}
    metrics |= {
      "loss/policy": mean,
      "policy/ratio_max": loss.bounded_exp(jnp.max(gap_max)),
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


def sampler_gap(proximal_BT: jax.Array, rows: Rows, name: str) -> jax.Array:
  """log pi_train of each learned token less the sampler's rows[name], without gradient; 0 elsewhere."""
  return jnp.where(rows["mask"], proximal_BT - rows[name], 0.0)


def reference_kl(logprobs_BT: jax.Array, rows: Rows, kl: Callable) -> jax.Array:
  """KL to the reference of each learned token, 0 elsewhere."""
  there_BT = jnp.where(rows["mask"], rows["reference"], jax.lax.stop_gradient(logprobs_BT))
  return jnp.where(rows["mask"], kl(logprobs_BT, there_BT), 0.0)


def _take_in(take_in_fn: TakeInFn, params: Params, prompts: Prompts):
  """((Prefix, length_Q), pull: the prefix's gradient in fp32 -> the parameters', Routing or None)."""
  prefix, pull, routing = jax.vjp(lambda params: take_in_fn(params, prompts), params, has_aux=True)

  def pull_32(dprefix):
    return pull(jax.tree.map(lambda d, like: d.astype(like.dtype), dprefix, prefix))[0]

  return (prefix, prompts.length_Q), pull_32, routing


def proximal_logprobs(
  score_fn: ScoreFn, params: Params, rows: Rows, prompts: Prompts | None = None,
  temperature: float | jax.Array = 1.0, *, accumulate: int, take_in_fn: TakeInFn | None = None,
) -> jax.Array:  # fmt: skip
  """logprobs_BT of the learned tokens under the policy before its first update of this batch."""
  how = {"temperature": temperature}
  if prompts is not None:
    how["after"] = (take_in_fn(params, prompts)[0], prompts.length_Q)

  def part(piece: Rows):
    return (), score_fn(params, piece["tokens"], piece["segment_ids"], piece["mask"], **how).logprobs_BT

  _, logprobs = sum_over_parts(part, rows, accumulate)
  return logprobs.swapaxes(0, 1).reshape(rows["tokens"].shape)
