"""The routed matmul for TPUs, in Pallas: the product and its transposes.

v4 and v5p chips have two cores, which share a grid only along parallel dimensions longer than 1. The first grid
dimension is therefore two halves of the work. Both halves multiply one expert where the cut is within its rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nemocascade.errors import UserError
from nemocascade.kernels.groups import in_halves, parts_of_visits, tile_visits, with_strangers
from nemocascade.kernels.pallas_product import VMEM, as_it_is, like
from nemocascade.kernels.product import precision

LANES = 128
# The grid is (halves of the work, blocks of columns, visits).
HALVES = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM)


@dataclasses.dataclass(frozen=True)
class Tile:
  """Tile sizes of a product.

  VMEM holds a whole expert if it fits, so that each expert is read once. A tile of rows is
  multiplied by `chunk` columns of its expert at a time.
  """

  rows: int = 512
  chunk: int = 384  # Divides both of Nano's widths, 2688 and 1856 padded to 1920.
  part: int = 128  # In a tile shared by several experts, only parts with rows of the expert are multiplied.


# (most rows per expert, tile): larger tiles waste more work where experts share a tile.
BY_LOAD = ((192, Tile(rows=128)), (768, Tile(rows=256)))


def choose_tile(N: int, E: int, D: int, F: int) -> Tile:
  """The tile for N rows times E matrices [D, F]."""
  rows = next((tile.rows for load, tile in BY_LOAD if N <= load * E), Tile.rows)
  chunk = Tile.chunk
  while chunk > LANES and -(-F // chunk) * chunk >= F + LANES:
    chunk -= LANES
  return Tile(rows=rows, chunk=chunk, part=min(Tile.part, rows))


def _columns(F: int, chunk: int, fits) -> int:
  """The most columns of a block that `fits` accepts: whole chunks, in the fewest equal blocks.

  Raises:
    UserError: not even one chunk fits.
  """
  chunks = -(-F // chunk)
  for blocks in range(1, chunks + 1):
    columns = -(-chunks // blocks) * chunk
    if fits(columns):
      return columns
  raise UserError(
    f"routed matmul: {chunk} columns of an expert of {F} don't fit the {VMEM >> 20} MiB of VMEM with"
    " their rows: give a tile of fewer rows or columns"
  )


def _in_chunks(total: int, chunk: int, body):
  """Calls body(start) for each chunk of `total`, in a loop: it compiles faster than unrolled code."""

  def step(i, carry):
    body(pl.multiple_of(i * chunk, chunk))
    return carry

  jax.lax.fori_loop(0, total // chunk, step, 0)


def halves(start_G, end_G, visits, N: int, tile: Tile, *, strangers: bool):
  """(first_H, last_H) of `in_halves` by multiplied rows, or one part with all visits where there is one tile.

  Args:
    visits: of `tile_visits`.
    strangers: whether the first and the last group are unassigned rows, which are only zeroed; a tile's rows are
      then written by one half alone.
  """
  group_V, tile_V, count = visits
  if N <= tile.rows:
    return jnp.zeros(1, jnp.int32), count[None]
  work_V = parts_of_visits(start_G, end_G, group_V, tile_V, tile.rows, tile.part)
  if strangers:
    work_V = jnp.where((group_V > 0) & (group_V < start_G.shape[0] - 1), work_V, 0)
  return in_halves(work_V, tile_V, count, whole_tiles=strangers)


def _visit(h, i, first_H, last_H):
  """The i-th visit of half h; the last one again after the half's end, so that nothing more is loaded."""
  return jnp.minimum(first_H[h] + i, last_H[h] - 1)


