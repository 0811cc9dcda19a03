"""Samples one token a row, with its log-probabilities before and after unlikely tokens are cut off."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nemocascade.kernels.product import einsum


class Options(struct.PyTreeNode):
  """How tokens are drawn: scalars for all rows, or arrays [B]. The defaults draw from the model's distribution.

  The cuts are applied in the order of the fields, each to the distribution that the one before leaves.
  """

  temperature: Any = 1.0  # fp32; 0 takes the likeliest token.
  top_k: Any = 0  # int32; draws from this many likeliest tokens; 0 keeps all.
  top_p: Any = 1.0  # fp32; draws from the fewest likeliest tokens that together reach this.
  min_p: Any = 0.0  # fp32; drops tokens less likely than this share of the likeliest one's probability.

  def by_row(self, B: int) -> "Options":
    """The options as host arrays [B]."""
    of = lambda value, dtype: np.array(np.broadcast_to(np.asarray(value, dtype), (B,)))  # noqa: E731
    f32 = np.float32
    return Options(of(self.temperature, f32), of(self.top_k, np.int32), of(self.top_p, f32), of(self.min_p, f32))

  @property
  def cuts(self):
    """Whether tokens are left out, for each row."""
    return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


def row_keys(key: jax.Array, row_id_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """A random key for each row and position, so that a row's samples do not depend on the other rows."""
  fold = lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place)  # noqa: E731
  return jax.vmap(fold)(row_id_B, position_B)


def sample(key_B, logits_BV, options: Options, any_cuts=None):
  """(tokens_B int32, logprobs_B fp32, drawn_B fp32).

  `logprobs_B` is the token's log-probability under softmax(logits / temperature), which a trainer can
  recompute. `drawn_B` is its log-probability under the distribution that it was drawn from: what the cuts leave of
  that softmax, renormalised. Both are equal without cuts. Both are NaN if a logit of the row is NaN or +inf.

  A row's result does not depend on the other rows or on their options.

  Args:
    key_B: a key for each row.
    logits_BV: fp32.
    options: arrays [B], traced. Rows of temperature 0 take the likeliest token; its log-probabilities are those
      at temperature 1 without cuts.
    any_cuts: whether a row's options cut off tokens, if the caller knows it already; bool scalar.
  """
  greedy_B = options.temperature <= 0
  logprobs_BV = _tempered(logits_BV, options)
  kept_BV = _cut(logprobs_BV, options, jnp.any(options.cuts) if any_cuts is None else any_cuts)
  drawn_B = _draw(key_B, jnp.exp(kept_BV))
  tokens_B = jnp.where(greedy_B, _first_largest(logits_BV), drawn_B).astype(jnp.int32)
  of_tokens = lambda a_BV: jnp.take_along_axis(a_BV, tokens_B[:, None], axis=-1)[:, 0]  # noqa: E731
  return tokens_B, of_tokens(logprobs_BV), of_tokens(kept_BV)


def likeliest(logits_BV, options: Options, k: int):
  """(tokens_BK int32, logprobs_BK fp32) of the k likeliest tokens, under the distribution of sample's logprobs_B."""
  logprobs_BK, tokens_BK = jax.lax.top_k(_tempered(logits_BV, options), k)
  return tokens_BK.astype(jnp.int32), logprobs_BK


def _first_largest(logits_BV):
  """argmax over the last axis. XLA on the CPU computes argmax itself token by token, in seven times as long.

  A row with NaN gives its last token. Indices are fp32, whose minimum is vectorized; they are exact up to 2^24.
  """
  V = logits_BV.shape[1]
  largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
  index_BV = jax.lax.broadcasted_iota(jnp.float32, logits_BV.shape, 1)
  return jnp.min(jnp.where(largest_BV, index_BV, V - 1.0), axis=-1).astype(jnp.int32)


def _tempered(logits_BV, options: Options):
  temperature_B = jnp.where(options.temperature <= 0, 1.0, options.temperature)
  return jax.nn.log_softmax(logits_BV / temperature_B[:, None], axis=-1)


def _draw(key_B, prob_BV):
  """Draws a token for each row by inverse-transform sampling: first a block of tokens, then a token in it.

  This needs two random numbers a row instead of V, and no sum is longer than sqrt(V) terms.
  """
  B, V = prob_BV.shape
  size = math.isqrt(V - 1) + 1
  prob_BZC = jnp.pad(prob_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
  uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
  block_B = _invert(jnp.sum(prob_BZC, axis=-1), uniform_B2[:, 0])
  prob_BC = jnp.take_along_axis(prob_BZC, block_B[:, None, None], axis=1)[:, 0]
  return block_B * size + _invert(prob_BC, uniform_B2[:, 1])


def _invert(weight_BC, uniform_B):
  """The first index at which the cumulative weight exceeds `uniform` times the total weight.

  It is never an index of weight 0, whatever the rounding.
  """
  C = weight_BC.shape[1]
  sum_BC = einsum("BC,CD->BD", weight_BC, jnp.triu(jnp.ones((C, C), weight_BC.dtype)))
  possible_BC = weight_BC > 0
  hit_BC = possible_BC & (sum_BC > (uniform_B * sum_BC[:, -1])[:, None])
  last_B = C - 1 - jnp.argmax(possible_BC[:, ::-1], axis=1)
  return jnp.where(jnp.any(hit_BC, axis=1), jnp.argmax(hit_BC, axis=1), last_B)


def _cut(logprobs_BV, options: Options, any_cuts):
  """Log-probabilities of the tokens that the options keep, renormalised; others get -inf.

  Rows without cuts are returned unchanged.
  """
  V = logprobs_BV.shape[1]
  top_k_B = jnp.where(options.top_k > 0, options.top_k, V)

  def cut(logprobs_BV):
    rank_BV = token_BV = jax.lax.broadcasted_iota(jnp.int32, logprobs_BV.shape, 1)
    # The cuts are by rank and not by a threshold, so that only as many of several equally likely tokens are kept
    # as are needed.
    minus_BV, order_BV = jax.lax.sort((-logprobs_BV, token_BV), num_keys=2)
    likely_BV = rank_BV < top_k_B[:, None]
    prob_BV = jnp.where(likely_BV, jnp.exp(-minus_BV), 0.0)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    total_B = jnp.where(top_k_B < V, jnp.sum(prob_BV, axis=-1), 1.0)
    kept_BV = likely_BV & ((before_BV < (options.top_p * total_B)[:, None]) | (options.top_p >= 1.0)[:, None])
    kept_BV &= prob_BV >= options.min_p[:, None] * prob_BV[:, :1]
    _, kept_BV = jax.lax.sort((order_BV, kept_BV | (rank_BV == 0)), num_keys=1)
    left_BV = jax.nn.log_softmax(jnp.where(kept_BV, logprobs_BV, -jnp.inf), axis=-1)
    return jnp.where(options.cuts[:, None], left_BV, logprobs_BV)

  return jax.lax.cond(any_cuts, cut, lambda x: x, logprobs_BV)
