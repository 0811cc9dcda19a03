"""The device mesh, the table from logical axes of parameters to mesh axes, and shardings made from it."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check_values

BATCH = ("data", "expert")  # Mesh axes that shard rows and tokens: all of them.

# Logical axis of a parameter -> mesh axes that shard it; None replicates it.
RULES: dict[str, str | tuple[str, ...] | None] = {
  # The axis of size hidden_size, which every matrix has: fully sharded data parallelism over the mesh axes
  # that the array's other axes leave free.
  "embed": BATCH,
  "experts": "expert",
  "vocab": None,
  "heads": None,
  "kv_heads": None,
  "head_dim": None,
  "mamba_heads": None,
  "mamba_inner": None,
  "hidden": None,
  "layers": None,  # The axis of the scan over units; if it were sharded, every step would gather it.
}
# While sampling, every device has all weights but other devices' experts: a token then needs no weight from elsewhere.
SAMPLING_RULES = RULES | {"embed": None}


def make_mesh(data: int = -1, expert: int = 1, *, of: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices with the axes [data, expert].

  One of the sizes may be -1: it becomes (number of devices) / (the other size). 1 x 1 uses only the first
  device, in a run of one process; in several, each would train alone.

  Args:
    data: size of the axis that shards rows alone.
    expert: size of the axis that shards experts and rows.
    of: devices to use instead of the present ones, such as those of a TPU topology to compile for.

  Raises:
    UserError: the product of the sizes is not the number of devices.
  """
  if of is None and data == expert == 1 and jax.process_count() == 1:
    of = jax.local_devices()[:1]
  devices = jax.device_count() if of is None else len(of)
  sizes = {"data": data, "expert": expert}
  check_values("mesh", **sizes)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) == 2:
    raise UserError("mesh.data=-1 and mesh.expert=-1: only one of them can be what is left")
  if free:
    (other,) = sizes.keys() - free
    if devices % sizes[other]:
      raise UserError(f"mesh.{other}={sizes[other]} does not divide the {devices} devices: give a divisor of {devices}")
    sizes[free[0]] = devices // sizes[other]
  if sizes["data"] * sizes["expert"] != devices:
    raise UserError(
      f"mesh.data={sizes['data']} x mesh.expert={sizes['expert']} is {sizes['data'] * sizes['expert']},"
      f" but there are {devices} devices: set one of them to -1"
    )
  # An axis of a TPU's torus may be split between mesh axes: 8 x 8 devices out of 4 x 4 x 4 need it.
  grid = mesh_utils.create_device_mesh((sizes["data"], sizes["expert"]), devices=of, allow_split_physical_axes=True)
  return Mesh(grid, BATCH, axis_types=(AxisType.Auto, AxisType.Auto))


def mesh_sizes(said: str) -> dict[str, int]:
  """The sizes of a mesh's axes as a command line gives them: "data:1,expert:8"; an axis left out has size 1.

  Raises:
    UserError: another form, another axis, or an axis twice.
  """
  sizes: dict[str, int] = {}
  for part in said.split(","):
    name, _, size = part.partition(":")
    if not re.fullmatch(r"-?\d{1,9}", size) or name in sizes:
      raise UserError(f"--mesh={said!r}: must give each axis once, as in data:1,expert:8; -1 is what is left")
    if name not in BATCH:
      raise unknown(f"axis of --mesh={said!r}", name, BATCH)
    sizes[name] = int(size)
  return dict.fromkeys(BATCH, 1) | sizes


def shardings(axes_tree: Any, mesh: Mesh, arrays: Any = None, rules: Mapping = RULES) -> Any:
  """Maps a tree of tuples of logical axes to a tree of NamedSharding, by `rules`.

  If two dimensions map to the same mesh axis, the first one gets it.

  Args:
    arrays: a matching tree of arrays or of their shapes. If given, a mesh axis that does not divide a
      dimension does not shard it.

  Raises:
    UserError: a logical axis is not in `rules`.
  """
  is_axes = lambda node: isinstance(node, tuple | PartitionSpec)
  if arrays is None:
    return jax.tree.map(lambda axes: _sharding(axes, mesh, None, rules), axes_tree, is_leaf=is_axes)
  of = lambda axes, array: _sharding(axes, mesh, array.shape, rules)
  return jax.tree.map(of, axes_tree, arrays, is_leaf=is_axes)


