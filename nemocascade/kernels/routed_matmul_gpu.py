"""Rows times their expert's matrix on GPUs, in Pallas by way of Triton: the product and its transposes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nemocascade.kernels.groups import group_tiles, with_strangers
from nemocascade.kernels.pallas_product import as_it_is, like
from nemocascade.kernels.product import precision


@dataclasses.dataclass(frozen=True)
class Tile:
  """How a product is cut; sides are powers of two, of at least 16 each, which Triton asks for.

  For Hopper, by arithmetic and by what Triton 3.9 makes of it (wgmma, fed by cp.async), not by a
  measurement: the sums are 128 fp32 numbers for each thread of eight warps, and `stages` steps of both
  operands take 3 * 64 * 384 * 2 = 144 KiB of 227 KiB of shared memory. A step reads 48 KiB for 4.2 MFLOP;
  half as many rows would read a third more from the L2 cache, but spill no registers.
  """

  rows: int = 256
  columns: int = 128  # Of Nano's widths 2688 is 21 of them, 1856 is 14.5, of which 3% of the work are lost.
  depth: int = 64  # Of what is summed, a step; divides both of Nano's widths.
  warps: int = 8
  stages: int = 3  # Steps that are on their way from memory.


def choose_tile(N: int, E: int, D: int, F: int, dtype=jnp.bfloat16) -> Tile:
  """The tile of a product of N rows with E matrices [D, F]: fewer rows where an expert has few.

  The last tile of an expert is half empty on average, so it has four of the largest at least.
  """
  power = lambda n, most: min(max(pl.next_power_of_2(n), 16), most)
  # fp32 is multiplied by no matrix unit: a large tile of it takes Triton a minute and fills the registers.
  large = 1 if dtype == jnp.bfloat16 else 4
  rows = Tile.rows if N >= 4 * Tile.rows * E else power(-(-N // E), Tile.rows // 2)
  rows = min(rows, Tile.rows // large)
  columns, depth = power(F, 2 * Tile.columns // max(large, 2)), power(D, Tile.depth // min(large, 2))
  return Tile(rows=rows, columns=columns, depth=depth, warps=8 if rows > 64 else 4)


def _cut(start, size: int, end):
  """A slice of fixed size, and which of it lies before the end: None for all, where that is known."""
  if isinstance(end, int) and end % size == 0:
    return pl.ds(start, size), None
  return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < end


def _tile(ref, rows, columns, lead):
  """The part of a ref that two cuts meet in, and its mask."""
  (row_cut, row_mask), (column_cut, column_mask) = rows, columns
  masks = [None if row_mask is None else row_mask[:, None], None if column_mask is None else column_mask[None, :]]
  shape = row_cut.size, column_cut.size
  masks = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
  return ref.at[(*lead, row_cut, column_cut)], functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, rows, columns, lead=()):
  """A tile, 0 outside of its cuts."""
  part, mask = _tile(ref, rows, columns, lead)
  return plgpu.load(part, mask=mask, other=None if mask is None else 0.0)


def _store(ref, rows, columns, value, lead=()):
  part, mask = _tile(ref, rows, columns, lead)
  plgpu.store(part, value.astype(ref.dtype), mask=mask)


def _product_kernel(expert_V, start_V, end_V, x_ref, w_ref, *rest, tile, finish, transpose):
  """A tile of one expert's rows by a tile of columns; `rest` is what `finish` takes too, then the output."""
  extras, y_ref = rest[:-1], rest[-1]
  D, F = x_ref.shape[1], y_ref.shape[1]
  blocks = pl.cdiv(F, tile.columns)
  # Columns go first, so that what runs at a time shares rows and experts.
  v, block = jax.lax.div(pl.program_id(0), blocks), jax.lax.rem(pl.program_id(0), blocks)
  e, start, end = expert_V[v], start_V[v], end_V[v]
  mine = e >= 0  # Else the rows are nobody's and get 0.

  @pl.when(start < end)
  def _():
    rows, columns = _cut(start, tile.rows, end), _cut(block * tile.columns, tile.columns, F)

    def step(i, y):
      deep = _cut(i * tile.depth, tile.depth, D)
      x = _load(x_ref, rows, deep)
      w = _load(w_ref, *((columns, deep) if transpose else (deep, columns)), lead=(jnp.maximum(e, 0),))
      return y + plgpu.dot(x, w, trans_b=transpose, precision=precision(x.dtype))

    steps = mine.astype(jnp.int32) * pl.cdiv(D, tile.depth)  # jnp.where of two constants is lowered to a bool.
    y = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    of_rows = [plgpu.load(extra.at[rows[0]], mask=rows[1], other=0.0)[:, None] for extra in extras]
    y = jnp.where(mine, finish(y, *of_rows), 0.0)
    _store(y_ref, rows, columns, y)


