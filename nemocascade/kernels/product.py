"""Products in their operands' dtype with sums in fp32; all of the package's go through here.

A TPU multiplies fp32 as bf16 unless it is told otherwise, so the operands' dtype decides: bf16 operands are
multiplied as they are, which is exact, and fp32 operands as fp32, which costs a TPU six passes. Where the
compute dtype is bf16 few products have fp32 operands. Of Nano 30B's 6.4 GFLOPs a token forward they are:
the router's logits 0.25% (2 x 2688 x 128 in each of 23 blocks), the scan's running sums 0.01% (2 x 128 for
each of 64 heads in 23 blocks) and one token's state times c in decoding 0.4% (2 x 64 x 128 for each of the
64 heads), sampling's two triangles of sqrt(131072) 0.01%, the reward head nothing. Six passes make that
about 2% of the forward pass in training, and less than 4% of what a decoded token computes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def precision(dtype) -> jax.lax.Precision | None:
  """fp32 is multiplied as fp32; bf16 products are exact as they are."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(form: str, *arrays, dtype=None):
  """jnp.einsum of arrays of one dtype, which the result has too unless `dtype` names another."""
  return jnp.einsum(form, *arrays, precision=precision(jnp.result_type(*arrays)), preferred_element_type=dtype)


# Sums and results are fp32. Autodiff of it mixes fp32 with the arrays' dtype: for formulas whose gradient is
# written by hand.
einsum_fp32 = functools.partial(einsum, dtype=jnp.float32)


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
  how = dict(precision=precision(x.dtype), preferred_element_type=jnp.float32)
  return jax.lax.dot_general(x, w, dims, **how).astype(dtype)


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
