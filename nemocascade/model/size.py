"""How many parameters a model has, and how many of them work on a token."""

import functools

import jax

from nemocascade.config import ModelConfig
from nemocascade.model.hybrid import init_params


def count_params(config: ModelConfig) -> int:
  """How many numbers the model holds, without making them."""
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def active_params(config: ModelConfig) -> int:
  """How many of them take part in one token, embeddings and head included.

  All but the experts that a token is not sent to; a head that is the embedding counts once.
  """
  c = config
  L = c.moe_latent_size or c.hidden_size
  unused = c.n_routed_experts - c.num_experts_per_tok
  idle = c.hybrid_override_pattern.count("E") * unused * 2 * L * c.moe_intermediate_size
  return count_params(config) - idle


def matmul_params(config: ModelConfig) -> int:
  """Parameters that multiply every token: looking a token up in the embedding costs nothing."""
  rows = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
  return active_params(config) - rows
