"""The reward model: the hybrid's blocks and a scalar head on the last token of each row."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels.product import einsum
from nemocascade.model.hybrid import Hybrid, axes_of
from nemocascade.model.layers import constant
from nemocascade.types import Params


class RewardModel(nn.Module):
  """Rows of one document each -> reward_B, fp32.

  The head is a Bradley-Terry head, as for RLHF in Nemotron-Cascade (arXiv 2512.13607, section 4).
  """

  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    self.backbone = Hybrid(self.config, self.mesh)
    zeros = constant(nn.initializers.zeros, "embed")
    self.reward_head = self.param("reward_head", zeros, (self.config.hidden_size,), jnp.float32)

  def __call__(self, tokens_BT, segment_ids_BT):
    h_BTD, _ = self.backbone.hidden(tokens_BT, segment_ids_BT)
    last_B11 = (jnp.sum(segment_ids_BT > 0, axis=1) - 1)[:, None, None]
    h_BD = jnp.take_along_axis(h_BTD, jnp.maximum(last_B11, 0), axis=1)[:, 0]
    return einsum("BD,D->B", h_BD.astype(jnp.float32), self.reward_head)


@functools.partial(jax.jit, static_argnums=0)
def init_reward_params(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh parameters, without partitioning metadata."""
  return nn.meta.unbox(_init(config, key))


def _init(config: ModelConfig, key):
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  return RewardModel(config).init(key, tokens_BT, tokens_BT + 1)["params"]


def reward_axes(config: ModelConfig):
  """A tree like that of init_reward_params, with a tuple of logical axis names for each array."""
  return axes_of(functools.partial(_init, config))
