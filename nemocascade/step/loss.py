"""The SFT loss, and the exchangeable functions of the policy-gradient loss.

For each part of the loss (aggregation, correction, ratio, KL, distillation) a dict below maps a config's
name to a function. Every loss returns (sum, count); the division happens once, over the global batch.
Functions that need a mean over a completion take `mean_of`: x_BT -> [B, T], at each token the mean of x over
the learned tokens of its completion.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.kernels.distillation import forward_kl_ref, kl_to_states, kl_to_top, reverse_kl_ref
from nemocascade.segments import masked_sum


def sft_loss(logprobs_BT: jax.Array, loss_mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum of -log p over the learned tokens in nats, number of learned tokens)."""
  return masked_sum(-logprobs_BT, loss_mask_BT)


# Aggregations: loss mask with one completion a row -> (weights_BT, count), both fp32. The loss is
# sum(weights_BT * loss_BT) / count. The weights are computed before rows are packed or cut.


def token_mean(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean over all learned tokens of the batch, as in Cascade 2's GRPO stages (arXiv 2603.19220, section 4)."""
  weights_BT = mask_BT.astype(jnp.float32)
  return weights_BT, jnp.sum(weights_BT)


def sequence_mean(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean over the learned tokens of each sequence, then over sequences that have some.

  Nemotron-Cascade 2's MOPD loss is averaged so (arXiv 2603.19220, section 4.4, eq. 4).
  """
  tokens_B1 = jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.float32)
  weights_BT = jnp.where(mask_BT, 1.0 / jnp.maximum(tokens_B1, 1.0), 0.0)
  return weights_BT, jnp.sum(tokens_B1 > 0, dtype=jnp.float32)


def constant_length(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sum over the learned tokens of each sequence divided by the constant T, then the mean over sequences.

  Dr. GRPO (arXiv 2503.20783, section 3.2): a token's weight does not depend on the length of its answer.
  T is the row length. Sequences without a learned token do not count.
  """
  weights_BT = mask_BT.astype(jnp.float32) / mask_BT.shape[1]
  return weights_BT, jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)


AGGREGATIONS = dict(token_mean=token_mean, sequence_mean=sequence_mean, constant_length=constant_length)


EXPONENT = 20.0  # e^20 = 4.9e8 is far above every probability ratio of a useful policy.
FARTHEST = 1e15  # Nats. Log-ratios count as no more, so that their squares, summed over a batch, stay within float32.


def bounded_exp(x: jax.Array) -> jax.Array:
  """exp(x) for x <= 20, its tangent at 20 above: value and gradient are finite for every finite x.

  A constant above 20 would have no gradient. Then the remaining gradient of `k3` would push the policy away
  from its reference.
  """
  top = jnp.exp(jnp.float32(EXPONENT))
  return jnp.exp(jnp.minimum(x, EXPONENT)) + top * jnp.minimum(jnp.maximum(x - EXPONENT, 0.0), FARTHEST)


# Corrections for the difference between trainer and sampler:
# (gap_BT, drawn_gap_BT, mean_of) -> weight of each token, at least 0.
#   gap_BT = log pi_train - log pi_inf; pi_inf is the sampler's softmax(logits / temperature).
#   drawn_gap_BT = log pi_train - log mu; mu is the distribution that tokens were drawn from: pi_inf cut to
#   its top_p nucleus and renormalised. At top_p = 1 mu equals pi_inf.
# gap_BT measures how far the two programs differ, so it decides which tokens are masked. exp(drawn_gap_BT) is
# the importance weight, because tokens were drawn from mu.

MeanOf = Callable[[jax.Array], jax.Array]


def no_correction(gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf) -> jax.Array:
  """Weight 1 everywhere: no correction."""
  del drawn_gap_BT, mean_of
  return jnp.ones_like(gap_BT)


def tis(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.0, high: float = 2.0
) -> jax.Array:
  """Truncated importance sampling (Yao et al., 2025; NeMo-RL's `tis`): pi_train / mu clamped to [low, high]."""
  del gap_BT, mean_of
  return jnp.clip(bounded_exp(drawn_gap_BT), low, high)


def icepop(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.5, high: float = 2.0
) -> jax.Array:
  """pi_train / mu if pi_train / pi_inf is in [low, high], else 0; there is no clamp.

  Nemotron-Cascade 2 (arXiv 2603.19220, section 4.4, eq. 3), whose bounds are the defaults. As in its eq. 4,
  masked tokens still count in the normaliser.
  """
  del mean_of
  ratio_BT = bounded_exp(gap_BT)
  return jnp.where((ratio_BT >= low) & (ratio_BT <= high), bounded_exp(drawn_gap_BT), 0.0)


def sequence_mask(
  gap_BT: jax.Array, drawn_gap_BT: jax.Array, mean_of: MeanOf, *, low: float = 0.999, high: float = 1.002
) -> jax.Array:
  """pi_train / mu, or 0 on all tokens of a completion whose mean ratio is outside [low, high].

  The mean is the geometric mean of pi_train / pi_inf over the completion (NeMo-RL's `seq-mask-tis`).
  """
  mean_BT = bounded_exp(mean_of(gap_BT))
  return jnp.where((mean_BT >= low) & (mean_BT <= high), bounded_exp(drawn_gap_BT), 0.0)


CORRECTIONS = dict(none=no_correction, tis=tis, icepop=icepop, sequence_mask=sequence_mask)


# Surrogate objectives: (logprobs_BT, proximal_BT, a_BT, mean_of) -> (gain_BT, clipped_BT).
#   proximal_BT: log-probabilities under the policy before the first update of this batch, without gradient.
#   a_BT: the advantage times the correction's weight, without gradient. r below is exp(logprobs - proximal).
#   gain_BT: the objective to maximise. clipped_BT: bool, where the clip changes the token's term.
# At the proximal policy all of them have the gradient of a * log pi. A batch that gets a single update is
# always at the proximal policy.


def reinforce(logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf):
  """a * log pi, without a ratio (Nemotron-Cascade 2, arXiv 2603.19220, section 4.4, eq. 4)."""
  del proximal_BT, mean_of
  return a_BT * logprobs_BT, jnp.zeros(a_BT.shape, bool)


def token_clip(logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 0.2, high: float = 0.28):
  """min(r a, clip(r, 1 - low, 1 + high) a): PPO, arXiv 1707.06347, eq. 7; two bounds as in DAPO, 2503.14476."""
  del mean_of
  return _clipped(bounded_exp(logprobs_BT - proximal_BT), a_BT, low, high)


def dual_clip(
  logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 0.2, high: float = 0.28, cap: float = 3.0
):
  """`token_clip`, bounded from below by cap * a where a < 0 (Ye et al., 2020, arXiv 1912.09729, eq. 5)."""
  gain_BT, clipped_BT = token_clip(logprobs_BT, proximal_BT, a_BT, mean_of, low=low, high=high)
  capped_BT = (a_BT < 0) & (gain_BT < cap * a_BT)
  return jnp.where(capped_BT, cap * a_BT, gain_BT), clipped_BT | capped_BT


def gspo(logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 3e-4, high: float = 4e-4):
  """`token_clip` with the completion's ratio exp(mean log r) (Zheng et al., 2025, arXiv 2507.18071).

  This is GSPO-token (eq. 13 and 14): the value of the ratio is the completion's, and each token keeps its
  own gradient, so advantages may differ between tokens.
  """
  sequence_BT = jax.lax.stop_gradient(mean_of(logprobs_BT - proximal_BT))
  ratio_BT = bounded_exp(sequence_BT + (logprobs_BT - jax.lax.stop_gradient(logprobs_BT)))
  return _clipped(ratio_BT, a_BT, low, high)


def cispo(logprobs_BT, proximal_BT, a_BT, mean_of: MeanOf, *, low: float = 1.0, high: float = 0.28):
  """clip(r, 1 - low, 1 + high) a log pi; no gradient through r (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

  The clip bounds a token's weight, and no token loses its gradient. low = 1 means no lower bound.
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


# Estimators of KL(policy || reference) at a token that the policy sampled (Schulman, 2020); nats.
# Expected gradient as a term of the loss, on policy: that of KL(policy || reference) for k2, that of
# KL(reference || policy) for k3, and 0 for k1. So k1 is useful only as a metric.


def k1(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """log pi - log ref: unbiased, high variance, may be negative."""
  return logprobs_BT - reference_BT


def k2(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """Half of k1 squared: slightly biased, never negative."""
  return 0.5 * jnp.square(jnp.clip(logprobs_BT - reference_BT, -FARTHEST, FARTHEST))


def k3(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """ref / pi - log(ref / pi) - 1: unbiased, never negative."""
  gap_BT = reference_BT - logprobs_BT
  return bounded_exp(gap_BT) - gap_BT - 1.0


KLS = dict(k1=k1, k2=k2, k3=k3)


# Distillation: the KL between the policy and its teacher over the vocabulary -> kl_BT, nats, at wanted tokens.
#   x_BTD, head_DV: the policy's logits are x_BTD @ head_DV.
#   rows: hold the teacher's states, or its top-k tokens. heads_ZDV: the teachers' heads.
# They treat each token alone: on several devices each has the tokens that it holds, and both heads whole.
# Both distributions are softmax(logits / temperature), as in sampling. The gradient treats the sampled
# prefixes as fixed. It sums over the vocabulary, while `mopd` estimates it from the one sampled token.


def reverse_kl(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature):
  """KL(policy || teacher) (MiniLLM, arXiv 2306.08543); its gradient is the expectation of `mopd`'s."""
  sent = rows["teacher_states"], rows["teacher"], heads_ZDV
  return kl_to_states(reverse_kl_ref, x_BTD, head_DV, wanted_BT, *sent, temperature)


def forward_kl(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature):
  """KL(teacher || policy) on the policy's samples (GKD, arXiv 2306.13649); covers all modes of the teacher."""
  sent = rows["teacher_states"], rows["teacher"], heads_ZDV
  return kl_to_states(forward_kl_ref, x_BTD, head_DV, wanted_BT, *sent, temperature)


def reverse_kl_topk(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature, *, k: int = 16):
  """`reverse_kl` over the teacher's k likeliest tokens and one outcome for all others; a lower bound of it."""
  del heads_ZDV
  tokens_BTK, logprobs_BTK = (rows[name][..., :k] for name in ("top_tokens", "top_logprobs"))
  return kl_to_top(reverse_kl_ref, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature)


def forward_kl_topk(x_BTD, head_DV, wanted_BT, rows, heads_ZDV, temperature, *, k: int = 16):
  """`forward_kl` over the teacher's k likeliest tokens and one outcome for all others; a lower bound of it."""
  del heads_ZDV
  tokens_BTK, logprobs_BTK = (rows[name][..., :k] for name in ("top_tokens", "top_logprobs"))
  return kl_to_top(forward_kl_ref, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature)


DISTILLATIONS = dict(
  reverse_kl=reverse_kl,
  forward_kl=forward_kl,
  reverse_kl_topk=reverse_kl_topk,
  forward_kl_topk=forward_kl_topk,
)
