"""Attention in parts and in blocks equals the reference in value and gradient, with or without a cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.kernels import attention_tpu
from nemocascade.kernels.attention import attention, attention_ref, cached, decode_attention
from nemocascade.kernels.attention_blocks import blocks_touched

B, T, K, R, H = 2, 22, 2, 3, 4
PACKINGS = {"one": [1] * 22, "several": [1] * 3 + [2] * 9 + [3] * 10, "padded": [1] * 8 + [2] * 9 + [0] * 5}


@pytest.fixture
def several_parts_of_a_block(monkeypatch):
  """The TPU form divides the visits of blocks of 8 and 24."""
  monkeypatch.setattr(attention_tpu, "PARTS", dict.fromkeys(attention_tpu.PARTS, (4, 8)))


divided = pytest.mark.usefixtures("several_parts_of_a_block")


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


def skipping(form, block):
  """Options of `attention` for a form that skips blocks."""
  return (("form", form), ("block", block), ("interpret", form == "tpu"))


@divided
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
  "form, block", [("blocked", 1), ("blocked", 3), ("blocked", 8), ("blocked", 32), ("tpu", 8), ("tpu", 24)]
)
def test_blocks_are_the_definition(packing, form, block):
  floats, ids_BT, dy = inputs(packing)
  got = with_gradients(attention, floats, ids_BT, dy, skipping(form, block))
  chex.assert_trees_all_close(got, with_gradients(attention_ref, floats, ids_BT, dy), atol=2e-6)
  assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(got))


@divided
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form, block", [("blocked", 1), ("blocked", 4), ("blocked", 32), ("tpu", 8), ("tpu", 24)])
def test_another_document_changes_no_bit(dtype, form, block):
  """Documents 1 and 3 are replaced; outputs and gradients of document 2 are bit-identical."""
  floats, ids_BT, dy = inputs("several", dtype)
  own = (ids_BT == 2)[..., None]
  other = lambda a: jnp.where(own.reshape(own.shape[:2] + (1,) * (a.ndim - 2)), a, 100 * a[::-1] + 1)
  how = skipping(form, block)
  before = with_gradients(attention, floats, ids_BT, dy, how)
  after = with_gradients(attention, tuple(map(other, floats)), ids_BT, other(dy), how)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    rows = np.asarray(ids_BT == 2)
    np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[rows])
    assert not np.array_equal(np.asarray(a)[~rows], np.asarray(b)[~rows])


def blocks_by_hand(ids_T, block):
  """Counts the pairs of blocks in which a token of a document sees an earlier one or itself, or padding sees itself."""
  pairs = {
    (t // block, s // block)
    for t in range(len(ids_T))
    for s in range(t + 1)
    if s == t or (ids_T[t] > 0 and ids_T[s] == ids_T[t])
  }
  return len(pairs)


@pytest.mark.parametrize("block", [1, 2, 5, 11, 22])
def test_blocks_of_other_documents_are_not_touched(block):
  ids_BT = jnp.array([PACKINGS["several"], PACKINGS["padded"], [1] + [2] * 21])
  expected = [blocks_by_hand(ids.tolist() + [0] * (-T % block), block) for ids in ids_BT]
  assert blocks_touched(ids_BT, block).tolist() == expected
  whole = blocks_touched(jnp.ones((1, T), jnp.int32), block)[0]
  assert block >= 11 or whole > max(expected[:2])


@divided
@pytest.mark.parametrize("form", ["blocked", "tpu"])
def test_keys_of_skipped_blocks_are_not_read(form):
  """NaN in another document's blocks does not spread; a mask alone would multiply it by 0."""
  (q, k, v), ids_BT, _ = inputs("several")
  broken = lambda a: a.at[:, 12:].set(jnp.nan)
  how = dict(skipping(form, 4))
  y = attention(q, broken(k), broken(v), ids_BT, **how)
  np.testing.assert_array_equal(y[:, :12], attention(q, k, v, ids_BT, **how)[:, :12])
  assert jnp.isnan(y[:, 12:]).all()


def test_long_rows_on_a_cpu_are_computed_in_blocks():
  q, k, v = (jnp.zeros((1, 512, *shape)) for shape in ((1, 1, 2), (1, 2), (1, 2)))
  compiled = lambda T: jax.jit(attention).lower(q[:, :T], k[:, :T], v[:, :T], jnp.ones((1, T), jnp.int32)).compile()
  assert " while(" in compiled(512).as_text()
  assert " while(" not in compiled(64).as_text()


def test_in_bf16_scores_and_sums_are_fp32():
  """Compared with the reference in fp32 on the same inputs: only probabilities and results are rounded to 2^-8."""
  floats, ids_BT, dy = inputs("several", jnp.bfloat16)
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  y, grads = with_gradients(attention, floats, ids_BT, dy, (("queries", 4),))
  y_ref, grads_ref = with_gradients(attention_ref, wide(floats), ids_BT, wide(dy))
  chex.assert_trees_all_close(wide(y), y_ref, atol=2**-7 * 3)
  for got, expected in zip(wide(grads), grads_ref, strict=True):
    assert float(jnp.linalg.norm(got - expected)) < 0.01 * float(jnp.linalg.norm(expected))


@divided
@pytest.mark.parametrize(
  "how",
  [
    {"queries": 64},
    {"queries": 3},
    *(dict(skipping("blocked", n)) for n in (1, 4, 5, 32)),
    dict(skipping("tpu", 8)),
    dict(skipping("tpu", 24)),
  ],
)
def test_a_cache_before_the_row_is_its_beginning(how):
  (q, k, v), ids_BT, _ = inputs("one")
  first, room = 9, 12  # The cache has more slots than it uses.
  cache = lambda a: jnp.pad(
    jnp.swapaxes(a[:, :first], 1, 2), ((0, 0), (0, 0), (0, room - first), (0, 0)), constant_values=7
  )
  got = attention(
    q[:, first:], k[:, first:], v[:, first:], ids_BT[:, first:],
    before=cached(cache(k), cache(v), jnp.full((B,), first), ids_BT), **how,
  )  # fmt: skip
  chex.assert_trees_all_close(got, attention_ref(q, k, v, ids_BT)[:, first:], atol=2e-6)


@pytest.mark.parametrize("block", [1_024, 5])
def test_one_query_is_the_row_s_last(block):
  """Caches are read whole, and in blocks that do not divide them."""
  (q, k, v), ids_BT, _ = inputs("one")
  k_BKSH, v_BKSH = (jnp.swapaxes(a, 1, 2) for a in (k, v))
  whole = attention_ref(q, k, v, ids_BT)
  decode = jax.jit(functools.partial(decode_attention, block=block))
  for t in (0, 7, T - 1):
    got = decode(q[:, t], k_BKSH, v_BKSH, jnp.full((B,), t + 1))
    np.testing.assert_allclose(got, whole[:, t], atol=2e-6)
  two = (jnp.stack([jnp.full_like(a, jnp.nan), a]) for a in (k_BKSH, v_BKSH))  # Of which the second is used.
  np.testing.assert_array_equal(decode(q[:, T - 1], *two, jnp.full((B,), T), 1), got)
  beside = decode(q[:, 7], k_BKSH, v_BKSH, jnp.array([8, T]))
  np.testing.assert_array_equal(beside[0], decode(q[:, 7], k_BKSH, v_BKSH, jnp.array([8, 8]))[0])
