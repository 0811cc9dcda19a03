"""A policy of a few parameters, rollouts and gradients for the tests of the policy-gradient step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nemocascade.advantage import grpo
from nemocascade.segments import segment_starts
from nemocascade.step import loss
from nemocascade.step.policy_gradient import (
  policy_gradient_step,
)
from nemocascade.step.rows import to_rows
from nemocascade.types import Prefix, Rollout, Scores, TrainState

V, Q, G, T = 6, 4, 4, 5
HEADS_ZDV = jax.random.normal(jax.random.key(5), (2, 3, V))  # Heads of two teachers.
TX = optax.sgd(1.0)  # With a rate of 1, the change of the parameters is minus the gradient.


def score(params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, after=None, temperature=1.0):
  """A bigram model over rows of documents: the table is the head, the one-hot previous token is the state."""
  starts_BT = segment_starts(segment_ids_BT)
  x_BTD = jnp.pad(jax.nn.one_hot(tokens_BT[:, :-1], V), ((0, 0), (1, 0), (0, 0)))
  logits_BTV = jnp.pad(params["table_VV"][tokens_BT[:, :-1]], ((0, 0), (1, 0), (0, 0)))
  if after is not None:
    prefix, length_Q = after
    first = lambda a_QV: jnp.repeat(a_QV, tokens_BT.shape[0] // length_Q.shape[0], axis=0)  # noqa: E731
    starts_BT = starts_BT.at[:, 0].set(False)
    x_BTD, logits_BTV = x_BTD.at[:, 0].set(first(*prefix.units)), logits_BTV.at[:, 0].set(first(prefix.last_QD))
  logprobs_BTV = jax.nn.log_softmax(logits_BTV / temperature)
  chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[..., None], axis=-1)[..., 0]
  entropy_BT = -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)
  only = lambda a_BT: jnp.where((segment_ids_BT > 0) & ~starts_BT, a_BT, 0.0)  # noqa: E731
  distance_BT = distance(x_BTD, params["table_VV"], wanted_BT, lambda fn, shared: fn) if distance else None
  return Scores(only(chosen_BT), only(entropy_BT), distance_BT=distance_BT)


def take_in(params, prompts):
  """The one-hot last token of each prompt, and its row of the table, through which gradients flow."""
  last_Q = jnp.take_along_axis(prompts.tokens_QP, prompts.length_Q[:, None] - 1, axis=1)[:, 0]
  return Prefix(params["table_VV"][last_Q], (jax.nn.one_hot(last_Q, V),)), None


def state():
  params = {"table_VV": jax.random.normal(jax.random.key(0), (V, V))}
  return TrainState(step=jnp.int32(0), params=params, opt_state=TX.init(params))


def own_logprobs(r):
  scores = score(state().params, r.tokens_QGT.reshape(-1, T), r.segment_ids_QGT.reshape(-1, T))
  return scores.logprobs_BT.reshape(r.tokens_QGT.shape)


def rollout(seed=1, noise=0.0):
  """Completions of 1 to 3 tokens after a prompt of 2. `noise` makes the sampler differ from the trainer."""
  keys = jax.random.split(jax.random.key(seed), 8)
  length_QG1 = jax.random.randint(keys[0], (Q, G, 1), 3, T + 1)
  place_11T = jnp.arange(T)[None, None]
  tokens_QGT = jax.random.randint(keys[1], (Q, G, T), 0, V)
  r = Rollout(
    tokens_QGT=jnp.where(place_11T < 2, tokens_QGT[:, :1], tokens_QGT),
    segment_ids_QGT=(place_11T < length_QG1).astype(jnp.int32),
    loss_mask_QGT=(place_11T >= 2) & (place_11T < length_QG1),
    behaviour_logprobs_QGT=jnp.zeros((Q, G, T)),
    rewards_QG=jax.random.normal(keys[2], (Q, G)),
    valid_QG=jax.random.bernoulli(keys[3], 0.8, (Q, G)),
  )
  own_QGT = own_logprobs(r)
  sampled_QGT = own_QGT + noise * jax.random.normal(keys[4], (Q, G, T))
  teacher_QGT = own_QGT + jax.random.normal(keys[5], (Q, G, T))
  return r.replace(
    behaviour_logprobs_QGT=jnp.where(r.loss_mask_QGT, sampled_QGT, 0.0),
    teacher_logprobs_QGT=teacher_QGT,
    reference_logprobs_QGT=teacher_QGT - 0.5,
    teacher_states_QGTD=(states_QGTD := jax.random.normal(keys[6], (Q, G, T, 3))),
    teacher_Q=(teacher_Q := jax.random.randint(keys[7], (Q,), 0, 2)),
    **dict(zip(("top_tokens_QGTK", "top_logprobs_QGTK"), likeliest(states_QGTD, teacher_Q), strict=True)),
  )


def likeliest(states_QGTD, teacher_Q, k=3):
  logprobs_QGTV = teacher_logprobs(states_QGTD, teacher_Q)
  return jax.lax.top_k(logprobs_QGTV, k)[::-1]


def teacher_logprobs(states_QGTD, teacher_Q):
  return jax.nn.log_softmax(jnp.einsum("QGTD,QDV->QGTV", states_QGTD, HEADS_ZDV[teacher_Q]))


def gradient(r, advantage=grpo, aggregation=loss.token_mean, **slots):
  rows, count = jax.jit(lambda r: to_rows(r, advantage(r), aggregation))(r)
  return gradient_of_rows(rows, count, **slots)


def gradient_of_rows(rows, count, prompts=None, **slots):
  if noise := slots.pop("moved", 0.0):  # As after an update: the proximal policy differs from the current one.
    moved_BT = noise * jnp.sin(7.0 * rows["tokens"] + rows["behaviour"])
    rows = rows | {"proximal": rows["behaviour"] + moved_BT}
  before = state()
  step = policy_gradient_step(score, TX, take_in_fn=take_in, **slots)
  after, metrics = jax.jit(step)(before, rows, count, HEADS_ZDV, prompts)
  return before.params["table_VV"] - after.params["table_VV"], metrics


def assert_same(got, expected, atol=1e-6):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=atol)
