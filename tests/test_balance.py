"""Tests of router balancing: what each kind changes, computed by hand, for any split of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.tiny import if_rl
from configs.tiny import sft as sft_config
from experiments import rl, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model import moe
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.router_bias import add_to_router_bias
from nemocascade.step.balance import RouterBalance, routing_metrics
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.policy_gradient import policy_gradient_step
from nemocascade.step.sft import sft_step
from nemocascade.types import Batch, Routing, Scores, TrainState

pytestmark = pytest.mark.usefixtures("compiled_fast")

B, T, V, L, E, X = 4, 12, 8, 2, 4, 2
# Two MoE blocks in a scanned unit that repeats three times, and one MoE block after it.
CONFIG = ModelConfig(
  vocab_size=V, hidden_size=16, hybrid_override_pattern="EE-EE-EE-E", n_routed_experts=E,
  num_experts_per_tok=X, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
  intermediate_size=8, initializer_range=0.5, router_loss=True,
)  # fmt: skip
TX = make_optimizer(peak_lr=0.1, warmup_steps=0, total_steps=10, weight_decay=0.1)
SLOW = make_optimizer(peak_lr=1.0, warmup_steps=0, total_steps=1, eps=1e6, clip_norm=1e9)


def params():
  keys = jax.random.split(jax.random.key(0))
  return {
    "table_VV": jax.random.normal(keys[0], (V, V)),
    "gate_LVE": jax.random.normal(keys[1], (L, V, E)),
    "e_score_correction_bias": jnp.zeros((L, E)),
  }


def add_to_bias(params, change_LE):
  return params | {"e_score_correction_bias": params["e_score_correction_bias"] + change_LE}


@jax.jit
def score(params, tokens_BT, segment_ids_BT, wanted_BT=None, *, temperature=1.0):
  """A bigram model; its logits pass through two routers that do not change them."""
  x_BTV = params["table_VV"][tokens_BT]
  loads, losses = [], []
  for gate_VE, bias_E in zip(params["gate_LVE"], params["e_score_correction_bias"], strict=True):
    expert_TX, _, score_TE = moe.route(x_BTV.reshape(-1, V), gate_VE, bias_E, CONFIG)
    chosen_TE = jnp.any(expert_TX[..., None] == jnp.arange(E)[None, None], axis=1)
    loads.append(jnp.sum(chosen_TE & (segment_ids_BT > 0).reshape(-1, 1), axis=0, dtype=jnp.float32))
    by_row = (a.reshape(*tokens_BT.shape, E) for a in (score_TE, chosen_TE))
    losses.append(jnp.sum(moe.balance_loss(*by_row, segment_ids_BT, X)))
  logprobs_BT = jnp.take_along_axis(jax.nn.log_softmax(x_BTV[:, :-1] / temperature), tokens_BT[:, 1:, None], axis=-1)[
    ..., 0
  ]
  logprobs_BT = jnp.pad(logprobs_BT, ((0, 0), (1, 0)))
  return Scores(logprobs_BT, jnp.zeros_like(logprobs_BT), Routing(jnp.stack(loads), jnp.zeros(L), sum(losses)))


@functools.cache
def batch():
  """Documents of different lengths, padded; only part of their tokens are learned."""
  keys = jax.random.split(jax.random.key(1))
  segment_ids_BT = jnp.array([[1] * 7 + [2] * 5, [1] * 3 + [0] * 9, [1] * 12, [1] * 4 + [2] * 4 + [0] * 4])
  mask_BT = jax.random.bernoulli(keys[1], 0.4, (B, T)) & (segment_ids_BT > 0)
  return Batch(jax.random.randint(keys[0], (B, T), 0, V), segment_ids_BT, mask_BT.at[:, 0].set(False))


def seen_by(stage):
  """Segment ids as the balance sees them: in RL a row without learned tokens counts as padding."""
  segment_ids_BT = np.asarray(batch().segment_ids_BT)
  return segment_ids_BT if stage == "sft" else segment_ids_BT * learned_of(stage).any(axis=1, keepdims=True)


def learned_of(stage):
  mask_BT = np.asarray(batch().loss_mask_BT)
  return mask_BT if stage == "sft" else mask_BT & (np.arange(B) < 3)[:, None]


def step(stage, balance, accumulate=1, tx=TX, keep=lambda a: a):
  """Returns (state, metrics) after one step of the stage; `keep` is applied to the batch."""
  state = TrainState(step=jnp.int32(0), params=params(), opt_state=tx.init(params()))
  data, how = batch(), dict(balance=balance, accumulate=accumulate, add_to_bias=add_to_bias)
  if stage == "sft":
    return jax.jit(sft_step(score, tx, **how))(state, jax.tree.map(keep, data))
  mask_BT, zeros = jnp.asarray(learned_of(stage)), jnp.zeros((B, T))
  rows = {
    "tokens": data.tokens_BT, "segment_ids": data.segment_ids_BT, "mask": mask_BT, "behaviour": zeros,
    "weights": mask_BT.astype(jnp.float32), "advantages": jnp.where(mask_BT, 0.5, 0.0),
  }  # fmt: skip
  return jax.jit(policy_gradient_step(score, tx, **how))(state, jax.tree.map(keep, rows), jnp.sum(rows["weights"]))


def assert_same(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_a_loop_over_documents():
  keys = jax.random.split(jax.random.key(2))
  score_BTE = jax.random.uniform(keys[0], (B, T, E))
  chosen_BTE = jax.random.uniform(keys[1], (B, T, E)) < 0.5
  segment_ids_BT = np.asarray(batch().segment_ids_BT)
  expected_B = np.zeros(B)
  for b in range(B):
    for document in set(segment_ids_BT[b]) - {0}:
      own = segment_ids_BT[b] == document
      s, chosen = np.asarray(score_BTE[b][own], np.float64), np.asarray(chosen_BTE[b][own])
      p = (s / s.sum(axis=1, keepdims=True)).mean(axis=0)
      expected_B[b] += own.sum() * np.sum(E / X * chosen.mean(axis=0) * p)
  got_B = moe.balance_loss(score_BTE, chosen_BTE, segment_ids_BT, X)[:, 0]
  np.testing.assert_allclose(got_B, expected_B, rtol=1e-5)


def test_equal_loads_cost_one_a_token():
  chosen_BTE = jnp.tile(jnp.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool), (B, T // 2, 1))
  loss_B = moe.balance_loss(jax.random.uniform(jax.random.key(0), (B, T, E)), chosen_BTE, jnp.ones((B, T), int), X)
  np.testing.assert_allclose(loss_B, T, rtol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_sign_update_moves_each_bias_against_its_load_by_the_rate_and_nothing_else_does(stage):
  frozen, _ = step(stage, RouterBalance())
  moved, _ = step(stage, RouterBalance(kind="sign", rate=0.25))
  load_LE = np.asarray(score(params(), batch().tokens_BT, seen_by(stage)).routing.load_LE)
  mean = np.sum(seen_by(stage) > 0) * X / E
  assert len(set(load_LE.ravel())) > 2  # Otherwise the test would show nothing.
  bias = "e_score_correction_bias"
  np.testing.assert_array_equal(frozen.params[bias], 0.0)  # Not even weight decay moves it.
  np.testing.assert_array_equal(moved.params[bias], 0.25 * np.sign(mean - load_LE))
  assert_same(moved.params | {bias: 0.0}, frozen.params | {bias: 0.0})


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_auxiliary_loss_adds_its_mean_over_real_tokens_times_the_weight(stage):
  """Recovers the gradient from the first Adam step; a huge eps makes the step proportional to it."""
  change = lambda balance: jax.tree.map(lambda a, b: 1e6 * (b - a), step(stage, balance, tx=SLOW)[0].params, params())

  tokens_BT, segment_ids_BT = batch().tokens_BT, seen_by(stage)
  mean = lambda params: score(params, tokens_BT, segment_ids_BT).routing.loss / np.sum(segment_ids_BT > 0)
  weighed = jax.tree.map(jnp.subtract, change(RouterBalance(kind="auxiliary", weight=50.0)), change(RouterBalance()))
  theirs = jax.grad(mean)(params())
  assert np.abs(theirs["gate_LVE"]).max() > 0.01
  for name in theirs:  # fp32 keeps 1e-7 of a parameter near 1, which is 0.1 of the recovered gradient.
    np.testing.assert_allclose(weighed[name], 50 * theirs[name], atol=0.3)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_pieces_of_a_batch_and_shards_of_it_are_balanced_as_the_whole(stage):
  both = RouterBalance(kind="both", rate=0.25, weight=2.0)
  whole = step(stage, both)
  assert_same(step(stage, both, accumulate=2), whole)
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  place = NamedSharding(mesh, PartitionSpec("data"))
  assert_same(step(stage, both, keep=lambda a: jax.device_put(a, place)), whole)


def test_packed_documents_are_balanced_as_rows_of_their_own():
  data = batch()
  tokens, segments = np.zeros((2 * B, T), int), np.zeros((2 * B, T), int)
  for b in range(B):
    for document in (1, 2):
      own = np.asarray(data.segment_ids_BT[b]) == document
      tokens[2 * b + document - 1, : own.sum()] = data.tokens_BT[b][own]
      segments[2 * b + document - 1, : own.sum()] = 1
  packed = score(params(), data.tokens_BT, data.segment_ids_BT).routing
  assert_same(score(params(), jnp.asarray(tokens), jnp.asarray(segments)).routing, packed)


def test_a_models_loads_and_biases_are_in_the_order_of_its_blocks():
  """The bias of each block favours a different pair of experts, and the block's load must go to that pair."""
  pairs = [(0, 1), (2, 3), (1, 2), (0, 3), (1, 3), (0, 2), (0, 1)]
  push_LE = np.zeros((len(pairs), E), np.float32)
  for block, pair in enumerate(pairs):
    push_LE[block, list(pair)] = 9.0
  data = batch()

  @jax.jit
  def routing(params):
    pushed = add_to_router_bias(CONFIG, params, push_LE)
    scores = Hybrid(CONFIG).apply({"params": pushed}, data.tokens_BT, data.segment_ids_BT, method="score")
    return pushed, scores.routing

  pushed, got = routing(init_params(CONFIG, jax.random.key(0)))
  of = lambda unit, block: pushed[unit][block]["mixer"]["e_score_correction_bias"]
  np.testing.assert_array_equal(of("units_0", "blocks_0"), push_LE[[0, 2, 4]])
  np.testing.assert_array_equal(of("units_0", "blocks_1"), push_LE[[1, 3, 5]])
  np.testing.assert_array_equal(of("units_1", "blocks_0"), push_LE[6])
  np.testing.assert_array_equal(got.load_LE, (push_LE > 0) * 35.0)  # 35 tokens are not padding.
  assert got.dropped_L.tolist() == [0.0] * len(pairs)
  assert 0 < float(got.loss) < len(pairs) * 35 * E / X  # Two of four experts have all: at most twice the balanced loss.


