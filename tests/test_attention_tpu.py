"""The TPU compiler accepts the attention kernels for each TPU generation with its own memory layout."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from nemocascade.kernels.attention import LONG, attention

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is in libtpu: pip install -e '.[tpu]'",
)


def gradients(q, k, v, segment_ids_BT):
  loss = lambda *a: jnp.sum(attention(*a, segment_ids_BT).astype(jnp.float32))
  return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_long_rows_compile_to_the_kernels_that_skip_blocks(topology, dtype, monkeypatch):
  """T is no multiple of a block, and the heads are Nano's."""
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

  def text(T):
    arrays = of(2, T, 2, 16, 128), of(2, T, 2, 128), of(2, T, 2, 128), of(2, T, dtype=jnp.int32)
    return jax.jit(gradients).lower(*arrays).compile().as_text()

  assert all(f"attention_{kernel}" in text(3000) for kernel in ("forward", "dq", "dkv"))
  assert "attention_forward" not in text(LONG - 56)
