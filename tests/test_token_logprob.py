"""Chunked log-probabilities equal those of all rows at once, and never hold all logits."""

import chex
import jax
import jax.numpy as jnp
import pytest

from nemocascade.kernels.token_logprob import token_logprob, token_logprob_ref

WANTED = {
  "all": lambda B, T: jnp.ones((B, T), bool),
  "some": lambda B, T: jax.random.bernoulli(jax.random.key(3), 0.3, (B, T)),
  "rows_differ": lambda B, T: jnp.arange(T)[None] < jnp.array([[0], [1], [T], [T // 2], [3]]),
  "none": lambda B, T: jnp.zeros((B, T), bool),
}


def inputs(B=5, T=14, D=8, V=50):
  keys = jax.random.split(jax.random.key(0), 3)
  tokens_BT = jax.random.randint(keys[2], (B, T), 0, V)
  return jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V)), tokens_BT


def definition(x_BTD, head_DV, tokens_BT, wanted_BT):
  out = token_logprob_ref(x_BTD.reshape(-1, x_BTD.shape[-1]), head_DV, tokens_BT.reshape(-1), temperature=0.7)
  return tuple(jnp.where(wanted_BT, a.reshape(tokens_BT.shape), 0.0) for a in out)


@pytest.mark.parametrize("chunk", [1, 16, 30, 10_000])
@pytest.mark.parametrize("wanted", WANTED)
def test_chunked_is_the_definition_in_value_and_gradient(wanted, chunk):
  x, head, tokens = inputs()
  wanted_BT = WANTED[wanted](*tokens.shape)

  def loss(fn):
    def of(x, head):
      found = logprob, entropy, normalizer = fn(x, head, tokens, wanted_BT)
      return jnp.sum(jnp.sin(logprob)) + jnp.sum(jnp.cos(entropy)) + jnp.sum(jnp.sin(normalizer)), found

    return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(x, head)

  chunked = loss(lambda *a: token_logprob(*a, temperature=0.7, chunk=chunk))
  chex.assert_trees_all_close(chunked, loss(definition), atol=1e-4)


def test_neither_all_logits_nor_a_head_for_every_chunk_are_ever_held():
  """There are 64 chunks: one head saved per chunk would need as much memory as all logits."""
  B, T, D, V, chunk = 4, 1024, 64, 4000, 64
  x, head, tokens, wanted = (jax.ShapeDtypeStruct(s, d) for s, d in (
    ((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32), ((B, T), bool)))  # fmt: skip
  grad = jax.jit(jax.grad(lambda *a: token_logprob(*a, chunk=chunk)[0].sum(), argnums=(0, 1)))
  used = grad.lower(x, head, tokens, wanted).compile().memory_analysis().temp_size_in_bytes
  logits, heads = B * T * V * 4, D * V * 4 * (B * T // chunk)
  assert used < min(logits, heads) / 3
