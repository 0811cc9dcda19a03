"""Row range of each expert among rows sorted by expert, and the tiles of rows that it overlaps."""

import jax
import jax.numpy as jnp


def group_bounds(group_sizes_G, N: int, E: int, offset=0):
  """int32 [E + 1]: expert offset + e has the rows bounds[e] .. bounds[e + 1].

  The G groups are consecutive and start at row 0. Groups that would pass row N are cut there, and
  negative sizes count as 0. Rows outside the E groups are unassigned.
  """
  ends_G = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G, 0), dtype=jnp.int32), N)
  bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G])
  return jax.lax.dynamic_slice_in_dim(bounds, offset, E + 1)


def row_experts(bounds, N: int):
  """(the expert of each row, whether it has one), each [N].

  Unassigned rows name expert 0 if they come before all groups, expert E - 1 if they come after them.
  """
  E = bounds.shape[0] - 1
  expert_N = jnp.searchsorted(bounds, jnp.arange(N, dtype=jnp.int32), side="right", method="compare_all") - 1
  return jnp.clip(expert_N, 0, E - 1).astype(jnp.int32), (expert_N >= 0) & (expert_N < E)


def with_strangers(bounds, N: int):
  """(start_G, end_G) of E + 2 groups: the rows before the experts, each expert's rows, the rows after."""
  start_G = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
  return start_G, jnp.concatenate([bounds, jnp.full(1, N, jnp.int32)])


def _in_turn(count_G, V: int):
  """Lists V visits: count[0] of group 0, then count[1] of group 1, and so on.

  Returns:
    (the group of each visit [V], its index among the visits of its group [V], the number of visits used).
  """
  last_G = jnp.cumsum(count_G, dtype=jnp.int32)
  visit_V = jnp.arange(V, dtype=jnp.int32)
  group_V = jnp.searchsorted(last_G, visit_V, side="right", method="compare_all").astype(jnp.int32)
  group_V = jnp.minimum(group_V, count_G.shape[0] - 1)
  return group_V, visit_V - (last_G - count_G)[group_V], last_G[-1]


def tile_visits(start_G, end_G, N: int, tile: int, *, empty: bool = False):
  """The pairs (group, tile of rows) that overlap, ordered by row.

  Args:
    start_G, end_G: row ranges of the groups, which are consecutive.
    N: number of rows.
    tile: rows of a tile.
    empty: whether a group without rows is also visited, once.

  Returns:
    (group_V, tile_V, count): the visits; only the first `count` are used. V is large enough for any groups.
  """
  G, tiles = start_G.shape[0], -(-N // tile)
  first_G = start_G // tile
  visits_G = jnp.where(end_G > start_G, (end_G - 1) // tile - first_G + 1, int(empty))
  group_V, turn_V, count = _in_turn(visits_G, tiles + G - 1)
  return group_V, jnp.clip(first_G[group_V] + turn_V, 0, tiles - 1), count


def parts_of_visits(start_G, end_G, group_V, tile_V, tile: int, part: int):
  """int32 [V]: the parts of `part` rows of each visit's tile that hold rows of its group."""
  base_V = tile_V * tile
  first_V = jnp.maximum(start_G[group_V] - base_V, 0)
  last_V = jnp.minimum(end_G[group_V] - base_V, tile)
  return jnp.where(last_V > first_V, -(-last_V // part) - first_V // part, 0)


def in_halves(work_V, tile_V, count, *, whole_tiles: bool):
  """Cuts visits where the work before and after the cut differs least.

  Args:
    work_V: of each visit.
    tile_V, count: of `tile_visits`.
    whole_tiles: whether the visits of a tile stay together.

  Returns:
    (first_H, last_H), int32 [2]: half h has the visits first[h] .. last[h]. A single visit is in both halves.
  """
  place_V = jnp.arange(work_V.shape[0], dtype=jnp.int32)
  work_V = jnp.where(place_V < count, work_V, 0)
  before_V = jnp.cumsum(work_V) - work_V
  allowed_V = (place_V > 0) & (place_V < count)
  if whole_tiles:
    allowed_V &= tile_V != jnp.roll(tile_V, 1)
  apart_V = jnp.where(allowed_V, jnp.abs(2 * before_V - jnp.sum(work_V)), jnp.iinfo(jnp.int32).max)
  cut = jnp.where(jnp.any(allowed_V), jnp.argmin(apart_V), 1).astype(jnp.int32)
  return jnp.stack([jnp.zeros_like(cut), jnp.minimum(cut, count - 1)]), jnp.stack([jnp.minimum(cut, count), count])


def group_tiles(start_G, end_G, N: int, tile: int):
  """Cuts each group's rows into tiles, from the group's first row on; ordered by row.

  The kernel must be able to start a tile at any row. There are fewer tiles than visits in
  `tile_visits`, where groups share tiles.

  Returns:
    (group_V, start_V, end_V): a tile has the rows start .. min(start + tile, end); `end` is the end of
    its group. V = N // tile + G tiles are enough for any groups; unused ones have start = end.
  """
  tiles_G = -(-(end_G - start_G) // tile)
  group_V, turn_V, _ = _in_turn(tiles_G, N // tile + start_G.shape[0])
  end_V = end_G[group_V]
  return group_V, jnp.minimum(start_G[group_V] + turn_V * tile, end_V), end_V
