"""The weights that sampling uses: the trainer's, with those of products in the products' dtype."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.types import Params

GATHERED, SHARDED = FORMS = ("gathered", "sharded")  # Values of model.sampling_weights.
STEPS = "steps"  # The collection of weights that are laid out for single steps, and those in it.
UP, DOWN = "up_DN", "down_ND"
# With at most this many rows and this many experts for each one that a token chooses, a CPU multiplies rows with all
# experts faster than each expert with its own rows.
DENSE_ROWS, DENSE_SHARE = 32, 4
# Parameters that the model uses in fp32: the router, the convolution, the decays and the norms. The others are cast
# to the products' dtype where they are used, so that casting them before changes no number.
IN_FP32 = {"gate", "e_score_correction_bias", "conv1d", "conv1d_bias", "A_log", "D", "dt_bias", "norm", "weight"}


def cast_products(config: ModelConfig, params: Params) -> Params:
  """The parameters, with the weights of products and the embedding in config.dtype."""
  cast = lambda path, leaf: leaf if path[-1].key in IN_FP32 else leaf.astype(config.dtype)
  return jax.tree_util.tree_map_with_path(cast, params)


def for_steps(config: ModelConfig, mesh: Mesh, params: Params, rows: int) -> dict[str, Any]:
  """The variables of Hybrid.step for a rollout of so many rows a device.

  On a single CPU and for few rows they include, for each MoE block, the matrices of all experts side by side, those of
  the shared expert last: [D, N] and [N, D]. XLA would otherwise copy them so at every step.
  """
  c, one_cpu = config, mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
  dense = rows <= DENSE_ROWS and c.n_routed_experts <= DENSE_SHARE * c.num_experts_per_tok
  fits = not c.moe_latent_size and c.moe_shared_expert_intermediate_size % c.moe_intermediate_size == 0
  if "E" not in c.hybrid_override_pattern or not (one_cpu and dense and fits):
    return {"params": params}

  def of(tree: Mapping) -> dict:
    if "gate" in tree:
      up, down = (tree[f"{name}_proj"].astype(c.dtype) for name in ("up", "down"))
      up = jnp.moveaxis(up, -3, -2)
      up, down = up.reshape(*up.shape[:-2], -1), down.reshape(*down.shape[:-3], -1, down.shape[-1])
      shared = (tree[f"shared_{name}_proj"].astype(c.dtype) for name in ("up", "down"))
      return {
        name: jnp.concatenate(both, axis)
        for name, axis, both in zip((UP, DOWN), (-1, -2), zip((up, down), shared, strict=True), strict=True)
      }
    return {key: found for key, sub in tree.items() if isinstance(sub, Mapping) and (found := of(sub))}

  return {"params": params, STEPS: of(params)}
