"""One token a row from its logits, and its log-probabilities before and after top_p cut the distribution."""

import math

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import einsum


def row_keys(key: jax.Array, row_id_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """A key for each row and place, so that a sample does not depend on its neighbours."""
  fold = lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place)  # noqa: E731
  return jax.vmap(fold)(row_id_B, position_B)


def sample(key_B, logits_BV, *, temperature, top_p):
  """(tokens_B int32, logprobs_B fp32, drawn_B fp32).

  `logprobs_B` is of softmax(logits / temperature), which a trainer can score again. `drawn_B` is of the
  distribution that the token was drawn from: the nucleus of the former, renormalised; they are equal at
  top_p = 1.

  Args:
    key_B: a key a row.
    logits_BV: fp32.
    temperature: scalar, traced; 0 takes the likeliest token, whose log-probabilities are then those
      at temperature 1.
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
  """A token a row, by inversion in two levels: a block of tokens, then a token of it.

  Two random numbers a row instead of one a token, and sums no longer than the root of V.
  """
  B, V = prob_BV.shape
  size = math.isqrt(V - 1) + 1
  prob_BZC = jnp.pad(prob_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
  uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
  block_B = _invert(jnp.sum(prob_BZC, axis=-1), uniform_B2[:, 0])
  prob_BC = jnp.take_along_axis(prob_BZC, block_B[:, None, None], axis=1)[:, 0]
  return block_B * size + _invert(prob_BC, uniform_B2[:, 1])


def _invert(weight_BC, uniform_B):
  """The first place up to which the weights sum to more than `uniform` of their total.

  Rounding never lets it be one of weight 0.
  """
  C = weight_BC.shape[1]
  sum_BC = einsum("BC,CD->BD", weight_BC, jnp.triu(jnp.ones((C, C), weight_BC.dtype)))
  possible_BC = weight_BC > 0
  hit_BC = possible_BC & (sum_BC > (uniform_B * sum_BC[:, -1])[:, None])
  last_B = C - 1 - jnp.argmax(possible_BC[:, ::-1], axis=1)
  return jnp.where(jnp.any(hit_BC, axis=1), jnp.argmax(hit_BC, axis=1), last_B)


def _nucleus(logprobs_BV, top_p):
  """The fewest tokens that together reach top_p, likeliest first, renormalised; unchanged at 1."""

  def cut(logprobs_BV):
    token_BV = jax.lax.broadcasted_iota(jnp.int32, logprobs_BV.shape, 1)
    # By rank, not by a threshold: of equally likely tokens only as many as are needed are kept.
    minus_BV, order_BV = jax.lax.sort((-logprobs_BV, token_BV), num_keys=2)
    prob_BV = jnp.exp(-minus_BV)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    kept_BV = (before_BV < top_p) | (token_BV == 0)
    _, kept_BV = jax.lax.sort((order_BV, kept_BV), num_keys=1)
    return jax.nn.log_softmax(jnp.where(kept_BV, logprobs_BV, -jnp.inf), axis=-1)

  return jax.lax.cond(top_p < 1.0, cut, lambda x: x, logprobs_BV)
