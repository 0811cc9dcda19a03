"""Tests of the SFT step: accumulated, packed or sharded, it is the same step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemocascade.errors import UserError
from nemocascade.segments import segment_starts
from nemocascade.step.sft import sft_step
from nemocascade.types import Batch, Routing, Scores, TrainState

V, B, T = 7, 8, 6
TX = optax.sgd(1.0)  # With a rate of 1, the change of the parameters is minus the gradient.


def score(params, tokens_BT, segment_ids_BT, wanted_BT=None):
  """A bigram model; the step needs only its scores."""
  logits_BTV = params["table_VV"][tokens_BT[:, :-1]]
  logprobs_BTV = jax.nn.log_softmax(logits_BTV)
  chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
  entropy_BT = -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)
  follows_BT = ~segment_starts(segment_ids_BT) & (segment_ids_BT > 0)
  place = lambda a_BT: jnp.where(follows_BT, jnp.pad(a_BT, ((0, 0), (1, 0))), 0.0)  # noqa: E731
  real_BT = segment_ids_BT > 0
  load_E = jnp.stack([jnp.sum(real_BT & (tokens_BT % 2 == e)) for e in (0, 1)])
  routing = Routing(load_E[None].astype(jnp.float32), jnp.zeros(1))
  normalizer_BT = place(jax.nn.logsumexp(logits_BTV, axis=-1))
  return Scores(place(chosen_BT), place(entropy_BT), routing, normalizer_BT=normalizer_BT)


step = jax.jit(sft_step(score, TX))


def state():
  params = {"table_VV": jax.random.normal(jax.random.key(0), (V, V))}
  return TrainState(step=jnp.int32(0), params=params, opt_state=TX.init(params))


def batch(seed=1):
  """Rows with different numbers of learned tokens; the first token of a row is never learned."""
  tokens, mask = jax.random.split(jax.random.key(seed))
  mask_BT = jax.random.bernoulli(mask, jnp.linspace(0.1, 0.9, B)[:, None], (B, T))
  return Batch(
    tokens_BT=jax.random.randint(tokens, (B, T), 0, V),
    segment_ids_BT=jnp.ones((B, T), jnp.int32),
    loss_mask_BT=mask_BT.at[:, 0].set(False),
  )


def assert_same(got, expected, atol=1e-6):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=atol)


def test_the_gradient_is_that_of_the_mean_over_learned_tokens():
  data, before = batch(), state()
  after, metrics = step(before, data)
  # In fp64, token by token: the gradient of log p(v | u) is one_hot(v) - p(. | u) in row u.
  table_VV, tokens_BT = (
    np.asarray(before.params["table_VV"], np.float64),
    np.asarray(data.tokens_BT),
  )
  logprobs_VV = table_VV - np.log(np.exp(table_VV).sum(axis=1, keepdims=True))
  places = np.argwhere(np.asarray(data.loss_mask_BT))
  value, grad_VV = 0.0, np.zeros((V, V))
  for b, t in places:
    u, v = tokens_BT[b, t - 1 : t + 1]
    value -= logprobs_VV[u, v] / len(places)
    grad_VV[u] -= (np.eye(V)[v] - np.exp(logprobs_VV[u])) / len(places)
  np.testing.assert_allclose(metrics["loss/sft"], value, rtol=1e-5)
  np.testing.assert_allclose(table_VV - after.params["table_VV"], grad_VV, atol=1e-6)
  np.testing.assert_allclose(metrics["norm/grad"], np.linalg.norm(grad_VV), rtol=1e-5)
  assert (int(after.step), float(metrics["tokens/learned"])) == (1, len(places))


def test_z_loss_adds_the_mean_square_of_the_log_normalizer_and_its_gradient():
  data, before = batch(), state()
  plain, (after, metrics) = step(before, data)[0], jax.jit(sft_step(score, TX, accumulate=2, z_loss=0.5))(before, data)
  table_VV = np.asarray(before.params["table_VV"], np.float64)
  z_V, places = np.log(np.exp(table_VV).sum(axis=1)), np.argwhere(np.asarray(data.loss_mask_BT))
  used = [int(data.tokens_BT[b, t - 1]) for b, t in places]
  share_V = np.bincount(used, minlength=V) / len(used)
  np.testing.assert_allclose(metrics["loss/z"], share_V @ z_V**2, rtol=1e-5)
  grad_VV = 0.5 * (share_V * 2 * z_V)[:, None] * np.exp(table_VV - z_V[:, None])
  np.testing.assert_allclose(plain.params["table_VV"] - after.params["table_VV"], grad_VV, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_is_whole_though_pieces_hold_unequal_numbers_of_tokens(accumulate):
  whole = step(state(), batch())
  assert_same(jax.jit(sft_step(score, TX, accumulate=accumulate))(state(), batch()), whole)


def test_packed_documents_are_the_same_step_as_rows_of_their_own():
  data = batch()
  pairs = lambda a: a.reshape(B // 2, 2 * T)  # noqa: E731
  packed = Batch(
    tokens_BT=pairs(data.tokens_BT),
    segment_ids_BT=jnp.tile(jnp.repeat(jnp.array([[1, 2]]), T, axis=1), (B // 2, 1)),
    loss_mask_BT=pairs(data.loss_mask_BT),
  )
  assert_same(step(state(), packed), step(state(), data))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_are_one(accumulate):
  rows = 2 * B
  two = [batch(1), batch(2)]
  data = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *two)
  one = jax.jit(sft_step(score, TX, accumulate=accumulate))(state(), data)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  assert mesh.size == 8 and data.tokens_BT.shape[0] == rows
  spread = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
  copies = jax.device_put(state(), NamedSharding(mesh, PartitionSpec()))
  assert_same(jax.jit(sft_step(score, TX, accumulate=accumulate))(copies, spread), one)


def test_a_batch_that_learns_nothing_changes_nothing():
  data = batch()
  data = data.replace(loss_mask_BT=jnp.zeros_like(data.loss_mask_BT))
  after, metrics = step(state(), data)
  assert_same(after.params, state().params, atol=0)
  assert all(bool(jnp.isfinite(value)) for value in metrics.values())


def test_what_tokens_are_does_not_matter_where_nothing_is_learned_from_them():
  data = batch()
  # Padding at the end of rows has segment 0 and any tokens.
  cut = data.replace(
    segment_ids_BT=data.segment_ids_BT.at[:, 4:].set(0),
    loss_mask_BT=data.loss_mask_BT.at[:, 4:].set(False),
  )
  other = cut.replace(tokens_BT=cut.tokens_BT.at[:, 4:].set(3))
  after, _ = step(state(), cut)
  assert_same(step(state(), other)[0].params, after.params, atol=0)


def test_several_steps_are_one_compilation():
  accumulated, current = jax.jit(sft_step(score, TX, accumulate=2)), state()
  for seed in range(3):
    current, _ = accumulated(current, batch(seed))
  assert accumulated._cache_size() == 1
  assert int(current.step) == 3


def test_expert_load_is_in_units_of_the_fair_share():
  data = batch()
  odd = data.replace(tokens_BT=jnp.ones((B, T), jnp.int32))
  even = data.replace(tokens_BT=jnp.tile(jnp.array([[0, 1]]), (B, T // 2)))
  load = lambda data: step(state(), data)[1]["expert/load_max"]  # noqa: E731
  assert (float(load(odd)), float(load(even))) == (2.0, 1.0)


def test_pieces_that_do_not_divide_the_rows_are_refused():
  with pytest.raises(UserError, match="accumulate=3 does not divide the 8 rows"):
    sft_step(score, TX, accumulate=3)(state(), batch())
