"""What the backward pass recomputes, by the config's field `remat`: nothing, or each block from its saved input."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_INPUT = "block_input"


def block_input(x):
  """Marks the input of a block, which "offload" keeps in host memory."""
  return checkpoint_name(x, _INPUT)


def rematerialized(block: type[nn.Module], remat: str, methods: list[str]) -> type[nn.Module]:
  """The module class `block`, whose `methods` save for the backward pass what `remat` says.

  Args:
    remat: a word of field_table.REMAT.
  """
  if remat == "none":
    return block
  policy = None  # Saves nothing but the arguments.
  if remat == "offload":
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device",
      offload_dst="pinned_host",
    )  # fmt: skip
  return nn.remat(block, methods=methods, policy=policy)
