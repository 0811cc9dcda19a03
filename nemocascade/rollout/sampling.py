"""Samples one token a row, with its log-probabilities before and after the top_p cut."""

import math

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import einsum


def row_keys(key: jax.Array, row_id_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """A random key for each row and position, so that a row's samples do not depend on the other rows."""
  fold = lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place)  # noqa: E731
  return jax.vmap(fold)(row_id_B, position_B)


def sample(key_B, logits_BV, *, temperature, top_p):
  """(tokens_B int32, logprobs_B fp32, drawn_B fp32).

  `logprobs_B` is the token's log-probability under softmax(logits / temperature), which a trainer can
  recompute. `drawn_B` is its log-probability under the distribution that it was drawn from: the top_p nucleus
  of that softmax, renormalised. Both are equal at top_p = 1.

  Args:
    key_B: a key for each row.
    logits_BV: fp32.
    temperature: scalar, traced. 0 takes the likeliest token; its log-probabilities are those at
      temperature 1 and top_p 1.
    top_p: scalar, traced.
  """
  greedy_B = jnp.argmax(logits_BV, axis=-1)
  is_greedy = temperature <= 0
  scaled_BV = logits_BV / jnp.where(is_greedy, 1.0, temperature)
  logprobs_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
  nucleus_BV = _nucleus(logprobs_BV, jnp.where(is_greedy, 1.0, top_p))
  drawn_B = _draw(key_B, jnp.exp(nucleus_BV))
  tokens_B = jnp.where(is_greedy, greedy_B, drawn_B).astype(jnp.int32)
  of_tokens = lambda a_BV: jnp.take_along_axis(a_BV, tokens_B[:, None], axis=-1)[:, 0]  # noqa: E731
  return tokens_B, of_tokens(logprobs_BV), of_tokens(nucleus_BV)


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


def _nucleus(logprobs_BV, top_p):
  """Log-probabilities of the smallest set of likeliest tokens whose sum reaches top_p, renormalised.

  Other tokens get -inf. At top_p = 1 the input is returned unchanged.
  """

  def cut(logprobs_BV):
    token_BV = jax.lax.broadcasted_iota(jnp.int32, logprobs_BV.shape, 1)
    # The cut is by rank and not by a threshold, so that only as many of several equally likely tokens are kept
    # as are needed.
    minus_BV, order_BV = jax.lax.sort((-logprobs_BV, token_BV), num_keys=2)
    prob_BV = jnp.exp(-minus_BV)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    kept_BV = (before_BV < top_p) | (token_BV == 0)
    _, kept_BV = jax.lax.sort((order_BV, kept_BV), num_keys=1)
    return jax.nn.log_softmax(jnp.where(kept_BV, logprobs_BV, -jnp.inf), axis=-1)

  return jax.lax.cond(top_p < 1.0, cut, lambda x: x, logprobs_BV)
