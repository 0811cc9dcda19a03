"""The device mesh, and the one table from a parameter's logical axes to the mesh's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemocascade.errors import UserError, unknown
from nemocascade.field_table import check_values

BATCH = ("data", "expert")  # Mesh axes that cut rows and tokens: all of them.

# Logical axis of a parameter -> mesh axes that cut it; none keeps it whole on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
  # Every matrix has a side of hidden_size: fully sharded data parallelism, over what is left of the
  # mesh by the array's other axes.
  "embed": BATCH,
  "experts": "expert",
  "vocab": None,
  "heads": None,
  "kv_heads": None,
  "head_dim": None,
  "mamba_heads": None,
  "mamba_inner": None,
  "hidden": None,
  "layers": None,  # The scan's axis; a shard of it would be gathered at every step.
}


def make_mesh(data: int = -1, expert: int = 1, *, of: Sequence[jax.Device] | None = None) -> Mesh:
  """All devices as a [data, expert] grid; -1, in one of the two, takes what the other leaves.

  1 x 1 is one device of this process, however many there are.

  Args:
    of: devices in the place of those here, such as a TPU topology's that is only compiled for.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  if of is None and data == expert == 1:
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
      raise UserError(
        f"mesh.{other}={sizes[other]} does not divide the {devices} devices: give a divisor of {devices}"
      )
    sizes[free[0]] = devices // sizes[other]
  if sizes["data"] * sizes["expert"] != devices:
    raise UserError(
      f"mesh.data={sizes['data']} x mesh.expert={sizes['expert']} is {sizes['data'] * sizes['expert']},"
      f" but there are {devices} devices: set one of them to -1"
    )
  # A torus is cut inside its axes where it must be: 8 x 8 devices out of 4 x 4 x 4.
  grid = mesh_utils.create_device_mesh(
    (sizes["data"], sizes["expert"]), devices=of, allow_split_physical_axes=True
  )
  return Mesh(grid, BATCH, axis_types=(AxisType.Auto, AxisType.Auto))


def shardings(axes_tree: Any, mesh: Mesh, arrays: Any = None) -> Any:
  """The tree of tuples of logical axes as a tree of NamedSharding.

  With `arrays` (a like tree of arrays, or of their shapes and dtypes) a dimension is not cut by a mesh
  axis that does not divide it. Of two dimensions that ask for one mesh axis the first gets it.

  Raises:
    UserError: a logical axis is not in RULES.
  """
  is_axes = lambda node: isinstance(node, tuple | PartitionSpec)
  if arrays is None:
    return jax.tree.map(lambda axes: _sharding(axes, mesh, None), axes_tree, is_leaf=is_axes)
  return jax.tree.map(
    lambda axes, array: _sharding(axes, mesh, array.shape), axes_tree, arrays, is_leaf=is_axes
  )