# Jitted, so that where a program for another platform traces it too, each shape is traced once.
@functools.partial(jax.jit, static_argnames=("tile", "transpose", "finish", "interpret"))
def product(
  x_ND, w, bounds, *, tile: Tile | None = None, transpose=False, finish=as_it_is, extras=(), interpret=False
):
  """finish(x[n] @ w[e], *extras[n]) for rows n of bounds[e] .. bounds[e + 1], 0 for other rows.

  Args:
    x_ND: [N, D], bf16 or fp32; w: [E, D, F], or [E, F, D] if transpose.
    tile: by default chosen by the shapes.
    finish: what is done to fp32 rows before they are rounded and written.
    extras: arrays [N, 1] whose rows `finish` takes too.

  Returns:
    [N, F] of x's dtype; sums are fp32.
  """
  N, D = x_ND.shape
  E, F = w.shape[0], w.shape[1 if transpose else 2]
  tile = tile or choose_tile(N, E, D, F, x_ND.dtype)
  start_G, end_G = with_strangers(bounds, N)  # Strangers' rows get 0.
  group_V, start_V, end_V = group_tiles(start_G, end_G, N, tile.rows)
  expert_V = jnp.where((group_V > 0) & (group_V <= E), group_V - 1, -1)
  size = x_ND.dtype.itemsize
  return pl.pallas_call(
    functools.partial(_product_kernel, tile=tile, finish=finish, transpose=transpose),
    grid=(expert_V.shape[0] * pl.cdiv(F, tile.columns),),
    out_shape=like(x_ND, (N, F), x_ND.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=pl.CostEstimate(
      flops=2 * N * D * F, bytes_accessed=size * (N * (D + F) + w.size), transcendentals=0
    ),
    interpret=interpret,
    name="routed_product",
  )(expert_V, start_V, end_V, x_ND, w, *(extra.reshape(N) for extra in extras))


def _weight_kernel(bounds_ref, x_ref, dy_ref, dw_ref, *, tile):
  """A tile of one expert's gradient, summed over its rows."""
  _, D, F = dw_ref.shape
  down, across = pl.cdiv(D, tile.rows), pl.cdiv(F, tile.columns)
  e, block = jax.lax.div(pl.program_id(0), down * across), jax.lax.rem(pl.program_id(0), down * across)
  d, f = jax.lax.div(block, across), jax.lax.rem(block, across)
  start, end = bounds_ref[e], bounds_ref[e + 1]
  of_x, of_dy = _cut(d * tile.rows, tile.rows, D), _cut(f * tile.columns, tile.columns, F)

  def step(i, dw):
    rows = _cut(start + i * tile.depth, tile.depth, end)
    x, dy = _load(x_ref, rows, of_x), _load(dy_ref, rows, of_dy)
    return dw + plgpu.dot(x, dy, trans_a=True, precision=precision(x.dtype))

  steps = jax.lax.div(end - start + tile.depth - 1, tile.depth)
  dw = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
  _store(dw_ref, of_x, of_dy, dw, lead=(e,))


@functools.partial(jax.jit, static_argnames=("tile", "dtype", "interpret"))
def weight_product(x_ND, dy_NF, bounds, *, tile: Tile | None = None, dtype, interpret=False):
  """dw[e] = x[rows]^T @ dy[rows], rows = bounds[e] .. bounds[e + 1]: [E, D, F] of `dtype`."""
  (N, D), F = x_ND.shape, dy_NF.shape[1]
  E = bounds.shape[0] - 1
  # Here D is what a tile has as rows, and the rows are what is summed.
  tile = tile or choose_tile(D, 1, N, F, x_ND.dtype)
  return pl.pallas_call(
    functools.partial(_weight_kernel, tile=tile),
    grid=(E * pl.cdiv(D, tile.rows) * pl.cdiv(F, tile.columns),),
    out_shape=like(x_ND, (E, D, F), dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=pl.CostEstimate(
      flops=2 * N * D * F,
      bytes_accessed=x_ND.dtype.itemsize * N * (D + F) + jnp.dtype(dtype).itemsize * E * D * F,
      transcendentals=0,
    ),
    interpret=interpret,
    name="routed_weight_product",
  )(bounds, x_ND, dy_NF)
