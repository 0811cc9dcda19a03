"""The number of parameters of a model, in total and for one token."""

import functools

import jax

from nemocascade.config import ModelConfig
from nemocascade.model.hybrid import init_params


def count_params(config: ModelConfig) -> int:
  """The number of parameters; counts shapes and allocates nothing."""
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def active_params(config: ModelConfig) -> int:
  """The number of parameters used for one token, embedding and head included.

  Leaves out the experts that a token is not sent to. A head that is tied to the embedding counts once.
  """
  c = config
  L = c.moe_latent_size or c.hidden_size
  unused = c.n_routed_experts - c.num_experts_per_tok
  idle = c.hybrid_override_pattern.count("E") * unused * 2 * L * c.moe_intermediate_size
  return count_params(config) - idle


def matmul_params(config: ModelConfig) -> int:
  """The number of parameters multiplied for one token: the embedding counts only if it is also the head."""
  rows = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
  return active_params(config) - rows