def _sharding(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None) -> NamedSharding:
  if shape is not None and len(axes) > len(shape):
    raise ValueError(f"logical axes {tuple(axes)} are more than the dimensions of shape {shape}")
  taken: set[str] = set()
  spec: list = []
  for i, name in enumerate(axes):
    if name is not None and name not in RULES:
      raise unknown("logical axis", name, RULES)
    cut: list[str] = []
    wanted = (RULES[name] or ()) if name is not None else ()
    for axis in (wanted,) if isinstance(wanted, str) else wanted:
      parts = math.prod(mesh.shape[a] for a in (*cut, axis))
      if axis not in taken and mesh.shape[axis] > 1 and (shape is None or shape[i] % parts == 0):
        cut.append(axis)
    taken |= set(cut)
    spec.append(tuple(cut) if len(cut) > 1 else cut[0] if cut else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def rows(mesh: Mesh, count: int) -> NamedSharding:
  """Of an array whose first dimension is `count` rows: over all devices, or as many as divide them."""
  cut = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
  # The most devices first.
  alone = sorted(((axis,) for axis in cut), key=lambda axes: -mesh.shape[axes[0]])
  for axes in (cut, *alone):
    if count % math.prod(mesh.shape[axis] for axis in axes) == 0:
      return NamedSharding(mesh, PartitionSpec(axes))
  return NamedSharding(mesh, PartitionSpec())


def whole(mesh: Mesh) -> NamedSharding:
  """Of an array that every device has all of."""
  return NamedSharding(mesh, PartitionSpec())


def placed(shapes: Any, places: Any) -> Any:
  """A tree of shapes and dtypes with a sharding each."""
  struct = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
  return jax.tree.map(struct, shapes, places)


def alike(tree: Any, params: Any, mesh: Mesh) -> Any:
  """The shardings of a tree that holds trees like `params`, such as an optimizer's moments.

  What lies at the path of a parameter, below whatever else, lies as it does; all else is whole.

  Args:
    params: shapes with a sharding each.
  """
  at = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

  def place(path, leaf):
    # The longest end of the path first: a parameter's name may end in another's.
    found = (at[path[i:]] for i in range(len(path)) if path[i:] in at)
    param = next(found, None)
    return param.sharding if param is not None and param.shape == leaf.shape else whole(mesh)

  return jax.tree_util.tree_map_with_path(place, tree)


def first_rows(tree: Any, mesh: Mesh) -> Any:
  """The shardings of arrays whose first dimension is rows; scalars are whole."""
  return jax.tree.map(lambda a: rows(mesh, a.shape[0]) if a.ndim else whole(mesh), tree)


def by_rows(tree: Any, B: int, mesh: Mesh) -> Any:
  """The shardings of arrays that hold B rows along their first or their second dimension, or are whole."""
  spec = rows(mesh, B).spec

  def place(a):
    at = next((i for i in (0, 1) if i < a.ndim and a.shape[i] == B), None)
    return whole(mesh) if at is None else NamedSharding(mesh, PartitionSpec(*[None] * at, *spec))

  return jax.tree.map(place, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
  """Arrays that every process has whole, onto the mesh by their first dimension.

  Each process copies only the rows of its own devices.
  """
  tree = jax.tree.map(np.asarray, tree)
  put = lambda a, place: jax.make_array_from_callback(a.shape, place, lambda index: a[index])
  return jax.tree.map(put, tree, first_rows(tree, mesh))


def check_rows(what: str, count: int, mesh: Mesh) -> None:
  """Raises UserError where rows are not equally many on every device: some would do others' work again."""
  if count % mesh.size:
    raise UserError(
      f"{what} is {count} rows over the {mesh.size} devices of the mesh: give a multiple of {mesh.size},"
      " or fewer devices"
    )


# Inside a program. They do nothing without a mesh, or where it is one device.


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """x with its rows over the devices: parameters then come to rows, and not rows to parameters."""
  return x if mesh is None else constrain_batch(x, x.shape[0], mesh)


def constrain_batch(tree: Any, B: int, mesh: Mesh) -> Any:
  """Arrays with their B rows over the devices, as in by_rows."""
  return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, by_rows(tree, B, mesh))


def on_own_rows(fn: Callable, mesh: Mesh | None, *, shared: Sequence[int] = ()) -> Callable:
  """fn of arrays by rows, done by each device on its own rows alone.

  Args:
    fn: takes and returns arrays whose first dimension is rows that know nothing of each other.
    shared: numbers of the arguments that are no rows; each device has all of them.
  """
  if mesh is None or mesh.size == 1:
    return fn

  def apart(*args):
    B = next(a.shape[0] for i, a in enumerate(args) if i not in shared)
    cut = rows(mesh, B).spec
    specs = tuple(PartitionSpec() if i in shared else cut for i in range(len(args)))
    # Unchecked, so that fn's own constants need not say that they differ over the devices.
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)(*args)

  return apart
