"""Laws of the routers' balance: what each kind moves, by hand, and however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import if_rl
from configs.tiny import sft as sft_config
from experiments import rl, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model import moe
from nemocascade.model.hybrid import Hybrid, add_to_router_bias, init_params
from nemocascade.step.balance import RouterBalance, routing_metrics
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.policy_gradient import policy_gradient_step
from nemocascade.step.sft import sft_step
from nemocascade.types import Batch, Routing, TrainState

B, T, E, X = 4, 12, 4, 2
# Two MoE blocks in a unit that is scanned, and one behind it.
CONFIG = ModelConfig(
  vocab_size=16, hidden_size=16, hybrid_override_pattern="EE-EE-E", n_routed_experts=E,
  num_experts_per_tok=X, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
  intermediate_size=8, initializer_range=0.5, router_loss=True,
)  # fmt: skip
MODEL = Hybrid(CONFIG)
TX = make_optimizer(peak_lr=0.1, warmup_steps=0, total_steps=10, weight_decay=0.1)


def score(params, *args, model=MODEL):
  return model.apply({"params": params}, *args, method="score")


@functools.cache
def params():
  return init_params(CONFIG, jax.random.key(0))


def state():
  return TrainState(step=jnp.int32(0), params=params(), opt_state=TX.init(params()))


def biases_LE(params):
  """In the order of the blocks: the scanned unit's two, twice, then the last."""
  of = lambda unit, block: np.asarray(params[unit][block]["mixer"]["e_score_correction_bias"])
  scanned = np.stack([of("units_0", "blocks_0"), of("units_0", "blocks_1")], axis=1).reshape(-1, E)
  return np.concatenate([scanned, of("units_1", "blocks_0")[None]])


def batch():
  """Documents of unequal lengths with padding behind them, learned from in part."""
  keys = jax.random.split(jax.random.key(1))
  segment_ids_BT = jnp.array([[1] * 7 + [2] * 5, [1] * 3 + [0] * 9, [1] * 12, [1] * 4 + [2] * 4 + [0] * 4])
  mask_BT = jax.random.bernoulli(keys[1], 0.4, (B, T)) & (segment_ids_BT > 0)
  return Batch(jax.random.randint(keys[0], (B, T), 0, 16), segment_ids_BT, mask_BT.at[:, 0].set(False))


def rows():
  """The same as completions; of the last row nothing is learned."""
  data = batch()
  mask_BT = data.loss_mask_BT.at[3].set(False)
  zeros = jnp.zeros((B, T))
  return {
    "tokens": data.tokens_BT, "segment_ids": data.segment_ids_BT, "mask": mask_BT, "behaviour": zeros,
    "weights": mask_BT.astype(jnp.float32), "advantages": jnp.where(mask_BT, 0.5, 0.0),
  }  # fmt: skip


def step_of(stage, balance, accumulate):
  """(state, metrics) after one step of either stage."""
  how = dict(balance=balance, accumulate=accumulate, add_to_bias=functools.partial(add_to_router_bias, CONFIG))
  if stage == "sft":
    return jax.jit(sft_step(score, TX, **how))(state(), batch())
  step = jax.jit(policy_gradient_step(score, TX, **how))
  return step(state(), rows(), jnp.sum(rows()["weights"]))


