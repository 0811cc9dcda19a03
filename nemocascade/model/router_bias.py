"""Changes the biases of a model's routers."""

import jax

from nemocascade.config import ModelConfig
from nemocascade.model.pattern import plan
from nemocascade.types import Params


def add_to_router_bias(config: ModelConfig, params: Params, change_LE: jax.Array) -> Params:
  """params with change_LE[l] added to the router bias of the l-th MoE block, in the order of Routing."""
  params, E, start = dict(params), config.n_routed_experts, 0
  for i, (unit, n) in enumerate(plan(config.hybrid_override_pattern)):
    blocks = [f"blocks_{b}" for b, letter in enumerate(unit) if letter == "E"]
    change = change_LE[start : start + n * len(blocks)].reshape(n, len(blocks), E)
    start += n * len(blocks)
    for b, block in enumerate(blocks):
      path = (f"units_{i}", block, "mixer", "e_score_correction_bias")
      params = _add(params, path, change[:, b] if n > 1 else change[0, b])
  return params


def _add(tree: Params, path: tuple[str, ...], change: jax.Array) -> Params:
  """The tree with `change` added to the leaf at `path`; other leaves are shared with the input."""
  if not path:
    return tree + change.astype(tree.dtype)
  return {**tree, path[0]: _add(tree[path[0]], path[1:], change)}
