"""Experts sharded over devices give the same values and gradients as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_processes import assert_both_say

from nemocascade.errors import UserError
from nemocascade.kernels.routed_matmul import routed_mlp
from nemocascade.mesh import make_mesh
from nemocascade.model.expert_parallel import plans, sharded_routed_mlp

pytestmark = pytest.mark.usefixtures("compiled_fast")

D, F, E, X = 8, 12, 16, 3
GRIDS = [(8, 1), (4, 2), (2, 4), (1, 8)]
# Router behaviour: the chosen experts of each token, all distinct.
ROUTERS = {
  "balanced": lambda key, T: jax.lax.top_k(jax.random.uniform(key, (T, E)), X)[1],
  "one_device": lambda key, T: jnp.tile(jnp.arange(X)[None], (T, 1)),
  "last_device": lambda key, T: jnp.tile(E - 1 - jnp.arange(X)[None], (T, 1)),
}


def inputs(T=40):
  """Returns (arrays, {router: expert_TX})."""
  keys = jax.random.split(jax.random.key(0), 5)
  x_TD, up_EDF, down_EFD = (jax.random.normal(k, s) for k, s in zip(keys, [(T, D), (E, D, F), (E, F, D)], strict=False))
  weight_TX = jax.random.uniform(keys[3], (T, X))
  return (x_TD, up_EDF, down_EFD, weight_TX), {n: r(keys[4], T) for n, r in ROUTERS.items()}


def value_and_grads(mlp):
  """Value and gradients of a scalar loss; compiled once for all routers."""

  def loss(x_TD, up_EDF, down_EFD, weight_TX, expert_TX):
    y_TD, rows = mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX)
    return jnp.sum(jnp.sin(y_TD / 8)), rows

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


@functools.cache
def on_one_device(T=40):
  arrays, routers = inputs(T)
  alone = value_and_grads(routed_mlp)
  return {name: jax.device_get(alone(*arrays, expert_TX)) for name, expert_TX in routers.items()}


def assert_is_one_device(apart, T=40):
  arrays, routers = inputs(T)
  spread = value_and_grads(apart)
  for name, expert_TX in routers.items():
    got = jax.device_get(spread(*arrays, expert_TX))
    assert_same(got, on_one_device(T)[name])
    assert int(got[0][1]) == T * X  # No choice is dropped, counted where rows arrive.


def assert_same(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("form", ["exchange", "gather"])
@pytest.mark.parametrize("data, expert", GRIDS)
def test_experts_apart_are_one_device_in_value_and_gradient(data, expert, form):
  mesh = make_mesh(data, expert)
  assert_is_one_device(lambda *a: sharded_routed_mlp(mesh, *a, form=form))


def test_no_row_is_dropped_where_the_buffer_is_small():
  mesh = make_mesh(2, 4)
  assert_is_one_device(lambda *a: sharded_routed_mlp(mesh, *a, form="exchange", buffer_rows=24))


@pytest.mark.parametrize("form, T", [("exchange", 33), ("gather", 1)])
def test_tokens_need_not_divide_by_the_devices(form, T):
  mesh = make_mesh(2, 4)
  assert_is_one_device(lambda *a: sharded_routed_mlp(mesh, *a, form=form), T)


@pytest.mark.parametrize("form", ["exchange", "gather"])
def test_choices_that_reach_no_expert_are_seen(form):
  """One choice of each token names an expert that does not exist; it must count as weight 0."""
  mesh = make_mesh(2, 4)
  (*arrays, weight_TX), routers = inputs()
  lost_TX = routers["balanced"].at[:, 1].set(jnp.where(jnp.arange(40) % 2, E, -1))
  spread = jax.jit(lambda *a: sharded_routed_mlp(mesh, *a, form=form))
  y_TD, rows = spread(*arrays, lost_TX, weight_TX)
  assert int(rows) == 40 * (X - 1)
  alone_TD, _ = routed_mlp(*arrays, routers["balanced"], weight_TX.at[:, 1].set(0))
  np.testing.assert_allclose(y_TD, alone_TD, rtol=1e-5, atol=1e-4)


def test_rows_go_where_the_plan_says_and_come_back():
  size_SR = np.array([[1, 0, 2], [3, 1, 0], [0, 4, 1]])
  for me in range(3):
    there, back = plans(jnp.asarray(size_SR), me)
    assert there[0].tolist() == [size_SR[me, :r].sum() for r in range(3)]
    assert there[2].tolist() == [size_SR[:me, r].sum() for r in range(3)]
    assert (there[1].tolist(), there[3].tolist()) == (size_SR[me].tolist(), size_SR[:, me].tolist())
    assert (back[1].tolist(), back[3].tolist()) == (there[3].tolist(), there[1].tolist())


def test_experts_that_do_not_divide_are_refused_with_the_numbers():
  (x_TD, up_EDF, down_EFD, weight_TX), routers = inputs()
  expert_TX = routers["balanced"]
  with pytest.raises(UserError, match="mesh.expert=8 does not divide model.n_routed_experts=12"):
    sharded_routed_mlp(make_mesh(1, 8), x_TD, up_EDF[:12], down_EFD[:12], expert_TX, weight_TX)


def test_a_misspelt_form_is_answered_with_the_nearest():
  (x_TD, up_EDF, down_EFD, weight_TX), routers = inputs()
  expert_TX = routers["balanced"]
  with pytest.raises(UserError, match="did you mean 'gather'"):
    sharded_routed_mlp(make_mesh(1, 8), x_TD, up_EDF, down_EFD, expert_TX, weight_TX, form="gathr")


PROCESS = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import test_expert_parallel as t
from nemocascade.mesh import BATCH, make_mesh
arrays, routers = t.inputs()
for data, expert in [(1, 8), (2, 4)]:
  mesh = make_mesh(data, expert)
  place = lambda a: jax.make_array_from_callback(
    a.shape, NamedSharding(mesh, PartitionSpec()), lambda i: np.asarray(a)[i])
  placed, chosen = jax.tree.map(place, (arrays, routers["balanced"]))
  spread = t.value_and_grads(lambda *a: t.sharded_routed_mlp(mesh, *a, form="exchange"))
  whole = jax.jit(spread, out_shardings=NamedSharding(mesh, PartitionSpec()))
  got = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), whole(*placed, chosen))
  t.assert_same(got, t.on_one_device()["balanced"])
print("the same")
"""


def test_two_processes_of_four_devices_are_one_device():
  assert_both_say("the same", PROCESS)
