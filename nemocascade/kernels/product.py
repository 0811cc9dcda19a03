"""Rows times a matrix, in the rows' dtype with sums in fp32, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# Products of two arrays in their dtype; sums and results are fp32. Autodiff of it mixes the two: for formulas
# whose gradient is written by hand.
einsum_fp32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, w, axes: int = 1, dtype=None):
  """x [..., K] times w [K, ...] as [..., ...], where K are `axes` axes.

  Args:
    w: cast to x's dtype before.
    dtype: of the result, x's by default. Sums are fp32 and rounded to it once; those of the gradients, of
      the dtypes of x and w, too.
  """
  return _forward(x, w, axes, dtype)[0]


def _dot(x, w, axes_x, axes_w, dtype):
  dims = (tuple(axes_x), tuple(axes_w)), ((), ())
  return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32).astype(dtype)


def _forward(x, w, axes, dtype):
  of_dtype, w = jnp.zeros((), w.dtype), w.astype(x.dtype)
  y = _dot(x, w, range(x.ndim - axes, x.ndim), range(axes), dtype or x.dtype)
  return y, (x, w, of_dtype)


def _backward(axes, dtype, saved, dy):
  x, w, of_dtype = saved
  rows, dy = x.ndim - axes, dy.astype(x.dtype)
  dx = _dot(dy, w, range(rows, dy.ndim), range(axes, w.ndim), x.dtype)
  x, dy = x.reshape(-1, *x.shape[rows:]), dy.reshape(-1, *dy.shape[rows:])
  return dx, weight_product(x, dy, of_dtype.dtype)


product.defvjp(_forward, _backward)


def weight_product(x, dy, dtype):
  """sum_t x[t] dy[t] for x [T, K], dy [T, F] as [K, F]; in fp32, then of the dtype."""
  as_it_is = lambda x, dy: _dot(x, dy, (0,), (0,), dtype)
  if x.dtype == jnp.float32:
    return as_it_is(x, dy)

  def turned(x, dy):
    # XLA's CPU client multiplies in bf16 only where what is summed over is last on the left.
    x = jnp.moveaxis(x, 0, -1)
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return _dot(x, dy, (x.ndim - 1,), (0,), dtype)

  return jax.lax.platform_dependent(x, dy, cpu=turned, default=as_it_is)
