"""Losses as (sum, count), and the slots of the policy-gradient loss.

A slot is a function; a dict below names its choices for a config. Every loss returns a sum and a
count, and the division happens once, over the global batch. What a slot needs to know of whole
completions it asks of `mean_of`, x_BT -> the mean over the learned tokens of each one's completion.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.kernels.distillation import forward_kl_ref, kl_to_states, kl_to_top, reverse_kl_ref
from nemocascade.segments import masked_sum


def sft_loss(logprobs_BT: jax.Array, loss_mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Minus log-probability of the learned tokens: (sum in nats, tokens)."""
  return masked_sum(-logprobs_BT, loss_mask_BT)


# Aggregation: which tokens of independent rows are learned -> (weights_BT, count), both fp32; the
# loss is the weighted sum of per-token losses over the count. Fixed before rows are packed or cut.


def token_mean(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Every token of the batch weighs the same (paper.md 4.1)."""
  weights_BT = mask_BT.astype(jnp.float32)
  return weights_BT, jnp.sum(weights_BT)


def sequence_mean(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean over a sequence's tokens, then over sequences (paper.md 5.1); empty ones do not count."""
  tokens_B1 = jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.float32)
  weights_BT = jnp.where(mask_BT, 1.0 / jnp.maximum(tokens_B1, 1.0), 0.0)
  return weights_BT, jnp.sum(tokens_B1 > 0, dtype=jnp.float32)