def test_a_loss_that_is_not_paid_is_not_traced_and_one_that_is_asks_no_router_twice(monkeypatch):
  data = batch()
  shapes = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))

  def traced(router_loss):
    model = Hybrid(ModelConfig(**{**vars(CONFIG), "router_loss": router_loss}))
    fn = lambda p: model.apply({"params": p}, data.tokens_BT, data.segment_ids_BT, method="score")
    return str(jax.make_jaxpr(fn)(shapes)).count("dot_general")

  assert traced(True) == traced(False) > 0
  monkeypatch.setattr(moe, "balance_loss", None)
  traced(False)
  with pytest.raises(TypeError):
    traced(True)


def test_metrics_are_those_of_the_loads():
  routing = Routing(load_LE=jnp.array([[4.0, 4, 0, 0], [2, 2, 2, 2]]), dropped_L=jnp.array([0.0, 3]))
  got = {name: float(value) for name, value in routing_metrics(routing, jnp.float32(4)).items()}
  assert got == {
    "expert/load_max": 2.0, "expert/imbalance": 0.5, "expert/unused": 0.25, "expert/dropped": 3.0,
    "load_max/block_0": 2.0, "load_max/block_1": 1.0, "imbalance/block_0": 1.0, "imbalance/block_1": 0.0,
  }  # fmt: skip
  paid = routing.replace(loss=jnp.float32(12))
  assert float(routing_metrics(paid, jnp.float32(4))["loss/balance"]) == 1.5
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
