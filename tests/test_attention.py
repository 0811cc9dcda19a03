"""Attention in parts and blocks of queries equals the reference in value and gradient, with or without a cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.kernels.attention import attention, attention_ref, decode_attention

B, T, K, R, H = 2, 22, 2, 3, 4
PACKINGS = {"one": [1] * 22, "several": [1] * 3 + [2] * 9 + [3] * 10, "padded": [1] * 8 + [2] * 9 + [0] * 5}


def inputs(packing, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(4), 4)
  of = lambda key, *shape: jax.random.normal(key, (B, T, *shape)).astype(dtype)
  ids_BT = jnp.broadcast_to(jnp.array(PACKINGS[packing])[None], (B, T))
  return (of(keys[0], K, R, H), of(keys[1], K, H), of(keys[2], K, H)), ids_BT, of(keys[3], K, R, H)


@functools.partial(jax.jit, static_argnums=(0, 4))
def with_gradients(fn, floats, ids_BT, dy, options=()):
  """Value and gradients at real tokens only; the output at padding is undefined."""
  real = (ids_BT > 0)[..., None, None, None]
  y, pull = jax.vjp(lambda *a: jnp.where(real, fn(*a, ids_BT, **dict(options)), 0), *floats)
  return y, pull(dy)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("parts, queries", [(1, 64), (4, 64), (1, 5), (2, 4), (4, 1)])
def test_parts_and_blocks_are_the_definition(packing, parts, queries):
  floats, ids_BT, dy = inputs(packing)
  got = with_gradients(attention, floats, ids_BT, dy, (("parts", parts), ("queries", queries)))
  chex.assert_trees_all_close(got, with_gradients(attention_ref, floats, ids_BT, dy), atol=2e-6)


def test_in_bf16_scores_and_sums_are_fp32():
  """Compared with the reference in fp32 on the same inputs: only probabilities and results are rounded to 2^-8."""
  floats, ids_BT, dy = inputs("several", jnp.bfloat16)
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  y, grads = with_gradients(attention, floats, ids_BT, dy, (("queries", 4),))
  y_ref, grads_ref = with_gradients(attention_ref, wide(floats), ids_BT, wide(dy))
  chex.assert_trees_all_close(wide(y), y_ref, atol=2**-7 * 3)
  for got, expected in zip(wide(grads), grads_ref, strict=True):
    assert float(jnp.linalg.norm(got - expected)) < 0.01 * float(jnp.linalg.norm(expected))


@pytest.mark.parametrize("queries", [64, 3])
def test_a_cache_before_the_row_is_its_beginning(queries):
  (q, k, v), ids_BT, _ = inputs("one")
  first, room = 9, 12  # The cache has more slots than it uses.
  cache = lambda a: jnp.pad(
    jnp.swapaxes(a[:, :first], 1, 2), ((0, 0), (0, 0), (0, room - first), (0, 0)), constant_values=7
  )
  got = attention(
    q[:, first:], k[:, first:], v[:, first:], ids_BT[:, first:],
    before=(cache(k), cache(v), jnp.full((B,), first)), queries=queries,
  )  # fmt: skip
  chex.assert_trees_all_close(got, attention_ref(q, k, v, ids_BT)[:, first:], atol=2e-6)


def test_one_query_is_the_row_s_last():
  (q, k, v), ids_BT, _ = inputs("one")
  k_BKSH, v_BKSH = (jnp.swapaxes(a, 1, 2) for a in (k, v))
  whole = attention_ref(q, k, v, ids_BT)
  for t in (0, 7, T - 1):
    got = decode_attention(q[:, t], k_BKSH, v_BKSH, jnp.full((B,), t + 1))
    np.testing.assert_allclose(got, whole[:, t], atol=2e-6)