def constant_length(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sum over a sequence's tokens by the most there can be, T (Dr. GRPO, arXiv 2503.20783, 3.2).

  Then the mean over sequences. Long answers are not discounted; empty ones do not count.
  """
  weights_BT = mask_BT.astype(jnp.float32) / mask_BT.shape[1]
  return weights_BT, jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


AGGREGATIONS = dict(token_mean=token_mean, sequence_mean=sequence_mean, constant_length=constant_length)


EXPONENT = 20.0  # e^20 = 4.9e8: a policy that is still any good has no ratio near it.


def bounded_exp(x: jax.Array) -> jax.Array:
  """exp(x) up to x = 20, and from there on its tangent: finite in value and slope for any finite x.

  The tangent and not a constant: a constant has no slope, and a k3 whose exponential stopped sloping
  would push the policy away from its reference.
  """
  top = jnp.exp(jnp.float32(EXPONENT))
  return jnp.exp(jnp.minimum(x, EXPONENT)) + top * jnp.maximum(x - EXPONENT, 0.0)


# Correction: (log pi_train - log pi_inf, log pi_train - log mu) of a token -> its weight, at least 0.
# pi_inf is the sampler's softmax(logits / temperature), mu what it drew from: pi_inf cut to its nucleus
# and renormalised, the same at top_p = 1. The first gap tells how far the two programs are apart and
# decides what is masked; the second is the importance weight of a token that was drawn from mu.

MeanOf = Callable[[jax.Array], jax.Array]


def no_correction(gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf) -> jax.Array:
  """The sampler is taken at its word."""
  del drawn_gap_BT, mean_of
  return jnp.ones_like(gap_BT)


def tis(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.0, high: float = 2.0
) -> jax.Array:
  """pi_train / mu clamped to [low, high]: truncated importance sampling (Yao et al., 2025; paper.md 5.4)."""
  del gap_BT, mean_of
  return jnp.clip(bounded_exp(drawn_gap_BT), low, high)


def icepop(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.5, high: float = 2.0
) -> jax.Array:
  """pi_train / mu where pi_train / pi_inf lies in [low, high], else 0 (paper.md 5.1, eq. 3): no clamp.

  Such tokens still count in the normaliser, as the equation is printed.
  """
  del mean_of
  ratio_BT = bounded_exp(gap_BT)
  return jnp.where((ratio_BT >= low) & (ratio_BT <= high), bounded_exp(drawn_gap_BT), 0.0)


def sequence_mask(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.999, high: float = 1.002
) -> jax.Array:
  """pi_train / mu, or 0 for a completion whose geometric mean of pi_train / pi_inf is outside (paper.md 5.4)."""
  mean_BT = bounded_exp(mean_of(gap_BT))
  return jnp.where((mean_BT >= low) & (mean_BT <= high), bounded_exp(drawn_gap_BT), 0.0)


CORRECTIONS = dict(none=no_correction, tis=tis, icepop=icepop, sequence_mask=sequence_mask)


# Ratio form: how a step that has moved from the proximal policy weighs what it learns ->
# (gain_BT, clipped_BT): what to climb, and bool where the form holds the token back. `a` is the
# advantage times the correction's weight, without gradient. At the proximal policy itself, which is
# where the only update of a batch is made, all forms have the gradient of a * log pi.


def reinforce(logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf):
  """a * log pi, with no ratio (paper.md 5.1, eq. 4)."""
  del proximal_BT, mean_of
  return a_BT * logprobs_BT, jnp.zeros(a_BT.shape, bool)


def token_clip(
  logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 0.2, high: float = 0.28
):
  """min(r a, clip(r, 1 - low, 1 + high) a) (PPO, arXiv 1707.06347, eq. 7; two bounds: DAPO, 2503.14476)."""
  del mean_of
  return _clipped(bounded_exp(logprobs_BT - proximal_BT), a_BT, low, high)


def dual_clip(
  logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 0.2, high: float = 0.28, cap: float = 3.0
):
  """`token_clip`, and at least cap * a where a < 0 (Ye et al., 2020, arXiv 1912.09729, eq. 5)."""
  gain_BT, clipped_BT = token_clip(logprobs_BT, proximal_BT, a_BT, mean_of, low=low, high=high)
  capped_BT = (a_BT < 0) & (gain_BT < cap * a_BT)
  return jnp.where(capped_BT, cap * a_BT, gain_BT), clipped_BT | capped_BT


def gspo(
  logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 3e-4, high: float = 4e-4
):
  """`token_clip` of the completion's ratio exp(mean log r) (Zheng et al., 2025, arXiv 2507.18071).

  The form of its eq. 13 and 14, GSPO-token: the ratio is the completion's in value, and each token
  has its own gradient, so that advantages may differ from token to token.
  """
  sequence_BT = jax.lax.stop_gradient(mean_of(logprobs_BT - proximal_BT))
  ratio_BT = bounded_exp(sequence_BT + (logprobs_BT - jax.lax.stop_gradient(logprobs_BT)))
  return _clipped(ratio_BT, a_BT, low, high)


def cispo(
  logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 1.0, high: float = 0.28
):
  """clip(r) a log pi with no gradient through r (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

  The clip bounds a token's weight and drops none. With low = 1 there is no lower bound.
  """
  del mean_of
  ratio_BT = jax.lax.stop_gradient(bounded_exp(logprobs_BT - proximal_BT))
  bounded_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
  return bounded_BT * a_BT * logprobs_BT, ratio_BT != bounded_BT


def _clipped(ratio_BT, a_BT, low: float, high: float):
  bounded_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
  free_BT, held_BT = ratio_BT * a_BT, bounded_BT * a_BT
  return jnp.minimum(free_BT, held_BT), held_BT < free_BT


RATIOS = dict(none=reinforce, token_clip=token_clip, dual_clip=dual_clip, gspo=gspo, cispo=cispo)


# KL(policy || reference) of a token that the policy sampled, estimated (Schulman, 2020). As a term
# of the loss the gradient of k2 is, on policy, that of the KL; of k3 that of the KL the other way
# round; that of k1 is 0 in expectation, so it serves to be watched.


def k1(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """log pi - log ref: no bias, much variance, either sign."""
  return logprobs_BT - reference_BT


def k2(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """Half of k1 squared: a little bias, never negative."""
  return 0.5 * jnp.square(logprobs_BT - reference_BT)


def k3(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """No bias, and never negative."""
  gap_BT = reference_BT - logprobs_BT
  return bounded_exp(gap_BT) - gap_BT - 1.0


KLS = dict(k1=k1, k2=k2, k3=k3)


# Distillation: how far the policy is from its teacher at each learned token, over all that could
# have stood there and not just what was sampled -> kl_BT, nats. `x_BTD` and `head_DV` are what the
# policy predicts tokens from and with; rows carry what the teacher sent. Both distributions are
# softmax(logits / temperature), as those that are sampled from. The gradient is that of this distance
# at the states the policy visited, held fixed, and exact where `mopd`'s is one sample.


def reverse_kl(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature):
  """KL(policy || teacher): its gradient is what `mopd`'s is in expectation (MiniLLM, arXiv 2306.08543)."""
  sent = rows["teacher_states"], rows["teacher"], heads_ZDV
  return kl_to_states(reverse_kl_ref, x_BTD, head_DV, wanted_BT, *sent, temperature)


def forward_kl(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature):
  """KL(teacher || policy): covers all that the teacher might say (GKD, arXiv 2306.13649, on policy)."""
  sent = rows["teacher_states"], rows["teacher"], heads_ZDV
  return kl_to_states(forward_kl_ref, x_BTD, head_DV, wanted_BT, *sent, temperature)


def reverse_kl_topk(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature, *, k: int = 16):
  """`reverse_kl` over the teacher's k likeliest tokens and all others as one: a lower bound of it."""
  del heads_ZDV
  tokens_BTK, logprobs_BTK = (rows[name][..., :k] for name in ("top_tokens", "top_logprobs"))
  return kl_to_top(reverse_kl_ref, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature)


def forward_kl_topk(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature, *, k: int = 16):
  """`forward_kl` over the teacher's k likeliest tokens and all others as one: a lower bound of it."""
  del heads_ZDV
  tokens_BTK, logprobs_BTK = (rows[name][..., :k] for name in ("top_tokens", "top_logprobs"))
  return kl_to_top(forward_kl_ref, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature)


DISTILLATIONS = dict(
  reverse_kl=reverse_kl,
  forward_kl=forward_kl,
  reverse_kl_topk=reverse_kl_topk,
  forward_kl_topk=forward_kl_topk,
)
TOPK = ("reverse_kl_topk", "forward_kl_topk")  # These read likeliest tokens, the others states and heads.
