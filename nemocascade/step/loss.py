"""Losses as (sum, count), and the slots of the policy-gradient loss.

A slot is a function; a dict below names its choices for a config. Every loss returns a sum and a
count, and the division happens once, over the global batch.
"""

import jax
import jax.numpy as jnp

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


AGGREGATIONS = dict(token_mean=token_mean, sequence_mean=sequence_mean)


# Correction: pi_train / pi_inf of a token -> its weight.


def no_correction(ratio_BT: jax.Array) -> jax.Array:
  """The sampler is taken at its word."""
  return jnp.ones_like(ratio_BT)


def icepop(ratio_BT: jax.Array, *, low: float = 0.5, high: float = 2.0) -> jax.Array:
  """The ratio where it lies in [low, high], else 0 (paper.md 5.1, eq. 3): a mask, not a clamp.

  Such tokens still count in the normaliser, as the equation is printed.
  """
  return jnp.where((ratio_BT >= low) & (ratio_BT <= high), ratio_BT, 0.0)


CORRECTIONS = dict(none=no_correction, icepop=icepop)


def policy_gradient_loss(
  logprobs_BT: jax.Array, advantages_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
  """Per token -w * a * log pi, with the gradient through log pi alone (REINFORCE; eq. 4)."""
  return -jax.lax.stop_gradient(weights_BT * advantages_BT) * logprobs_BT


def kl_k3(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
  """Per token estimate of KL(policy || reference) that is never negative (Schulman, 2020)."""
  gap_BT = reference_BT - logprobs_BT
  return jnp.exp(gap_BT) - gap_BT - 1.0
