"""The routed matmul for GPUs, in Pallas through Triton: the product and its transposes."""

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
  """Tile sizes of a product. Triton requires sides that are powers of two and at least 16.

  The defaults are chosen for Hopper by arithmetic and from the code that Triton 3.9 generates (wgmma, fed by
  cp.async), not by measurement. The sums take 128 fp32 numbers in each thread of eight warps. `stages` steps of
  both operands take 3 * 64 * 384 * 2 = 144 KiB of 227 KiB of shared memory. A step reads 48 KiB for 4.2 MFLOP.
  Half as many rows would read a third more from the L2 cache, but would spill no registers.
  """

  rows: int = 256
  columns: int = 128  # Nano's width 2688 is 21 tiles; 1856 is 14.5, which wastes 3% of the work.
  depth: int = 64  # Elements of the contracted axis per step; divides both of Nano's widths.
  warps: int = 8
  stages: int = 3  # Pipeline stages: steps whose operands are loaded at the same time.


def choose_tile(N: int, E: int, D: int, F: int, dtype=jnp.bfloat16) -> Tile:
  """The tile for N rows times E matrices [D, F]; it has fewer rows if the experts have few.

  The last tile of an expert is half empty on average. The largest tile is used only if an expert has
  four or more of them on average.
  """
  power = lambda n, most: min(max(pl.next_power_of_2(n), 16), most)
  # Tensor cores do not multiply fp32: a large fp32 tile takes Triton a minute and fills the registers.
  large = 1 if dtype == jnp.bfloat16 else 4
  rows = Tile.rows if N >= 4 * Tile.rows * E else power(-(-N // E), Tile.rows // 2)
  rows = min(rows, Tile.rows // large)
  columns, depth = power(F, 2 * Tile.columns // max(large, 2)), power(D, Tile.depth // min(large, 2))
  return Tile(rows=rows, columns=columns, depth=depth, warps=8 if rows > 64 else 4)


def _cut(start, size: int, end):
  """(a slice of `size` elements, a mask of those before `end`); the mask is None if all are known to be."""
  if isinstance(end, int) and end % size == 0:
    return pl.ds(start, size), None
  return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < end


def _tile(ref, rows, columns, lead):
  """(the part of a ref at two results of `_cut`, its mask or None)."""
  (row_cut, row_mask), (column_cut, column_mask) = rows, columns
  masks = [None if row_mask is None else row_mask[:, None], None if column_mask is None else column_mask[None, :]]
  shape = row_cut.size, column_cut.size
  masks = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
  return ref.at[(*lead, row_cut, column_cut)], functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, rows, columns, lead=()):
  """Loads a tile; masked elements are 0."""
  part, mask = _tile(ref, rows, columns, lead)
  return plgpu.load(part, mask=mask, other=None if mask is None else 0.0)


def _store(ref, rows, columns, value, lead=()):
  part, mask = _tile(ref, rows, columns, lead)
  plgpu.store(part, value.astype(ref.dtype), mask=mask)


def _product_kernel(expert_V, start_V, end_V, x_ref, w_ref, *rest, tile, finish, transpose):
  """One tile of an expert's rows by one of columns; `rest`: the extra inputs of `finish`, then the output."""
  extras, y_ref = rest[:-1], rest[-1]
  D, F = x_ref.shape[1], y_ref.shape[1]
  blocks = pl.cdiv(F, tile.columns)
  # Columns vary fastest, so that programs that run at the same time share rows and experts.
  v, block = jax.lax.div(pl.program_id(0), blocks), jax.lax.rem(pl.program_id(0), blocks)
  e, start, end = expert_V[v], start_V[v], end_V[v]
  mine = e >= 0  # Otherwise the rows are unassigned and get 0.

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


# Jitted so that each shape is traced once: programs for other platforms trace this form too.
@functools.partial(jax.jit, static_argnames=("tile", "transpose", "finish", "interpret"))
def product(x_ND, w, bounds, *, tile: Tile | None = None, transpose=False, finish=as_it_is, extras=(), interpret=False):
  """finish(x[n] @ w[e], *extras[n]) for rows n in bounds[e] .. bounds[e + 1], 0 for other rows.

  Args:
    x_ND: [N, D], bf16 or fp32; w: [E, D, F], or [E, F, D] if `transpose`.
    bounds: int32 [E + 1], the row range of each expert.
    tile: by default chosen from the shapes.
    finish: applied to the fp32 rows before they are rounded and written.
    extras: arrays [N, 1], whose rows are further arguments of `finish`.

  Returns:
    [N, F] of x's dtype; sums are fp32.
  """
  N, D = x_ND.shape
  E, F = w.shape[0], w.shape[1 if transpose else 2]
  tile = tile or choose_tile(N, E, D, F, x_ND.dtype)
  start_G, end_G = with_strangers(bounds, N)  # Unassigned rows are zeroed.
  group_V, start_V, end_V = group_tiles(start_G, end_G, N, tile.rows)
  expert_V = jnp.where((group_V > 0) & (group_V <= E), group_V - 1, -1)
  size = x_ND.dtype.itemsize
  return pl.pallas_call(
    functools.partial(_product_kernel, tile=tile, finish=finish, transpose=transpose),
    grid=(expert_V.shape[0] * pl.cdiv(F, tile.columns),),
    out_shape=like(x_ND, (N, F), x_ND.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=pl.CostEstimate(flops=2 * N * D * F, bytes_accessed=size * (N * (D + F) + w.size), transcendentals=0),
    interpret=interpret,
    name="routed_product",
  )(expert_V, start_V, end_V, x_ND, w, *(extra.reshape(N) for extra in extras))


def _weight_kernel(bounds_ref, x_ref, dy_ref, dw_ref, *, tile):
  """One tile of an expert's weight gradient, summed over the rows of the expert."""
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
  """dw[e] = x[rows]^T @ dy[rows] with rows = bounds[e] .. bounds[e + 1]: [E, D, F] of `dtype`, fp32 sums."""
  (N, D), F = x_ND.shape, dy_NF.shape[1]
  E = bounds.shape[0] - 1
  # Here the rows of a tile are elements of D, and the sum is over N.
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
