"""bf16 products are rounded once, forward and backward, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nemocascade.kernels.product import product, weight_product
from nemocascade.mesh import BATCH, make_mesh

SHAPES = {  # Shape of x, shape of w, number of axes summed over.
  "matrix": ((24, 16), (16, 40), 1),
  "rows": ((2, 8, 16), (16, 40), 1),
  "heads_out": ((2, 8, 16), (16, 2, 3, 4), 1),
  "heads_in": ((2, 8, 2, 3, 4), (2, 3, 4, 16), 3),
}
BF16, FP32 = jnp.bfloat16, jnp.float32


def inputs(shape, dtype):
  x, w, axes = SHAPES[shape]
  keys = jax.random.split(jax.random.key(7), 3)
  x, w = jax.random.normal(keys[0], x).astype(dtype), jax.random.normal(keys[1], w).astype(dtype)
  dy = jax.random.normal(keys[2], (*x.shape[: x.ndim - axes], *w.shape[axes:])).astype(dtype)
  return x, w, dy, axes


def exact(x, w, dy, axes):
  """(y, dx, dw) in fp64."""
  x, w, dy = (np.asarray(a.astype(FP32), np.float64) for a in (x, w, dy))
  rows = x.ndim - axes
  y = np.tensordot(x, w, axes)
  dx = np.tensordot(dy, w, (list(range(rows, dy.ndim)), list(range(axes, w.ndim))))
  dw = np.tensordot(x, dy, (list(range(rows)), list(range(rows))))
  return y, dx, dw


@jax.jit(static_argnums=(3, 4))
def with_gradients(x, w, dy, axes, dtype=None):
  y, pull = jax.vjp(lambda x, w: product(x, w, axes, dtype), x, w)
  return y, *pull(dy)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_values_and_gradients_are_exact_up_to_one_rounding(shape, dtype):
  args = inputs(shape, dtype)
  for got, expected in zip(with_gradients(*args), exact(*args), strict=True):
    assert got.dtype == dtype
    # 8 bits: the rounding error is at most 2^-8 of the value. fp32 sums of 40 terms of size 1 add 1e-5.
    np.testing.assert_allclose(got.astype(FP32), expected, rtol=2**-8 if dtype == BF16 else 0, atol=2e-5)


def test_weights_are_cast_and_their_gradient_is_not():
  """fp32 parameters with bf16 activations: the gradient of the parameters is never rounded to bf16."""
  x, w, dy, axes = inputs("rows", BF16)
  y, dx, dw = with_gradients(x, w.astype(FP32), dy.astype(FP32), axes, FP32)
  assert (y.dtype, dx.dtype, dw.dtype) == (FP32, BF16, FP32)
  expected = exact(x, w, dy, axes)
  np.testing.assert_allclose(y, expected[0], atol=2e-5)
  np.testing.assert_allclose(dw, expected[2], atol=2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_devices_are_one(dtype):
  x, w, dy, axes = inputs("heads_out", dtype)
  x, dy = (jnp.concatenate([a] * 4) for a in (x, dy))
  mesh = make_mesh(4, 2)
  put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
  got = with_gradients(put(x, BATCH), put(w, BATCH), put(dy, BATCH), axes)
  for one, several in zip(with_gradients(x, w, dy, axes), got, strict=True):
    # Gradients of w are summed over devices in bf16, with rounding errors of 2^-8 of the largest value.
    atol = 2**-6 * float(jnp.abs(one.astype(FP32)).max()) if dtype == BF16 else 2e-5
    np.testing.assert_allclose(several.astype(FP32), one.astype(FP32), atol=atol)


def test_weight_products_of_a_batch():
  keys = jax.random.split(jax.random.key(1), 2)
  x, dy = jax.random.normal(keys[0], (3, 32, 5)).astype(BF16), jax.random.normal(keys[1], (3, 32, 6)).astype(BF16)
  got = jax.jit(jax.vmap(lambda x, dy: weight_product(x, dy, FP32)))(x, dy)
  expected = np.einsum("ztk,ztf->zkf", *(np.asarray(a.astype(FP32), np.float64) for a in (x, dy)))
  np.testing.assert_allclose(got, expected, atol=1e-5)
