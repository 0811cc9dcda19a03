"""The policy-gradient step, one program for GRPO, MOPD and all other advantages."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nemocascade.segments import document_mean, masked_mean
from nemocascade.step import loss, mismatch
from nemocascade.step.balance import AddToBias, RouterBalance, routing_metrics
from nemocascade.step.rows import Rows
from nemocascade.step.sft import real_tokens, sum_over_parts
from nemocascade.step.update import apply_gradients
from nemocascade.types import Metrics, Params, Prompts, Rollout, ScoreFn, Scores, TakeInFn, TrainState


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """The loss of rows under the policy.

  The proximal policy is the one before the first update of a batch. Its log-probabilities are rows["proximal"]
  if the batch is used for several updates; otherwise it is the current policy. The correction compares the
  proximal policy with the sampler, and with the sampler's nucleus if rows have "drawn". The ratio compares the
  current policy with the proximal one. The sign of the advantage decides which side is clipped, so a
  correction's weights must be at least 0.

  Attributes:
    score_fn: scores the rows under the policy.
    ratio, correction, kl, distillation: functions of step/loss.py, see there.
    kl_weight: factor of the KL to rows["reference"].
    entropy_weight: factor of the entropy bonus.
    distillation_weight: factor of the distance from the teachers.
    balance: the load balancing of the routers. With shared prompts its loss must have weight 0, because documents
      are then split into prompt and completion.
  """

  score_fn: ScoreFn
  ratio: Callable = loss.reinforce
  correction: Callable = loss.no_correction
  kl: Callable = loss.k3
  kl_weight: float = 0.0
  entropy_weight: float = 0.0
  distillation: Callable = loss.reverse_kl
  distillation_weight: float = 0.0
  balance: RouterBalance = RouterBalance()  # noqa: RUF009 (frozen)

  def gradients(self, params: Params, after, rows: Rows, scale: jax.Array, heads_ZDV, temperature):
    """Loss sums and gradients of one piece of the rows.

    Args:
      after: (Prefix, length_Q) of the prompts, or None.
      scale: factor of the balance loss.

    Returns:
      (((total, sums, mismatch.sums, Routing), gradient of the parameters, gradient of the prefix), the largest
      sampler gap and the largest of its absolute values)
    """
    prefix, length_Q = after or (None, None)
    # The prefix is fp32 here, so that its gradient is summed over the pieces in fp32.
    prefix_32 = jax.tree.map(lambda a: a.astype(jnp.float32), prefix)

    def loss_fn(params, prefix_32):
      own = jax.tree.map(lambda a, like: a.astype(like.dtype), prefix_32, prefix)
      scores = self._scores(params, (own, length_Q) if after else None, rows, heads_ZDV, temperature)
      mask_BT = rows["mask"]
      loss_BT, gap_BT, sums = self._terms(scores, rows)
      total = jnp.sum(jnp.where(mask_BT, rows["weights"] * loss_BT, 0.0), dtype=jnp.float32)
      sums = {name: jnp.sum(value_BT, dtype=jnp.float32) for name, value_BT in sums.items()}
      off = mismatch.sums(gap_BT, mask_BT, rows["segment_ids"])
      balanced = total + self.balance.loss(scores.routing, scale)
      return balanced, (total, sums, off, scores.routing, (jnp.max(gap_BT), jnp.max(jnp.abs(gap_BT))))

    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (_, (*sums, largest)), grads = grad_fn(params, prefix_32)
    return (sums, *grads), largest

  def _scores(self, params: Params, after, rows: Rows, heads_ZDV, temperature) -> Scores:
    def distance(x_BTD, head_DV, wanted_BT, on_own):
      T, padded = rows["tokens"].shape[1], x_BTD.shape[1]
      pad = lambda a: jnp.pad(a, ((0, 0), (0, padded - T)) + ((0, 0),) * (a.ndim - 2))
      distillation = on_own(self.distillation, shared=[1, 4, 5])
      here = x_BTD, head_DV, wanted_BT, jax.tree.map(pad, rows)
      return distillation(*here, heads_ZDV, jnp.float32(temperature))[:, :T]

    return self.score_fn(
      params, rows["tokens"], rows["segment_ids"], rows["mask"], *[distance] * bool(self.distillation_weight),
      **({"after": after} if after else {}), temperature=temperature, **_recorded(rows),
    )  # fmt: skip

  def _terms(self, scores: Scores, rows: Rows) -> tuple[jax.Array, jax.Array, Metrics]:
    """(loss_BT, sampler gap_BT, metrics by token) of all terms; the loss counts on learned tokens only."""
    logprobs_BT, mask_BT = scores.logprobs_BT, rows["mask"]
    # Without gradient. Where nothing is learned the policy's own values are used.
    own_BT = jax.lax.stop_gradient(logprobs_BT)
    proximal_BT = jnp.where(mask_BT, rows["proximal"], own_BT) if "proximal" in rows else own_BT
    gap_BT = sampler_gap(proximal_BT, rows, "behaviour")
    drawn_gap_BT = sampler_gap(proximal_BT, rows, "drawn") if "drawn" in rows else gap_BT
    mean_of = lambda x_BT: document_mean(x_BT, mask_BT, rows["segment_ids"])
    ratios_BT = self.correction(gap_BT, drawn_gap_BT, mean_of)
    a_BT = jax.lax.stop_gradient(ratios_BT * rows["advantages"])
    gain_BT, clipped_BT = self.ratio(logprobs_BT, proximal_BT, a_BT, mean_of)
    loss_BT = -gain_BT
    sums = {
      "policy/entropy": jnp.where(mask_BT, scores.entropy_BT, 0.0),
      "policy/ratio_masked": mask_BT & (ratios_BT == 0),
      "policy/clipped": mask_BT & clipped_BT,
      "advantage/mean": rows["advantages"],
      "advantage/abs": jnp.abs(rows["advantages"]),
    }
    if self.kl_weight:
      kl_BT = reference_kl(logprobs_BT, rows, self.kl)
      loss_BT += self.kl_weight * kl_BT
      sums["policy/reference_kl"] = kl_BT
    if self.entropy_weight:
      loss_BT -= self.entropy_weight * scores.entropy_BT
    if self.distillation_weight:
      assert scores.distance_BT is not None  # `distance` computes it.
      loss_BT += self.distillation_weight * scores.distance_BT
      sums["policy/teacher_kl"] = jnp.where(mask_BT, scores.distance_BT, 0.0)
    return loss_BT, gap_BT, sums


def policy_gradient_step(
  score_fn: ScoreFn, tx: optax.GradientTransformation, *, accumulate: int = 1, add_to_bias: AddToBias | None = None,
  take_in_fn: TakeInFn | None = None, **settings: Any,
):  # fmt: skip
  """Returns step(state, rows, count, heads_ZDV=None, prompts=None, temperature=1.0) -> (state, metrics).

  The step is pure and can be jitted.

  Tokens of invalid samples do not contribute to any sum or count. Rows without a learned token are treated as
  padding, for load balancing too.

  Args:
    score_fn: scores the rows under the policy.
    tx: the optimizer.
    accumulate: the rows are processed in this many pieces, one after another; the result equals that of one
      piece. A piece without a learned token is skipped.
    add_to_bias: needed if the load balancing moves the routers' bias.
    take_in_fn: prefills the prompts; needed with `prompts`.
    settings: fields of PolicyLoss.

  Args of step:
    rows, count: those of rows.to_rows, packed or not.
    heads_ZDV: the heads of the teachers whose states are in the rows; each device may hold a part of their D.
    prompts: those of rows.after_prompts. Each prompt's forward and backward pass runs once for all its
      completions. Each piece of the rows then has completions of every prompt.
    temperature: the sampling temperature of the rows, a scalar. The loss uses softmax(logits / temperature).
  """
  policy_loss = PolicyLoss(score_fn, **settings)

  def step(
    state: TrainState, rows: Rows, count: jax.Array, heads_ZDV=None, prompts: Prompts | None = None,
    temperature: float | jax.Array = 1.0,
  ) -> tuple[TrainState, Metrics]:  # fmt: skip
    part = lambda after, rows, scale: policy_loss.gradients(state.params, after, rows, scale, heads_ZDV, temperature)
    take_in = None if prompts is None else functools.partial(_take_in, _given(take_in_fn), state.params, prompts)
    (total, sums, off, routing), grads, largest, real = _sum_gradients(part, rows, count, accumulate, take_in)
    gap_max, error_max = map(jnp.max, largest)
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    move = lambda params: policy_loss.balance.move(params, routing, add_to_bias)
    state, metrics = apply_gradients(state, tx, grads, mean := total / count, move)
    metrics |= {name: value / jnp.maximum(off["tokens"], 1.0) for name, value in sums.items()}
    metrics |= {
      "loss/policy": mean,
      "policy/ratio_max": loss.bounded_exp(gap_max),
      "tokens/learned": off["tokens"],
    }
    return state, metrics | mismatch.metrics(off, error_max, routing) | routing_metrics(routing, real)

  return step


def _sum_gradients(part: Callable, rows: Rows, count: jax.Array, accumulate: int, take_in: Callable | None):
  """Sums the gradients over the pieces of the rows, and adds those through the shared prompts.

  Args:
    part: (after, piece of the rows, scale) -> the result of PolicyLoss.gradients.
    take_in: () -> the result of `_take_in`; None without shared prompts.

  Returns:
    ((total, sums, mismatch.sums, Routing), gradient of the parameters, largest sampler gap and error of each piece,
    real tokens)
  """
  taught_B1 = jnp.any(rows["mask"], axis=1, keepdims=True)
  rows = rows | {"segment_ids": jnp.where(taught_B1, rows["segment_ids"], 0)}
  real, after = real_tokens(rows["segment_ids"]), None
  if take_in is not None:
    after, pull, of_prompts = take_in()
    real += jnp.sum(after[1], dtype=jnp.float32)
  scale = count / jnp.maximum(real, 1.0)
  ((*sums, routing), grads, dprefix), largest = sum_over_parts(
    lambda rows: part(after, rows, scale), rows, accumulate, worth=lambda rows: jnp.any(rows["mask"])
  )
  if take_in is not None:
    grads = jax.tree.map(jnp.add, grads, pull(dprefix))
    routing = jax.tree.map(jnp.add, routing, of_prompts)
  return (*sums, routing), grads, largest, real


def rollout_metrics(r: Rollout) -> Metrics:
  """The mean reward of the valid samples and the share of samples that are valid."""
  return {
    "reward/mean": masked_mean(r.rewards_QG, r.valid_QG),
    "rollout/valid": jnp.mean(r.valid_QG, dtype=jnp.float32),
  }


def _recorded(rows: Rows) -> dict[str, jax.Array]:
  """The argument `experts` of a ScoreFn, if the sampler recorded them."""
  return {"experts": rows["experts"]} if "experts" in rows else {}


def sampler_gap(proximal_BT: jax.Array, rows: Rows, name: str) -> jax.Array:
  """proximal_BT less the sampler's log-probabilities rows[name], in nats, on learned tokens; 0 elsewhere."""
  return jnp.where(rows["mask"], proximal_BT - rows[name], 0.0)


