"""The mesh covers all devices; every parameter of the model has a sharding on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import BATCH, RULES, make_mesh, owners, put_own, put_rows, read_own, rows, shardings
from nemocascade.model.hybrid import init_params, logical_axes

CONFIG = ModelConfig(
  vocab_size=48,
  hidden_size=32,
  hybrid_override_pattern="M*E-",
  mamba_num_heads=4,
  mamba_head_dim=8,
  chunk_size=8,
)


@pytest.mark.parametrize("data, expert, shape", [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (4, 2, (4, 2))])
def test_the_mesh_covers_all_devices(data, expert, shape):
  mesh = make_mesh(data, expert)
  assert (mesh.shape["data"], mesh.shape["expert"]) == shape
  assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize(
  "data, expert, said",
  [
    (-1, 3, "mesh.expert=3 does not divide the 8 devices"),
    (3, -1, "mesh.data=3 does not divide the 8 devices"),
    (2, 2, "is 4, but there are 8 devices"),
    (-1, -1, "only one of them"),
    (0, 1, "mesh.data=0: must be a whole number of at least 1 or -1"),
    (-1, -2, "mesh.expert=-2"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(data, expert, said):
  with pytest.raises(UserError, match=said):
    make_mesh(data, expert)


def test_experts_and_width_are_cut_the_rest_is_whole():
  axes = {"up": ("experts", "embed", "hidden"), "scale": (None,)}
  spec = jax.tree.map(lambda s: s.spec, shardings(axes, make_mesh(4, 2)))
  assert spec == {"up": PartitionSpec("expert", "data", None), "scale": PartitionSpec(None)}


def test_a_dimension_that_does_not_divide_stays_whole():
  axes = {"even": ("experts", "embed"), "odd": ("experts", "embed")}
  arrays = {"even": jnp.zeros((4, 8)), "odd": jax.ShapeDtypeStruct((3, 8), jnp.float32)}
  placed = shardings(axes, make_mesh(4, 2), arrays)
  assert placed["even"].spec == PartitionSpec("expert", "data")
  assert placed["odd"].spec == PartitionSpec(None, BATCH)  # 3 does not divide over the 2 devices of "expert".


def test_a_mesh_of_one_device_is_refused_in_several_processes(monkeypatch):
  """Each process would train on a device of its own, and none would know of it."""
  assert make_mesh(1, 1).size == 1
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(UserError, match="mesh.data=1 x mesh.expert=1 is 1, but there are 8 devices"):
    make_mesh(1, 1)


def test_one_mesh_axis_cuts_one_dimension():
  assert shardings({"w": ("embed", "embed")}, make_mesh())["w"].spec == PartitionSpec("data", None)


def test_a_misspelt_logical_axis_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'experts'"):
    shardings({"w": ("expert",)}, make_mesh())


def test_rules_lead_to_axes_of_the_mesh():
  named = {axis for axes in RULES.values() if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
  assert named == set(make_mesh().axis_names)


def test_width_lies_over_what_the_experts_leave():
  axes = {"up": ("experts", "embed", "hidden"), "in": ("embed", "hidden"), "odd": ("embed",)}
  arrays = {"up": jnp.zeros((4, 8, 3)), "in": jnp.zeros((8, 3)), "odd": jnp.zeros((6,))}
  spec = jax.tree.map(lambda s: s.spec, shardings(axes, make_mesh(2, 4), arrays))
  assert spec == {
    "up": PartitionSpec("expert", "data", None),
    "in": PartitionSpec(("data", "expert"), None),
    "odd": PartitionSpec("data"),
  }


@pytest.mark.parametrize("count, spec", [(16, ("data", "expert")), (2, "data"), (4, "expert"), (3, None)])
def test_rows_lie_over_as_many_devices_as_divide_them(count, spec):
  axes = (spec,) if isinstance(spec, str) else spec
  expected = PartitionSpec(axes) if axes else PartitionSpec()
  got = rows(make_mesh(2, 4), count)
  assert got.is_equivalent_to(jax.sharding.NamedSharding(got.mesh, expected), 1)


@pytest.mark.parametrize("count", [16, 4, 3])  # Over all devices, over one axis, and replicated.
def test_a_process_reads_its_rows_once_and_puts_them_back(count):
  mesh, values = make_mesh(2, 4), np.arange(5 * count).reshape(count, 5)
  held, read = read_own(put_rows(values, mesh))
  np.testing.assert_array_equal(held, np.arange(count))
  np.testing.assert_array_equal(read, values)
  back = put_own({"a": read + 1}, mesh, count)["a"]
  assert back.sharding == rows(mesh, count)
  np.testing.assert_array_equal(back, values + 1)
  assert owners(mesh, count).tolist() == [0] * count
  with pytest.raises(ValueError, match=f"1 rows, but this process holds {count} of {count}"):
    put_own(values[:1], mesh, count)


def test_every_parameter_of_the_model_has_a_place_and_keeps_its_value():
  mesh = make_mesh(2, 4)
  params = init_params(CONFIG, jax.random.key(0))
  placed = jax.device_put(params, shardings(logical_axes(CONFIG), mesh, params))
  jax.tree.map(np.testing.assert_array_equal, placed, params)
  cut = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
  assert sum(leaf.size for leaf in cut) > 0.8 * sum(leaf.size for leaf in jax.tree.leaves(params))
