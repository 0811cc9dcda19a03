"""The chunked SSD scan equals the recurrence for any packing, in values and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from nemocascade.errors import UserError
from nemocascade.kernels.ssd import FORMS, ssd, ssd_ref

T = 32
PACKINGS = {
  "one_document": [1] * T,
  "edge_on_chunk": [1] * 8 + [2] * 24,
  "edge_in_chunk": [1] * 5 + [2] * 6 + [3] * 21,
  "many_per_chunk": [1, 2, 2, 3, 4, 4, 5] + [6] * 25,
  "padded": [1] * 11 + [2] * 9 + [0] * 12,
}


def inputs(packing, B=2, M=4, P=3, U=2, N=5):
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: jax.random.normal(key, (B, T, *shape))
  decay_BTM = -jax.nn.softplus(normal(keys[1], M))
  segment_ids_BT = jnp.broadcast_to(jnp.array(PACKINGS[packing])[None], (B, T))
  return normal(keys[0], M, P), decay_BTM, normal(keys[2], U, N), normal(keys[3], U, N), segment_ids_BT


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("chunk, form", [(1, "channels"), (7, "tokens"), (8, "channels"), (32, "tokens")])
def test_chunked_is_recurrent(packing, chunk, form):
  args = inputs(packing)
  y, state = jax.jit(lambda *a: ssd(*a, chunk=chunk, form=form))(*args)
  y_ref, state_ref = jax.jit(ssd_ref)(*args)
  real = (args[-1] > 0)[..., None, None]
  # fp32 sums of up to 32 terms in another order.
  chex.assert_trees_all_close(jnp.where(real, y, 0), jnp.where(real, y_ref, 0), atol=2e-5)
  chex.assert_trees_all_close(state, state_ref, atol=2e-5)


@functools.cache
def gradient_fn(chunk, goes_on, to_the_end, form=None):
  """Gradient of a function of y and the final state, in chunks, or token by token if `chunk` is None."""
  fn = functools.partial(ssd, chunk=chunk, form=form) if chunk else ssd_ref

  def loss(floats, segment_ids_BT):
    *floats, before = floats if goes_on else (*floats, None)
    y, state = fn(*floats, segment_ids_BT, initial_state=before)
    real = (segment_ids_BT > 0)[..., None, None]
    return jnp.sum(jnp.where(real, jnp.sin(y), 0)) + to_the_end * jnp.sum(jnp.cos(state))

  return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("chunk", [3, 32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("to_the_end", [False, True])
def test_chunked_is_recurrent_in_gradient(packing, chunk, form, goes_on, to_the_end):
  """With and without an initial state, and with and without a loss on the final state."""
  *floats, segment_ids_BT = inputs(packing)
  if goes_on:
    floats.append(jax.random.normal(jax.random.key(5), (2, 4, 3, 5)))
  got = gradient_fn(chunk, goes_on, to_the_end, form)(floats, segment_ids_BT)
  expected = gradient_fn(None, goes_on, to_the_end)(floats, segment_ids_BT)
  chex.assert_trees_all_close(got, expected, atol=1e-4)


def test_a_state_handed_on_continues_the_document():
  x, a, b, c, ids = inputs("one_document")
  fn = jax.jit(functools.partial(ssd, chunk=8))
  whole, end = fn(x, a, b, c, ids)
  _, middle = fn(*(v[:, :13] for v in (x, a, b, c, ids)))
  rest, end_ = fn(*(v[:, 13:] for v in (x, a, b, c, ids)), initial_state=middle)
  chex.assert_trees_all_close((rest, end_), (whole[:, 13:], end), atol=2e-5)


def test_an_unknown_form_is_refused():
  with pytest.raises(UserError, match="form of the SSD scan"):
    ssd(*inputs("padded"), chunk=8, form="groups")


@pytest.mark.parametrize("packing, form", [(packing, FORMS[i % 2]) for i, packing in enumerate(PACKINGS)])
@pytest.mark.parametrize("goes_on", [False, True])
def test_bf16_products_are_close_to_the_recurrence(packing, form, goes_on):
  """bf16 b and c make the products bf16; values and gradients keep two digits of the fp32 recurrence."""
  x, decay, b, c, segment_ids_BT = inputs(packing)
  b, c = b.astype(jnp.bfloat16), c.astype(jnp.bfloat16)
  floats = [x.astype(jnp.bfloat16).astype(jnp.float32), decay, b, c]
  if goes_on:
    floats.append(jax.random.normal(jax.random.key(5), (2, 4, 3, 5)))
  got = gradient_fn(8, goes_on, True, form)(floats, segment_ids_BT)
  wide = [a.astype(jnp.float32) for a in floats]
  expected = gradient_fn(None, goes_on, True)(wide, segment_ids_BT)
  for one, other, given in zip(got, expected, floats, strict=True):
    assert one.dtype == given.dtype
    # Operands of each product lose up to 2^-8, and the nonlinear loss adds to the error.
    gap = jnp.abs(one.astype(jnp.float32) - other)
    assert float(jnp.linalg.norm(gap)) < 0.02 * float(jnp.linalg.norm(other))
