"""Matrix products in the dtype of their operands, with fp32 sums; all of the package's products use it.

A TPU multiplies fp32 as bf16 by default. Here the dtype of the operands decides: bf16 operands are
multiplied as bf16, which is exact, and fp32 operands as fp32, which takes six passes on a TPU. Where the
compute dtype is bf16, few products have fp32 operands. Their share of Nano 30B's 6.4 GFLOPs per token in
the forward pass:
- router logits: 0.25% (2 x 2688 x 128 in each of 23 blocks);
- running sums of the scan: 0.01% (2 x 128 for each of 64 heads in 23 blocks);
- state times c when decoding: 0.4% (2 x 64 x 128 for each of 64 heads in 23 blocks);
- two triangular products of size sqrt(131072) when sampling: 0.01%;
- the reward head: negligible.
With six passes they take about 2% of the forward pass in training, and less than 4% of a decoded token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def precision(dtype) -> jax.lax.Precision | None:
  """The `precision` argument of a product: HIGHEST for fp32; None for bf16, whose products are exact."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(form: str, *arrays, dtype=None):
  """jnp.einsum of arrays of one dtype; the result has that dtype unless `dtype` names another."""
  return jnp.einsum(form, *arrays, precision=precision(jnp.result_type(*arrays)), preferred_element_type=dtype)


# einsum with fp32 sums and results. Its autodiff gradient mixes fp32 with the arrays' dtype, so use it where
# gradients are written by hand.
einsum_fp32 = functools.partial(einsum, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, w, axes: int = 1, dtype=None):
  """x [..., K] times w [K, ...] -> [..., ...], where K stands for `axes` contracted axes.

  Args:
    w: cast to x's dtype first.
    dtype: of the result; x's by default. Sums are fp32 and are rounded to it once. Gradients are also
      summed in fp32, and rounded once to the dtypes of x and w.
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
  """sum_t x[t] dy[t] of x [T, K] and dy [T, F] -> [K, F]; summed in fp32, rounded to `dtype`."""
  as_it_is = lambda x, dy: _dot(x, dy, (0,), (0,), dtype)
  if x.dtype == jnp.float32:
    return as_it_is(x, dy)

  def turned(x, dy):
    # XLA on CPU multiplies in bf16 only if the contracted axis is the last one of the left operand.
    x = jnp.moveaxis(x, 0, -1)
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return _dot(x, dy, (x.ndim - 1,), (0,), dtype)

  return jax.lax.platform_dependent(x, dy, cpu=turned, default=as_it_is)
