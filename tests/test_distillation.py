"""KLs to a teacher, computed in chunks, equal those of whole distributions in fp64, with bounded memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.kernels.distillation import (
  forward_kl_ref,
  kl_to_states,
  kl_to_top,
  reverse_kl_ref,
  top_logprobs,
)

B, T, D, V, Z = 4, 11, 8, 30, 3
KLS = {"reverse": reverse_kl_ref, "forward": forward_kl_ref}
kls = pytest.mark.parametrize("kl", KLS)


def inputs():
  """(x, head, teacher states, teacher index, teacher heads, wanted)."""
  keys = jax.random.split(jax.random.key(0), 6)
  return (
    jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V)),
    jax.random.normal(keys[2], (B, T, D)), jax.random.randint(keys[3], (B, T), 0, Z),
    jax.random.normal(keys[4], (Z, D, V)), jax.random.bernoulli(keys[5], 0.6, (B, T)),
  )  # fmt: skip


def np_logprobs(logits):
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(kl, x, head, states, teacher, heads, wanted):
  """Returns (kl_BT, gradients of its sum by x and by head), in fp64 without autodiff.

  With policy p and teacher q, the gradient by the logits is p (log p - log q - KL) for the reverse KL, and
  p - q for the forward KL.
  """
  x, head, states, heads = (np.asarray(a, np.float64) for a in (x, head, states, heads))
  own = np_logprobs(x @ head)
  there = np_logprobs(np.einsum("btd,btdv->btv", states, heads[np.asarray(teacher)]))
  p, q = np.exp(own), np.exp(there)
  if kl == "reverse":
    value = (p * (own - there)).sum(-1)
    slope = p * (own - there - value[..., None])
  else:
    value = (q * (there - own)).sum(-1)
    slope = p - q
  wanted = np.asarray(wanted)
  slope = np.where(wanted[..., None], slope, 0.0)
  return np.where(wanted, value, 0.0), slope @ head.T, np.einsum("btd,btv->dv", x, slope)


def with_gradient(fn, x, head):
  def total(x, head):
    kl_BT = fn(x, head)
    return jnp.sum(kl_BT), kl_BT

  (_, kl_BT), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, head)
  return kl_BT, *grads


@kls
@pytest.mark.parametrize("chunk", [1, 12, 1000])
def test_whole_vocabulary_is_the_equation_by_hand_in_value_and_gradient(kl, chunk):
  x, head, states, teacher, heads, wanted = inputs()
  got = with_gradient(
    lambda x, head: kl_to_states(KLS[kl], x, head, wanted, states, teacher, heads, chunk=chunk), x, head
  )
  chex.assert_trees_all_close(got, by_hand(kl, *inputs()), atol=2e-5)


@functools.cache
def taught(k):
  """The k likeliest tokens of the first teacher at every position."""
  _, _, states, _, heads, _ = inputs()
  return top_logprobs(states, heads[0], jnp.ones((B, T), bool), k=k, chunk=12)


def to_top(kl, k, chunk=12):
  (x, head, *_, wanted), said = inputs(), taught(k)
  return with_gradient(lambda x, head: kl_to_top(KLS[kl], x, head, wanted, *said, chunk=chunk), x, head)


def one_teacher():
  x, head, states, teacher, heads, wanted = inputs()
  return x, head, states, jnp.zeros_like(teacher), heads, wanted


@kls
def test_all_tokens_as_the_top_are_the_whole_vocabulary_in_value_and_gradient(kl):
  chex.assert_trees_all_close(to_top(kl, V), by_hand(kl, *one_teacher()), atol=2e-5)


@kls
def test_the_top_and_the_rest_are_a_distribution_of_k_and_one_outcomes(kl):
  x, head, states, teacher, heads, wanted = one_teacher()
  k = 4
  own, there = np_logprobs(np.asarray(x @ head, np.float64)), np_logprobs(np.asarray(states @ heads[0], np.float64))
  top = np.argsort(-there, axis=-1)[..., :k]
  pick = lambda a: np.take_along_axis(np.exp(a), top, -1)
  p, q = (np.concatenate([pick(a), 1 - pick(a).sum(-1, keepdims=True)], -1) for a in (own, there))
  p, q = (p, q) if kl == "reverse" else (q, p)
  expected = np.where(wanted, (p * np.log(p / q)).sum(-1), 0.0)
  np.testing.assert_allclose(to_top(kl, k)[0], expected, atol=1e-5)


@kls
def test_more_tokens_bring_it_nearer_to_the_whole_from_below(kl):
  whole = by_hand(kl, *one_teacher())[0]
  rows = [np.asarray(to_top(kl, k)[0]) for k in (1, 4)] + [whole]
  for less, more in zip(rows, rows[1:], strict=False):
    assert (less >= 0).all() and (less <= more + 1e-5).all() and (less < more - 1e-3).any()


@kls
def test_a_policy_cannot_come_nearer_by_leaving_all_of_the_top_alone(kl):
  """A reverse KL over the top tokens only would be lowest where the policy gives them no mass."""
  teacher = jnp.log(jnp.array([[[0.6, 0.3]]]))
  far, near = jnp.array([[[-9.0, -9.0, 9.0]]]), jnp.log(jnp.array([[[0.55, 0.25, 0.2]]]))
  tokens, wanted = jnp.array([[[0, 1]]]), jnp.ones((1, 1), bool)
  away, there = (kl_to_top(KLS[kl], x, jnp.eye(3), wanted, tokens, teacher)[0, 0] for x in (far, near))
  assert there < 0.1 < 1 < away


def test_the_likeliest_tokens_are_those_of_the_whole_distribution():
  _, _, states, _, heads, wanted = inputs()
  tokens, logprobs = top_logprobs(states, heads[0], wanted, k=3, chunk=5)
  expected = np_logprobs(np.asarray(states @ heads[0], np.float64))
  order = np.argsort(-expected, axis=-1)[..., :3]
  kept = np.asarray(wanted)[..., None]
  np.testing.assert_array_equal(tokens, np.where(kept, order, 0))
  np.testing.assert_allclose(logprobs, np.where(kept, np.take_along_axis(expected, order, -1), 0.0), atol=1e-5)


def memory(fn, *shapes):
  """Bytes of temporary memory of the gradient by the first two arguments."""
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  grad = jax.jit(jax.grad(lambda *a: jnp.sum(fn(*a)), argnums=(0, 1)))
  return grad.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("form", ["states", "top"])
def test_neither_the_distributions_nor_a_head_for_every_chunk_are_ever_held(form):
  """There are 64 chunks: one head saved per chunk would need as much memory as all logits."""
  B, T, D, V, Z, chunk = 4, 1024, 64, 4000, 2, 64
  x, head, wanted = ((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), bool)
  if form == "states":
    fn = lambda x, head, wanted, states, teacher, heads: kl_to_states(
      reverse_kl_ref, x, head, wanted, states, teacher, heads, chunk=chunk
    )
    used = memory(fn, x, head, wanted, x, ((B, T), jnp.int32), ((Z, D, V), jnp.float32))
  else:
    fn = lambda x, head, wanted, tokens, logprobs: kl_to_top(
      reverse_kl_ref, x, head, wanted, tokens, logprobs, chunk=chunk
    )
    used = memory(fn, x, head, wanted, ((B, T, 16), jnp.int32), ((B, T, 16), jnp.float32))
  logits, heads = B * T * V * 4, D * V * 4 * (B * T // chunk)
  assert used < min(logits, heads) / 3