def _sources(tile_V, bounds, N: int, tile: Tile):
  """The tile that each visit reads: unassigned rows are not fetched, but the nearest tile with assigned rows."""
  low, high = bounds[0] // tile.rows, jnp.maximum(bounds[-1] - 1, bounds[0]) // tile.rows
  return jnp.clip(jnp.clip(tile_V, low, high), 0, -(-N // tile.rows) - 1)


def _product_kernel(
  group_V, tile_V, source_V, start_G, end_G, first_H, last_H, x_ref, w_ref, *rest, tile, finish, transpose
):
  """One tile of rows times one expert; `rest`: the extra inputs of `finish`, then the output."""
  del source_V  # Only the block specs read it.
  extras, y_ref = rest[:-1], rest[-1]
  h, i, E = pl.program_id(0), pl.program_id(2), start_G.shape[0] - 2
  v, used = _visit(h, i, first_H, last_H), first_H[h] + i < last_H[h]
  g = group_V[v]
  base = tile_V[v] * tile.rows
  first, last = start_G[g] - base, end_G[g] - base  # Relative to the tile.
  inside = (g > 0) & (g <= E)
  whole = (first <= 0) & (last >= tile.rows)
  columns = y_ref.shape[1]

  def product(rows, column):
    cut = pl.ds(column, tile.chunk)
    w = w_ref[cut, :] if transpose else w_ref[:, cut]
    y = jax.lax.dot_general(
      x_ref[rows, :], w, (((1,), (1 if transpose else 0,)), ((), ())),
      preferred_element_type=jnp.float32, precision=precision(x_ref.dtype),
    )  # fmt: skip
    return finish(y, *(extra[rows, :] for extra in extras))

  def keep(rows, row, column, y):
    """Writes only the rows of this group; other visits write the tile's other rows."""
    cut = pl.ds(column, tile.chunk)
    place = row + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    old = y_ref[rows, cut].astype(jnp.float32)
    y_ref[rows, cut] = jnp.where((place >= first) & (place < last), y, old).astype(y_ref.dtype)

  @pl.when(used & inside & whole)
  def _():
    def chunk(column):
      y_ref[:, pl.ds(column, tile.chunk)] = product(slice(None), column).astype(y_ref.dtype)

    _in_chunks(columns, tile.chunk, chunk)

  @pl.when(used & (~whole | ~inside))
  def _():
    def part(row):
      rows = pl.ds(row, tile.part)

      @pl.when((row < last) & (row + tile.part > first))
      def _():
        @pl.when(inside)
        def _():
          _in_chunks(columns, tile.chunk, lambda column: keep(rows, row, column, product(rows, column)))

        @pl.when(~inside)
        def _():
          nothing = jnp.zeros((tile.part, tile.chunk), jnp.float32)
          _in_chunks(columns, tile.chunk, lambda column: keep(rows, row, column, nothing))

    _in_chunks(tile.rows, tile.part, part)


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

  Raises:
    UserError: the tile does not fit in VMEM.
  """
  N, D = x_ND.shape
  E, F = w.shape[0], w.shape[1 if transpose else 2]
  tile = tile or choose_tile(N, E, D, F)
  size = x_ND.dtype.itemsize
  # Two buffers for each block, one in use and one being loaded; sums are fp32.
  fits = lambda columns: (
    2 * size * (tile.rows * (D + columns) + -(-D // LANES) * LANES * columns)
    + 4 * tile.rows * (2 * tile.chunk + 2 * LANES * len(extras)) <= VMEM
  )  # fmt: skip
  columns = _columns(F, tile.chunk, fits)
  start_G, end_G = with_strangers(bounds, N)  # Unassigned rows are zeroed.
  visits = group_V, tile_V, _ = tile_visits(start_G, end_G, N, tile.rows)
  source_V = _sources(tile_V, bounds, N, tile)
  first_H, last_H = halves(start_G, end_G, visits, N, tile, strangers=True)

  def spec(shape, place):
    """A block spec whose index is place(expert, tile of rows to read, tile to write, block of columns)."""

    def index(h, f, i, g, t, s, start_G, end_G, *halves):
      v = _visit(h, i, *halves)
      return place(jnp.clip(g[v] - 1, 0, E - 1), s[v], t[v], f)

    return pl.BlockSpec(shape, index)

  row = lambda width: spec((tile.rows, width), lambda e, source, target, f: (source, 0))
  if transpose:
    w_spec = spec((None, columns, D), lambda e, source, target, f: (e, f, 0))
  else:
    w_spec = spec((None, D, columns), lambda e, source, target, f: (e, 0, f))
  return pl.pallas_call(
    functools.partial(_product_kernel, tile=tile, finish=finish, transpose=transpose),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,
      grid=(first_H.shape[0], -(-F // columns), jnp.max(last_H - first_H)),
      in_specs=[row(D), w_spec, *(row(1) for _ in extras)],
      out_specs=spec((tile.rows, columns), lambda e, source, target, f: (target, f)),
    ),
    out_shape=like(x_ND, (N, F), x_ND.dtype),
    compiler_params=HALVES,
    cost_estimate=pl.CostEstimate(flops=2 * N * D * F, bytes_accessed=size * (N * (D + F) + w.size), transcendentals=0),
    interpret=interpret,
    name="routed_product",
  )(group_V, tile_V, source_V, start_G, end_G, first_H, last_H, x_ND, w, *extras)


def _shared(group_V, first_H, last_H, E: int):
  """The expert with visits in both halves; E if there is none."""
  last, first = group_V[last_H[0] - 1], group_V[first_H[-1]]
  return jnp.where((last_H[0] == first_H[-1]) & (last == first), first, E)


def _weight_kernel(
  group_V, tile_V, start_E, end_E, first_H, last_H, shared, x_ref, dy_ref, dw_ref, part_ref, sum_ref, *, tile
):
  """Adds one tile of rows to its expert's gradient, which is written when the expert changes.

  The fp32 sums of the expert that both halves have are also written to `part_ref`.
  """
  h, f, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  v, used = _visit(h, i, first_H, last_H), first_H[h] + i < last_H[h]
  e, base = group_V[v], tile_V[v] * tile.rows
  first, last = start_E[e] - base, end_E[e] - base
  whole = (first <= 0) & (last >= tile.rows)
  begins = used & ((i == 0) | (group_V[jnp.maximum(v - 1, 0)] != e))
  ends = used & ((v == last_H[h] - 1) | (group_V[jnp.minimum(v + 1, last_H[h] - 1)] != e))

  def add(column, rows, masked):
    x, dy = x_ref[rows, pl.ds(column, tile.chunk)], dy_ref[rows, :]
    if masked is not None:  # Mask both: memory after row N may hold NaN, and 0 * NaN is NaN.
      x = jnp.where(masked(x.shape), x.astype(jnp.float32), 0.0).astype(x.dtype)
      dy = jnp.where(masked(dy.shape), dy.astype(jnp.float32), 0.0).astype(dy.dtype)
    sum_ref[pl.ds(column, tile.chunk), :] += jax.lax.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32, precision=precision(x.dtype)
    )

  @pl.when(begins)
  def _():
    def zero(column):
      sum_ref[pl.ds(column, tile.chunk), :] = jnp.zeros((tile.chunk, sum_ref.shape[1]), jnp.float32)

    _in_chunks(sum_ref.shape[0], tile.chunk, zero)

  @pl.when(used & whole)
  def _():
    _in_chunks(sum_ref.shape[0], tile.chunk, lambda column: add(column, slice(None), None))

  @pl.when(used & ~whole & (last > first))
  def _():
    def part(row):
      def masked(shape):
        place = row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (place >= first) & (place < last)

      @pl.when((row < last) & (row + tile.part > first))
      def _():
        add_part = lambda column: add(column, pl.ds(row, tile.part), masked)
        _in_chunks(sum_ref.shape[0], tile.chunk, add_part)

    _in_chunks(tile.rows, tile.part, part)

  @pl.when(ends)
  def _():
    def write(column):
      cut = pl.ds(column, tile.chunk)
      dw_ref[cut, :] = sum_ref[cut, :].astype(dw_ref.dtype)

    _in_chunks(sum_ref.shape[0], tile.chunk, write)

  @pl.when(ends & (e == shared[0]))
  def _():
    pltpu.sync_copy(sum_ref, part_ref.at[h, f])


@functools.partial(jax.jit, static_argnames=("tile", "dtype", "interpret"))
def weight_product(x_ND, dy_NF, bounds, *, tile: Tile | None = None, dtype, interpret=False):
  """dw[e] = x[rows]^T @ dy[rows] with rows = bounds[e] .. bounds[e + 1]: [E, D, F] of `dtype`, fp32 sums.

  Raises:
    UserError: the tile does not fit in VMEM.
  """
  (N, D), F = x_ND.shape, dy_NF.shape[1]
  E = bounds.shape[0] - 1
  tile = tile or choose_tile(N, E, D, F)
  size, out = x_ND.dtype.itemsize, jnp.dtype(dtype).itemsize
  # A block has all of D, so that x is read once per block, and as many columns of F as fit.
  deep = -(-D // tile.chunk) * tile.chunk
  wide = LANES if F > LANES else F
  fits = lambda columns: (
    2 * size * tile.rows * (deep + columns) + (4 + 2 * out) * deep * columns
    + 4 * tile.chunk * (tile.rows + columns) <= VMEM
  )  # fmt: skip
  columns = _columns(F, wide, fits)
  start_E, end_E = bounds[:-1], bounds[1:]
  visits = group_V, tile_V, _ = tile_visits(start_E, end_E, N, tile.rows, empty=True)
  first_H, last_H = halves(start_E, end_E, visits, N, tile, strangers=False)
  shared = _shared(group_V, first_H, last_H, E)
  parts, blocks = first_H.shape[0], -(-F // columns)

  def spec(shape, place):
    """A block spec whose index is place(expert, tile of rows, block of columns)."""

    def index(h, f, i, g, t, start_E, end_E, first_H, last_H, shared):
      v = _visit(h, i, first_H, last_H)
      return place(g[v], t[v], f)

    return pl.BlockSpec(shape, index)

  dw_EDF, part = pl.pallas_call(
    functools.partial(_weight_kernel, tile=tile),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,
      grid=(parts, blocks, jnp.max(last_H - first_H)),
      in_specs=[
        spec((tile.rows, deep), lambda e, t, f: (t, 0)),
        spec((tile.rows, columns), lambda e, t, f: (t, f)),
      ],
      out_specs=[spec((None, deep, columns), lambda e, t, f: (e, 0, f)), pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[pltpu.VMEM((deep, columns), jnp.float32)],
    ),
    out_shape=[like(x_ND, (E, D, F), dtype), like(x_ND, (parts, blocks, deep, columns), jnp.float32)],
    compiler_params=HALVES,
    cost_estimate=pl.CostEstimate(
      flops=2 * N * D * F, bytes_accessed=size * N * (D + F) + out * E * D * F, transcendentals=0
    ),
    interpret=interpret,
    name="routed_weight_product",
  )(group_V, tile_V, start_E, end_E, first_H, last_H, shared[None], x_ND, dy_NF)
  # Both cores have written the shared expert, in any order.
  sum_DF = jnp.swapaxes(jnp.sum(part, axis=0), 0, 1).reshape(deep, blocks * columns)[:D, :F]
  place = jnp.minimum(shared, E - 1)
  e_DF = jnp.where(shared < E, sum_DF.astype(dtype), dw_EDF[place])
  return jax.lax.dynamic_update_index_in_dim(dw_EDF, e_DF, place, 0)