def _sharding(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None, rules: Mapping) -> NamedSharding:
  if shape is not None and len(axes) > len(shape):
    raise ValueError(f"logical axes {tuple(axes)} are more than the dimensions of shape {shape}")
  taken: set[str] = set()
  spec: list = []
  for i, name in enumerate(axes):
    if name is not None and name not in rules:
      raise unknown("logical axis", name, rules)
    cut: list[str] = []
    wanted = (rules[name] or ()) if name is not None else ()
    for axis in (wanted,) if isinstance(wanted, str) else wanted:
      parts = math.prod(mesh.shape[a] for a in (*cut, axis))
      if axis not in taken and mesh.shape[axis] > 1 and (shape is None or shape[i] % parts == 0):
        cut.append(axis)
    taken |= set(cut)
    spec.append(tuple(cut) if len(cut) > 1 else cut[0] if cut else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def rows(mesh: Mesh, count: int) -> NamedSharding:
  """The sharding of an array whose first dimension is `count` rows.

  It uses all devices if their number divides `count`; otherwise the longest mesh axis that divides it, or
  replication.
  """
  cut = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
  # Longer axes first.
  alone = sorted(((axis,) for axis in cut), key=lambda axes: -mesh.shape[axes[0]])
  for axes in (cut, *alone):
    if count % math.prod(mesh.shape[axis] for axis in axes) == 0:
      return NamedSharding(mesh, PartitionSpec(axes))
  return NamedSharding(mesh, PartitionSpec())


def own_rows(mesh: Mesh, count: int) -> list[int]:
  """The rows, of `count`, that devices of this process hold."""
  index_of = rows(mesh, count).addressable_devices_indices_map((count,))
  return sorted({row for index in index_of.values() if index is not None for row in range(count)[index[0]]})


def owners(mesh: Mesh, count: int) -> np.ndarray:
  """The owner of each of `count` rows: the lowest index of the processes whose devices hold it; int array [count].

  It follows from the sharding `rows(mesh, count)` alone, so all processes get the same.
  """
  owner = np.full(count, np.iinfo(np.int32).max, np.int32)
  index_of = rows(mesh, count).devices_indices_map((count,))
  for device in mesh.devices.flat:
    (held,) = index_of[device]
    owner[held] = np.minimum(owner[held], device.process_index)
  return owner


def whole(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that is replicated on every device."""
  return NamedSharding(mesh, PartitionSpec())


def placed(shapes: Any, places: Any) -> Any:
  """A tree of ShapeDtypeStruct from a tree of shapes and dtypes and a tree of shardings."""
  struct = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
  return jax.tree.map(struct, shapes, places)


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of shapes with shardings."""

  def of(leaf) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return leaf.dtype.itemsize * math.prod(shape)

  return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def alike(tree: Any, params: Any, mesh: Mesh) -> Any:
  """The shardings of a tree that contains trees like `params`, such as an optimizer's moments.

  A leaf whose path ends in the path of a parameter of the same shape gets that parameter's sharding. All other
  leaves are replicated.

  Args:
    params: a tree of shapes with shardings.
  """
  at = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

  def place(path, leaf):
    # Longest suffix of the path first, because a parameter's path may end in another one's.
    found = (at[path[i:]] for i in range(len(path)) if path[i:] in at)
    param = next(found, None)
    return param.sharding if param is not None and param.shape == leaf.shape else whole(mesh)

  return jax.tree_util.tree_map_with_path(place, tree)


def first_rows(tree: Any, mesh: Mesh) -> Any:
  """The shardings of arrays whose first dimension is rows; scalars are replicated."""
  return jax.tree.map(lambda a: rows(mesh, a.shape[0]) if a.ndim else whole(mesh), tree)


def by_rows(tree: Any, B: int, mesh: Mesh) -> Any:
  """The shardings of arrays with B rows along their first or second dimension; other arrays are replicated."""
  spec = rows(mesh, B).spec

  def place(a):
    at = next((i for i in (0, 1) if i < a.ndim and a.shape[i] == B), None)
    return whole(mesh) if at is None else NamedSharding(mesh, PartitionSpec(*[None] * at, *spec))

  return jax.tree.map(place, tree)


def put(array: jax.Array | np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
  """Puts an array on the devices of `place`.

  If it is not on these devices, every process must have the whole of it, and copies only the part of its own devices.
  jax.device_put of such a jax.Array, in one of several processes, returns an array that cannot be read or saved.
  """
  if isinstance(array, jax.Array):
    if array.committed and array.sharding == place:
      return array  # jax.device_put would return it too, but takes longer to see that nothing is to be done.
    if array.sharding.device_set == place.device_set:
      return jax.device_put(array, place)
  host = np.asarray(array)
  return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def put_rows(tree: Any, mesh: Mesh) -> Any:
  """Puts arrays on the mesh, sharded along their first dimension. Arrays that are there already stay.

  Every process must have host arrays of the whole shape. It copies only the rows of its own devices (own_rows).
  """
  tree = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), tree)
  return jax.tree.map(put, tree, first_rows(tree, mesh))


def read_own(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Copies the rows that this process holds to the host; no other process takes part.

  Args:
    array: sharded along its first dimension only, or replicated.

  Returns:
    (rows, values): the indices of the rows in rising order, each once, and their values [len(rows), ...].
    The rows are own_rows(mesh, count) if the sharding is `rows(mesh, count)`.
  """
  first: dict[int, jax.Array] = {}  # Start of a shard -> its values; devices may hold the same rows.
  for shard in array.addressable_shards:
    first.setdefault(shard.index[0].start or 0, shard.data)
  starts = sorted(first)
  values = [np.asarray(first[start]) for start in starts]
  held = [np.arange(start, start + len(part)) for start, part in zip(starts, values, strict=True)]
  return np.concatenate(held), np.concatenate(values)


def put_own(tree: Any, mesh: Mesh, count: int) -> Any:
  """Puts rows on the mesh of which each process has only its own; read_own is the inverse.

  Args:
    tree: host arrays [len(own_rows(mesh, count)), ...] with the rows of own_rows in that order. A row that
      several processes hold must be the same in all of them.

  Returns:
    a tree of global arrays [count, ...], sharded by `rows(mesh, count)`.

  Raises:
    ValueError: an array has another number of rows.
  """
  own, place = np.asarray(own_rows(mesh, count), int), rows(mesh, count)

  def from_own(values):
    if len(values) != len(own):
      raise ValueError(f"{len(values)} rows, but this process holds {len(own)} of {count}")

    def part(index):
      start, stop, _ = index[0].indices(count)
      first = np.searchsorted(own, start)
      return values[first : first + stop - start]

    return jax.make_array_from_callback((count, *values.shape[1:]), place, part)

  return jax.tree.map(lambda a: from_own(np.asarray(a)), tree)


def check_rows(what: str, count: int, mesh: Mesh) -> None:
  """Raises UserError unless `count` is a multiple of the devices: otherwise devices would repeat rows."""
  if count % mesh.size:
    raise UserError(
      f"{what} is {count} rows over the {mesh.size} devices of the mesh: give a multiple of {mesh.size},"
      " or fewer devices"
    )


# For use inside a jitted program. Without a mesh, or on a mesh of one device, these do nothing.


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Shards x by rows, so that XLA gathers parameters to the rows and does not move the rows."""
  return x if mesh is None else constrain_batch(x, x.shape[0], mesh)


def constrain_batch(tree: Any, B: int, mesh: Mesh) -> Any:
  """Shards arrays by their B rows, as in by_rows."""
  return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, by_rows(tree, B, mesh))


def on_own_rows(fn: Callable, mesh: Mesh | None, *, shared: Sequence[int] = (), second: Sequence[int] = ()) -> Callable:
  """Wraps fn in a shard_map, so that each device applies it to its own rows.

  Args:
    fn: takes and returns arrays whose first dimension is independent rows.
    shared: positions of the arguments that are not rows; they are replicated.
    second: positions of the arguments whose second dimension is the rows.
  """
  if mesh is None or mesh.size == 1:
    return fn

  def apart(*args):
    B = next(a.shape[0] for i, a in enumerate(args) if i not in (*shared, *second))
    cut = rows(mesh, B).spec
    spec = lambda i: PartitionSpec() if i in shared else PartitionSpec(None, *cut) if i in second else cut
    specs = tuple(map(spec, range(len(args))))
    # check_vma=False, so that constants inside fn need no pcast to device-varying values.
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)(*args)

  return apart
