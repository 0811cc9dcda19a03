"""Tests of the shared update: a non-finite update leaves the state bitwise unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_policy_gradient as rl_laws
import test_reward_model as judge_laws
import test_sft as sft_laws
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemocascade.step import loss
from nemocascade.step.balance import RouterBalance
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.policy_gradient import policy_gradient_step
from nemocascade.step.reward_model import reward_model_step
from nemocascade.step.rows import to_rows
from nemocascade.step.sft import sft_step
from nemocascade.step.update import SKIPPED, apply_gradients
from nemocascade.types import TrainState

BAD = (float("nan"), float("inf"), -float("inf"))
TX = make_optimizer(peak_lr=0.1, warmup_steps=2, total_steps=9, schedule="cosine")
SIGN = RouterBalance(kind="sign", rate=0.5)


def fresh(**params):
  return TrainState(step=jnp.int32(3), params=params, opt_state=TX.init(params))


def add_to_bias(params, change_LE):
  return params | {"bias_LE": params["bias_LE"] + change_LE}


def of_sft(accumulate=1):
  """(state, function (state, factor) -> (state, metrics)); a non-finite factor poisons the update."""

  def score(params, *rows):
    scores = sft_laws.score({"table_VV": params["table_VV"]}, *rows)
    return scores.replace(logprobs_BT=scores.logprobs_BT * params["scale"])

  step = sft_step(score, TX, accumulate=accumulate, balance=SIGN, add_to_bias=add_to_bias)
  before = fresh(table_VV=sft_laws.state().params["table_VV"], bias_LE=jnp.zeros((1, 2)), scale=jnp.float32(1.0))

  def run(state, poison):
    # The poison goes in through a parameter, because tokens and masks are not floats.
    found, metrics = step(state.replace(params=state.params | {"scale": jnp.float32(poison)}), sft_laws.batch())
    return found.replace(params=found.params | {"scale": state.params["scale"]}), metrics

  return before, run


def of_rl(accumulate=1):
  r = rl_laws.rollout()
  rows, count = to_rows(r, rl_laws.grpo(r), loss.token_mean)
  step = policy_gradient_step(rl_laws.score, TX, accumulate=accumulate)
  at = tuple(np.argwhere(np.asarray(rows["mask"]))[0])

  def run(state, poison):
    return step(state, rows | {"advantages": rows["advantages"].at[at].multiply(poison)}, count)

  return fresh(**rl_laws.state().params), run


def of_judge():
  def reward(params, *rows):
    return judge_laws.reward(params, *rows) * params["scale"]

  step = reward_model_step(reward, TX)

  def run(state, poison):
    state = state.replace(params=state.params | {"scale": jnp.float32(poison)})
    found, metrics = step(state, judge_laws.rows([1], [1]), judge_laws.rows([2], [3]))
    return found.replace(params=found.params | {"scale": jnp.float32(1.0)}), metrics

  return fresh(worth_V=jnp.ones(4), scale=jnp.float32(1.0)), run


KINDS = {
  "sft": of_sft, "sft in pieces": functools.partial(of_sft, 4),
  "rl": of_rl, "rl in pieces": functools.partial(of_rl, 4), "reward model": of_judge,
}  # fmt: skip


def same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_batch_changes_no_bit_but_the_count_of_steps_and_the_next_one_learns(kind):
  before, run = KINDS[kind]()
  run = jax.jit(run, donate_argnums=0)
  copy = lambda state: jax.tree.map(jnp.array, state)  # noqa: E731
  good, metrics = run(copy(before), 1.0)
  assert float(metrics[SKIPPED]) == 0.0
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(good.params), jax.tree.leaves(before.params), strict=True))
  for poison in BAD:
    after, metrics = run(copy(before), poison)
    assert float(metrics[SKIPPED]) == 1.0
    same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert int(after.step) == int(before.step) + 1
    recovered, metrics = run(after, 1.0)
    assert float(metrics[SKIPPED]) == 0.0
    same_bits(recovered.params, good.params)  # As if the bad batch had not existed.
  assert run._cache_size() == 1


def test_the_routers_bias_moves_with_the_update_and_stays_with_it():
  before, run = of_sft()
  moved, _ = run(before, 1.0)
  assert np.any(moved.params["bias_LE"] != 0)
  kept, _ = run(before, float("nan"))
  assert not np.any(kept.params["bias_LE"])


@pytest.mark.parametrize(
  "grad, lr, value",
  [(1.0, 1e30, 0.0), (1.0, float("inf"), 0.0), (1e30, 1e-3, 0.0), (1.0, 0.1, float("nan"))],
  ids=["parameters that would be 1e30", "an infinite rate", "a gradient whose norm overflows", "the loss alone"],
)
def test_an_update_is_refused_by_any_of_what_it_would_write(grad, lr, value):
  params = {"w": jnp.ones(4), "u": jnp.zeros(2)}
  tx = optax.sgd(lr)
  before = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
  grads = jax.tree.map(lambda p: jnp.full_like(p, grad), params)
  after, metrics = apply_gradients(before, tx, grads, jnp.float32(value))
  assert float(metrics[SKIPPED]) == 1.0
  same_bits(after.params, params)


def test_one_bad_device_of_eight_is_enough():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
  params = {"w": place(jnp.ones(16))}
  before = TrainState(step=jnp.int32(0), params=params, opt_state=TX.init(params))
  grads = {"w": place(jnp.ones(16).at[13].set(jnp.nan))}
  update = jax.jit(lambda s, g: apply_gradients(s, TX, g, jnp.float32(0)), donate_argnums=0)
  after, metrics = update(before, grads)
  assert float(metrics[SKIPPED]) == 1.0
  np.testing.assert_array_equal(after.params["w"], np.ones(16))
  after, metrics = update(after, {"w": place(jnp.ones(16))})
  assert float(metrics[SKIPPED]) == 0.0 and np.all(np.asarray(after.params["w"]) != 1)