def assert_same(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_a_loop_over_documents():
  keys = jax.random.split(jax.random.key(2))
  score_BTE = jax.random.uniform(keys[0], (B, T, E))
  chosen_BTE = jax.random.uniform(keys[1], (B, T, E)) < 0.5
  segment_ids_BT = np.asarray(batch().segment_ids_BT)
  expected = 0.0
  for b in range(B):
    for document in set(segment_ids_BT[b]) - {0}:
      own = segment_ids_BT[b] == document
      s, chosen = np.asarray(score_BTE[b][own], np.float64), np.asarray(chosen_BTE[b][own])
      p = (s / s.sum(axis=1, keepdims=True)).mean(axis=0)
      expected += own.sum() * np.sum(E / X * chosen.mean(axis=0) * p)
  got = moe.balance_loss(score_BTE, chosen_BTE, segment_ids_BT, X)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_equal_loads_cost_one_a_token():
  chosen_BTE = jnp.tile(jnp.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool), (B, T // 2, 1))
  loss = moe.balance_loss(jax.random.uniform(jax.random.key(0), (B, T, E)), chosen_BTE, jnp.ones((B, T), int), X)
  np.testing.assert_allclose(loss, B * T, rtol=1e-5)


def test_loads_and_biases_are_in_the_order_of_the_blocks():
  """Each block's bias is pushed to a pair of experts of its own, and its load goes there."""
  pairs = [(0, 1), (2, 3), (1, 2), (0, 3), (1, 3)]
  push_LE = np.zeros((5, E), np.float32)
  for block, pair in enumerate(pairs):
    push_LE[block, list(pair)] = 9.0
  pushed = add_to_router_bias(CONFIG, params(), push_LE)
  np.testing.assert_array_equal(biases_LE(pushed), push_LE)
  data = batch()
  routing = jax.jit(score)(pushed, data.tokens_BT, data.segment_ids_BT, None).routing
  np.testing.assert_array_equal(routing.load_LE, (push_LE > 0) * 35.0)  # 35 tokens are no padding.
  assert routing.dropped_L.tolist() == [0.0] * 5


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_sign_update_moves_each_bias_against_its_load_by_the_rate_and_nothing_else_does(stage):
  frozen, _ = step_of(stage, RouterBalance(), 1)
  moved, _ = step_of(stage, RouterBalance(kind="sign", rate=0.25), 1)
  data = batch()
  segment_ids_BT = data.segment_ids_BT if stage == "sft" else data.segment_ids_BT.at[3].set(0)
  load_LE = np.asarray(score(params(), data.tokens_BT, segment_ids_BT, None).routing.load_LE)
  real = int(jnp.sum(segment_ids_BT > 0))
  np.testing.assert_array_equal(biases_LE(frozen.params), 0.0)  # Under weight decay too.
  np.testing.assert_array_equal(biases_LE(moved.params), 0.25 * np.sign(real * X / E - load_LE))
  back = add_to_router_bias(CONFIG, moved.params, -biases_LE(moved.params))
  jax.tree.map(np.testing.assert_array_equal, back, frozen.params)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_auxiliary_loss_adds_its_mean_over_real_tokens_times_the_weight(stage):
  """The gradient, seen through the first step of an Adam so slow that it is proportional to it."""
  slow = make_optimizer(peak_lr=1.0, warmup_steps=0, total_steps=1, eps=1e6, clip_norm=1e9)

  def change(balance):
    before = TrainState(step=jnp.int32(0), params=params(), opt_state=slow.init(params()))
    if stage == "sft":
      after, _ = jax.jit(sft_step(score, slow, balance=balance))(before, batch())
    else:
      step = jax.jit(policy_gradient_step(score, slow, balance=balance))
      after, _ = step(before, rows(), jnp.sum(rows()["weights"]))
    return jax.tree.map(lambda a, b: 1e6 * (b - a), after.params, before.params)

  data = batch()
  segment_ids_BT = data.segment_ids_BT if stage == "sft" else data.segment_ids_BT.at[3].set(0)

  def mean(params):
    routing = score(params, data.tokens_BT, segment_ids_BT, None).routing
    return routing.loss / jnp.sum(segment_ids_BT > 0)

  expected = jax.jit(jax.grad(mean))(params())
  gate = lambda tree: tree["units_0"]["blocks_0"]["mixer"]["gate"]
  assert np.abs(gate(expected)).max() > 1e-3
  weighed = jax.tree.map(jnp.subtract, change(RouterBalance(kind="auxiliary", weight=8.0)), change(RouterBalance()))
  for mine, theirs in zip(jax.tree.leaves(weighed), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, 8.0 * theirs, atol=0.25)  # 1e6 times what fp32 leaves of a parameter.


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_pieces_of_a_batch_balance_as_the_whole(stage):
  both = RouterBalance(kind="both", rate=0.25, weight=2.0)
  assert_same(step_of(stage, both, 2), step_of(stage, both, 1))


def test_packed_documents_are_balanced_as_rows_of_their_own():
  data = batch()
  packed = score(params(), data.tokens_BT, data.segment_ids_BT, None).routing
  tokens, segments = np.zeros((2 * B, T), int), np.zeros((2 * B, T), int)
  for b in range(B):
    for document in (1, 2):
      own = np.asarray(data.segment_ids_BT[b]) == document
      tokens[2 * b + document - 1, : own.sum()] = data.tokens_BT[b][own]
      segments[2 * b + document - 1, : own.sum()] = 1
  assert_same(score(params(), jnp.asarray(tokens), jnp.asarray(segments), None).routing, packed)


def test_a_loss_that_is_not_paid_is_not_traced_and_one_that_is_asks_no_router_twice(monkeypatch):
  data = batch()
  without = Hybrid(ModelConfig(**{**vars(CONFIG), "router_loss": False}))
  products = lambda model: str(
    jax.make_jaxpr(functools.partial(score, model=model))(params(), data.tokens_BT, data.segment_ids_BT)
  ).count("dot_general")
  assert products(MODEL) == products(without) > 0
  monkeypatch.setattr(moe, "balance_loss", None)
  assert score(params(), data.tokens_BT, data.segment_ids_BT, model=without).routing.loss is None
  with pytest.raises(TypeError):
    score(params(), data.tokens_BT, data.segment_ids_BT)


def test_metrics_are_those_of_the_loads():
  routing = Routing(load_LE=jnp.array([[4.0, 4, 0, 0], [2, 2, 2, 2]]), dropped_L=jnp.array([0.0, 3]))
  got = {name: float(value) for name, value in routing_metrics(routing, jnp.float32(4)).items()}
  assert got == {
    "expert/load_max": 2.0, "expert/imbalance": 0.5, "expert/unused": 0.25, "expert/dropped": 3.0,
    "load_max/block_0": 2.0, "load_max/block_1": 1.0, "imbalance/block_0": 1.0, "imbalance/block_1": 0.0,
  }  # fmt: skip
  assert routing_metrics(None, jnp.float32(4)) == {}


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(kind="auxilary"), "unknown router_balance.kind 'auxilary': did you mean 'auxiliary'"),
    (dict(kind="sign", rate=0.0), "router_balance.rate=0.0: must be above 0 under kind='sign'"),
    (dict(kind="both", weight=-1.0), "router_balance.weight=-1.0"),
  ],
)
@pytest.mark.parametrize("check, config", [(sft.check, sft_config), (rl.check, if_rl)], ids=["sft", "rl"])
def test_a_bad_setting_is_named_before_anything_runs(check, config, fields, said):
  c = config.get_config()
  check(c)
  c.router_balance.update(fields)
  with pytest.raises(UserError, match=said):
    check(c)
