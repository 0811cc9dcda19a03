"""The device mesh, and the one table from a parameter's logical axes to the mesh's."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemocascade.errors import UserError, unknown

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

  Args:
    of: devices in the place of those here, such as a TPU topology's that is only compiled for.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.device_count() if of is None else len(of)
  sizes = {"data": data, "expert": expert}
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise UserError(f"mesh.{name}={size}: must be at least 1, or -1 for what is left")
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
