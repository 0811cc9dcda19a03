"""The causal convolution equals a loop over tokens, and its gradients equal autodiff of the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.kernels.causal_conv import causal_conv, causal_conv_ref

B, T, C, W = 3, 12, 5, 4
SEGMENTS = np.array([[1] * 12, [1] * 2 + [2] * 3 + [3] * 7, [1] * 5 + [2] * 4 + [0] * 3], np.int32)


def inputs(bias=True, before=False, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(3), 5)
  of = lambda key, *shape: jax.random.normal(key, shape)
  x_BTC, before_BWC = of(keys[0], B, T, C).astype(dtype), of(keys[1], B, W - 1, C).astype(dtype)
  weight_WC, bias_C = of(keys[2], W, C), of(keys[3], C) if bias else None
  dy_BTC = of(keys[4], B, T, C).astype(dtype)
  return (x_BTC, weight_WC, bias_C, jnp.asarray(SEGMENTS), before_BWC if before else None), dy_BTC


def looped(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC):
  x_BTC, weight_WC = np.asarray(x_BTC, np.float64), np.asarray(weight_WC, np.float64)
  y_BTC = np.zeros_like(x_BTC) if bias_C is None else np.tile(np.asarray(bias_C, np.float64), (B, T, 1))
  for b, t, back in np.ndindex(B, T, W):
    if t >= back and segment_ids_BT[b, t - back] == segment_ids_BT[b, t]:
      y_BTC[b, t] += weight_WC[W - 1 - back] * x_BTC[b, t - back]
    elif t < back and before_BWC is not None and segment_ids_BT[b, t] == segment_ids_BT[b, 0]:
      y_BTC[b, t] += weight_WC[W - 1 - back] * np.asarray(before_BWC[b, t - back], np.float64)
  return y_BTC / (1 + np.exp(-y_BTC))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_loop_says_the_same(bias, before):
  args, _ = inputs(bias, before)
  np.testing.assert_allclose(causal_conv(*args), looped(*args), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
def test_gradients_are_those_of_autodiff(bias, before, dtype, tolerance):
  """In bf16 they equal the fp32 gradients of the same inputs up to 2^-8, because dx and dy are rounded."""
  args, dy_BTC = inputs(bias, before, dtype)
  grads = lambda fn, args, dy: jax.vjp(lambda *a: fn(*a[:3], args[3], *a[3:]), *args[:3], args[4])[1](dy)
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)
  got, expected = grads(causal_conv, args, dy_BTC), grads(causal_conv_ref, wide(args), wide(dy_BTC))
  assert got[0].dtype == dtype
  for one, other in zip(jax.tree.leaves(wide(got)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, atol=tolerance * max(1.0, float(jnp.abs(other).max())))


def test_a_token_at_a_time():
  (x_BTC, weight_WC, bias_C, _, before_BWC), _ = inputs(before=True)
  whole_BTC = causal_conv(x_BTC, weight_WC, bias_C, jnp.ones((B, T), jnp.int32), before_BWC)
  past_BSC = jnp.concatenate([before_BWC, x_BTC], axis=1)
  one = jnp.ones((B, 1), jnp.int32)
  steps = [causal_conv(x_BTC[:, t : t + 1], weight_WC, bias_C, one, past_BSC[:, t : t + W - 1]) for t in range(T)]
  chex.assert_trees_all_close(jnp.concatenate(steps, axis=1), whole_BTC, atol=1e-6)
