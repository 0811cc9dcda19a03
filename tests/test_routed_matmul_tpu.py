"""The TPU compiler accepts the kernels for each TPU generation with its own memory layout."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from nemocascade.kernels.routed_matmul import routed_matmul, routed_mlp

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is in libtpu: pip install -e '.[tpu]'",
)
T, X, E, D, F = 512, 2, 8, 256, 200  # F is not a multiple of 128, like Nano's.


def mlp_gradients(x_TD, up, down, expert_TX, weight_TX):
  loss = lambda x, u, d, w: jnp.sum(routed_mlp(x, u, d, expert_TX, w)[0].astype(jnp.float32))
  return jax.grad(loss, argnums=(0, 1, 2, 3))(x_TD, up, down, weight_TX)


def shard_gradients(x_ND, w_EDF, sizes, offset):
  loss = lambda x, w: jnp.sum(jnp.sin(routed_matmul(x, w, sizes, offset=offset)))
  return jax.grad(loss, argnums=(0, 1))(x_ND, w_EDF)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("program", ["mlp", "shard"])
def test_gradients_compile(topology, program, monkeypatch):
  """A program compiled for a TPU uses the TPU form by default, on any machine."""
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))
  int32 = jnp.int32
  if program == "mlp":
    lowered = jax.jit(mlp_gradients).lower(of(T, D), of(E, D, F), of(E, F, D), of(T, X, dtype=int32), of(T, X))
  else:
    lowered = jax.jit(shard_gradients).lower(
      of(1000, D, dtype=jnp.float32), of(E // 2, D, F, dtype=jnp.float32), of(E, dtype=int32), of(dtype=int32)
    )
  text = lowered.compile().as_text()
  assert "%routed_product" in text and "%routed_weight_product" in text
