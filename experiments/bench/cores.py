"""Rows that each of a chip's two cores multiplies in the routed matmul's kernels for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import LOADS, TOKENS, D, E, F, X, choices
from nemocascade.kernels.groups import group_bounds, parts_of_visits, tile_visits, with_strangers
from nemocascade.kernels.routed_matmul_tpu import Tile, choose_tile, halves


def rows_of_cores(sizes_E, tile: Tile, *, weights: bool) -> tuple[int, ...]:
  """Rows that each half of the grid multiplies, those of parts that another expert's rows fill included.

  Args:
    sizes_E: rows of each expert.
    weights: whether the kernel is that of the experts' gradients.
  """
  N, experts = int(np.sum(sizes_E)), len(sizes_E)
  bounds = group_bounds(jnp.asarray(sizes_E, jnp.int32), N, experts)
  start_G, end_G = (bounds[:-1], bounds[1:]) if weights else with_strangers(bounds, N)
  group_V, tile_V, _ = visits = tile_visits(start_G, end_G, N, tile.rows, empty=weights)
  cut = halves(start_G, end_G, visits, N, tile, strangers=not weights)
  rows_V = np.asarray(parts_of_visits(start_G, end_G, group_V, tile_V, tile.rows, tile.part)) * tile.part
  return tuple(int(rows_V[first:last].sum()) for first, last in zip(*cut, strict=True))


def of_loads():
  """(tokens, name of the load, rows of Nano's experts under random routing) of every case."""
  for tokens in TOKENS[:2]:
    for load, exponent in LOADS.items():
      expert_TX, _ = choices(jax.random.key(tokens), tokens, E, X, exponent)
      yield tokens, load, np.bincount(np.asarray(expert_TX).ravel(), minlength=E)


def slower_core(name: str, bundles: float, cores: int, clock: float):
  """Yields lines with the time of the slower core in a kernel, beside that of half of the multiplied rows.

  Args:
    name: of the product; those that end in "dw" are gradients of experts.
    bundles: per 1e9 useful operations.
    cores: on which the compiler runs the kernel, 1 or 2.
    clock: in Hz.
  """
  for tokens, load, sizes_E in of_loads():
    N = int(sizes_E.sum())
    rows = rows_of_cores(sizes_E, choose_tile(N, E, D, F), weights=name.endswith("dw"))
    ms = lambda rows: rows * 2 * D * F / 1e9 * bundles / clock * 1e3
    ours, even = ms(max(rows) if cores == 2 else sum(rows)), ms(sum(rows) / 2)
    yield dict(
      case=f"{name}_slower_core_{tokens}_tokens_{load}", ours=ours, peer=even, peer_name="equal rows on two cores",
      unit=f"ms at the clock, {cores} cores; rows {' and '.join(map(str, rows))} of {N}", ratio=even / ours,
    )  # fmt: skip