def reference_kl(logprobs_BT: jax.Array, rows: Rows, kl: Callable) -> jax.Array:
  """The estimated KL to the reference, in nats, on each learned token; 0 elsewhere."""
  there_BT = jnp.where(rows["mask"], rows["reference"], jax.lax.stop_gradient(logprobs_BT))
  return jnp.where(rows["mask"], kl(logprobs_BT, there_BT), 0.0)


def _given(take_in_fn: TakeInFn | None) -> TakeInFn:
  if take_in_fn is None:
    raise ValueError("take_in_fn is None, and the rows continue prompts: give the function that prefills them")
  return take_in_fn


def _take_in(take_in_fn: TakeInFn, params: Params, prompts: Prompts):
  """Prefills the prompts: ((Prefix, length_Q), pull, Routing or None).

  `pull` maps the prefix's gradient, fp32, to the parameters' gradient.
  """
  prefix, pull, routing = jax.vjp(lambda params: take_in_fn(params, prompts), params, has_aux=True)

  def pull_32(dprefix):
    return pull(jax.tree.map(lambda d, like: d.astype(like.dtype), dprefix, prefix))[0]

  return (prefix, prompts.length_Q), pull_32, routing


def proximal_logprobs(
  score_fn: ScoreFn, params: Params, rows: Rows, prompts: Prompts | None = None,
  temperature: float | jax.Array = 1.0, *, accumulate: int, take_in_fn: TakeInFn | None = None,
) -> jax.Array:  # fmt: skip
  """logprobs_BT of the learned tokens under the proximal policy: call it before the first update of a batch.

  The arguments are those of policy_gradient_step and of its step.
  """
  how: dict[str, Any] = {"temperature": temperature}
  if prompts is not None:
    how["after"] = (_given(take_in_fn)(params, prompts)[0], prompts.length_Q)

  def part(piece: Rows):
    read = piece["tokens"], piece["segment_ids"], piece["mask"]
    return (), score_fn(params, *read, **how, **_recorded(piece)).logprobs_BT

  _, logprobs = sum_over_parts(part, rows, accumulate)
  return logprobs.swapaxes(0, 1).reshape(rows["tokens"].shape)
