"""Whose the rows are: bounds of the groups of sorted rows, and the tiles that each group touches."""

import jax
import jax.numpy as jnp


def group_bounds(group_sizes_G, N: int, E: int, offset=0):
  """bounds[e], bounds[e + 1]: where the rows of expert offset + e begin and end, for E experts.

  Groups follow each other from row 0. Those that would pass row N are cut there, negative sizes
  count as 0; rows outside of the E groups belong to nobody here.
  """
  ends_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0), dtype=jnp.int32), N)
  bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G])
  return jax.lax.dynamic_slice_in_dim(bounds, offset, E + 1)


def row_experts(bounds, N: int):
  """(the expert of each row, whether it has one); rows before the first one's and after the last one's name these."""
  E = bounds.shape[0] - 1
  expert_N = jnp.searchsorted(bounds, jnp.arange(N, dtype=jnp.int32), side="right", method="compare_all") - 1
  return jnp.clip(expert_N, 0, E - 1).astype(jnp.int32), (expert_N >= 0) & (expert_N < E)


def with_strangers(bounds, N: int):
  """(start_G, end_G): a group of the rows before the local experts', then theirs, then one of those behind."""
  start_G = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
  return start_G, jnp.concatenate([bounds, jnp.full(1, N, jnp.int32)])


def _in_turn(count_G, V: int):
  """V visits, count[g] of each group in turn: (each one's group, which of its group's it is, how many count)."""
  last_G = jnp.cumsum(count_G, dtype=jnp.int32)
  visit_V = jnp.arange(V, dtype=jnp.int32)
  group_V = jnp.searchsorted(last_G, visit_V, side="right", method="compare_all").astype(jnp.int32)
  group_V = jnp.minimum(group_V, count_G.shape[0] - 1)
  return group_V, visit_V - (last_G - count_G)[group_V], last_G[-1]


def tile_visits(start_G, end_G, N: int, tile: int, *, empty: bool = False):
  """The pairs (group, tile of rows) that overlap, in the order of rows.

  Args:
    start_G, end_G: rows of the groups, which follow each other.
    empty: whether a group without rows is visited too, once.

  Returns:
    group_V, tile_V: the visits; only the first `count` of them count. V is enough for any groups.
  """
  G, tiles = start_G.shape[0], -(-N // tile)
  first_G = start_G // tile
  visits_G = jnp.where(end_G > start_G, (end_G - 1) // tile - first_G + 1, int(empty))
  group_V, turn_V, count = _in_turn(visits_G, tiles + G - 1)
  return group_V, jnp.clip(first_G[group_V] + turn_V, 0, tiles - 1), count


def group_tiles(start_G, end_G, N: int, tile: int):
  """Each group's rows in tiles of its own, from its first row on, in the order of rows.

  Fewer than the visits of `tile_visits`, whose tiles all groups share, where any row may begin a tile.

  Returns:
    group_V, start_V, end_V: a tile has the rows start .. start + tile of its group that lie before
    the end; V = N // tile + G are enough for any groups, and unused ones have start = end.
  """
  tiles_G = -(-(end_G - start_G) // tile)
  group_V, turn_V, _ = _in_turn(tiles_G, N // tile + start_G.shape[0])
  end_V = end_G[group_V]
  return group_V, jnp.minimum(start_G[group_V] + turn_V * tile, end_V), end_V
