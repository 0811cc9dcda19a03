"""The routed matmul for CPUs: a batched product of blocks that each hold rows of one expert."""

import jax
import jax.numpy as jnp

from nemocascade.kernels.groups import row_experts
from nemocascade.kernels.product import einsum_fp32

FEWEST, MOST = 32, 128  # Limits on the rows of a block.


def choose_block(N: int, E: int) -> int:
  """Rows of a block: about an eighth of an expert's mean, for little padding and few copies of matrices."""
  eighth = max(1, N // (8 * E))
  return min(max(1 << (eighth.bit_length() - 1), FEWEST), MOST)


def block_layout(bounds, N: int, block: int):
  """Assigns sorted rows to blocks that each hold rows of one expert.

  Returns:
    (place_N, expert_Z): the place of each sorted row among all rows of the blocks, Z * block for rows
    without an expert; and the expert of each block. Z = N // block + E blocks are enough for any
    groups; unused blocks name the last expert.
  """
  E = bounds.shape[0] - 1
  blocks_E = -(-(bounds[1:] - bounds[:-1]) // block)
  last_E = jnp.cumsum(blocks_E)
  start_E = (last_E - blocks_E) * block  # Place of a group's first row.
  Z = N // block + E
  expert_Z = jnp.minimum(jnp.searchsorted(last_E, jnp.arange(Z), side="right"), E - 1)
  expert_N, inside_N = row_experts(bounds, N)
  place_N = start_E[expert_N] + jnp.arange(N) - bounds[:-1][expert_N]
  return jnp.where(inside_N, place_N, Z * block), expert_Z


def to_blocks(x_ND, place_N, Z: int, block: int):
  """Copies rows to their places in Z blocks; other places are 0: [Z, block, D]."""
  x = jnp.zeros((Z * block, x_ND.shape[1]), x_ND.dtype).at[place_N].set(x_ND, mode="drop")
  return x.reshape(Z, block, -1)


def from_blocks(y_ZBF, place_N):
  """Reads rows back from their places; rows without a place are 0: [N, F]."""
  y = y_ZBF.reshape(-1, y_ZBF.shape[2])
  return y.at[place_N].get(mode="fill", fill_value=0)


def product(x_ND, w, bounds, *, transpose=False, block=None):
  """x[n] @ w[e] (w[e] transposed if `transpose`) for rows n of expert e, 0 for unassigned rows."""
  block = block or choose_block(x_ND.shape[0], w.shape[0])
  place_N, expert_Z = block_layout(bounds, x_ND.shape[0], block)
  x_ZBD = to_blocks(x_ND, place_N, expert_Z.shape[0], block)
  y_ZBF = einsum_fp32("ZBD,ZFD->ZBF" if transpose else "ZBD,ZDF->ZBF", x_ZBD, w[expert_Z])
  return from_blocks(y_ZBF.astype(x_ND.dtype), place_N)


def weight_product(x_ND, dy_NF, bounds, *, dtype, block=None):
  """dw[e] = x[rows]^T @ dy[rows] over the rows of each expert: [E, D, F] of `dtype`."""
  block = block or choose_block(x_ND.shape[0], bounds.shape[0] - 1)
  place_N, expert_Z = block_layout(bounds, x_ND.shape[0], block)
  x_ZBD, dy_ZBF = (to_blocks(a, place_N, expert_Z.shape[0], block) for a in (x_ND, dy_NF))
  dw_ZDF = einsum_fp32("ZBD,ZBF->ZDF", x_ZBD, dy_ZBF)
  E = bounds.shape[0] - 1
  return jax.ops.segment_sum(dw_ZDF, expert_Z, E, indices_are_sorted=True).astype(dtype)
