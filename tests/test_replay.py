"""Records of the sampler's experts: what the sampler chose is what the trainer replays, with the gradient of a choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.config import ModelConfig
from nemocascade.mesh import make_mesh, put_rows
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.router_bias import add_to_router_bias
from nemocascade.model.routing import as_record, by_token, of_units
from nemocascade.runtime.programs import Programs
from nemocascade.types import Prompts

pytestmark = pytest.mark.usefixtures("compiled_fast")
Q, G, P, T, V, E, X = 4, 2, 5, 12, 11, 8, 2
# Two MoE blocks in a scanned unit that repeats three times, and one in a unit that does not.
CONFIG = ModelConfig(
  vocab_size=V, hidden_size=16, hybrid_override_pattern="EE-EE-EE-ME", n_routed_experts=E, num_experts_per_tok=X,
  moe_intermediate_size=8, moe_shared_expert_intermediate_size=8, intermediate_size=8, mamba_num_heads=4,
  mamba_head_dim=4, ssm_state_size=8, chunk_size=4, initializer_range=0.5,
)  # fmt: skip
Y = 7 * X
GIVEN = [1, 2]


def programs(*mesh, **fields):
  return Programs(dataclasses.replace(CONFIG, **fields), make_mesh(*(mesh or (1, 1))))


@functools.cache
def params():
  return init_params(CONFIG, jax.random.key(0))


def other_params():
  """Parameters whose routers differ in their bias alone, so that they choose other experts."""
  return add_to_router_bias(CONFIG, params(), jax.random.normal(jax.random.key(3), (7, E)))


def sampled(p, *, records=True, seed=1, slots=0):
  engine = p.engine(P, T, records=records)
  prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 3]]
  placed = jax.device_put(params(), jax.tree.map(lambda s: s.sharding, p.template))
  d = engine.decode(placed, engine.start(placed, prompts, G, slots=slots, held=not slots), jax.random.key(seed))
  if slots:
    return d
  room = [b for b, n in enumerate(np.asarray(d.known_B)) if n + len(GIVEN) < T]  # As if a tool had answered.
  assert room
  return engine.decode(placed, engine.extend(placed, d, dict.fromkeys(room, GIVEN)), jax.random.key(seed + 1))


@functools.cache
def on_one():
  return jax.device_get(sampled(programs()))


def rows(d):
  segment_ids_BT = (np.arange(T)[None] < d.known_B[:, None]).astype(np.int32)
  return d.tokens_BT * segment_ids_BT, segment_ids_BT, d.sampled_BT, d.experts_BTY


@functools.cache
def scored(replay):
  """Jitted: (params, rows) -> ((sum, Scores), gradient)."""
  model = Hybrid(dataclasses.replace(CONFIG, router_replay=replay))

  def loss(params, tokens_BT, segment_ids_BT, mask_BT, experts_BTY):
    method = dict(method="score", experts_BTY=experts_BTY)
    scores = model.apply({"params": params}, tokens_BT, segment_ids_BT, mask_BT, **method)
    return jnp.sum(jnp.sin(scores.logprobs_BT)), scores

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def same(got, expected, **how):
  jax.tree.map(functools.partial(np.testing.assert_allclose, **dict(atol=2e-5, rtol=1e-4) | how), got, expected)


def test_the_sampler_records_the_choice_of_every_token_and_changes_nothing_by_it():
  without = sampled(programs(), records=False)
  assert without.experts_BTY is None
  np.testing.assert_array_equal(on_one().tokens_BT, without.tokens_BT)
  for d in (on_one(), jax.device_get(sampled(programs(), slots=3))):
    tokens_BT, segment_ids_BT, mask_BT, experts_BTY = rows(d)
    assert experts_BTY.dtype == np.uint8 and experts_BTY.shape == (Q * G, T, Y)
    assert ((experts_BTY > 0).all(-1) == (segment_ids_BT > 0)).all() and experts_BTY.max() == E
    (_, scores), _ = scored(False)(params(), tokens_BT, segment_ids_BT, mask_BT, experts_BTY)
    tokens = (segment_ids_BT > 0).sum()
    assert scores.routing.recorded_L.tolist() == scores.routing.agreed_L.tolist() == [tokens * X] * 7


def test_a_replayed_choice_is_the_choice_in_value_and_gradient():
  tokens_BT, segment_ids_BT, mask_BT, experts_BTY = rows(on_one())
  own = tokens_BT, segment_ids_BT, mask_BT, None
  expected, other = scored(True)(params(), *own), scored(True)(other_params(), *own)
  assert np.abs(np.asarray(expected[0][1].logprobs_BT - other[0][1].logprobs_BT)).max() > 0.1
  (total, scores), grads = scored(True)(other_params(), *own[:3], experts_BTY)
  same((total, scores.logprobs_BT, grads), (expected[0][0], expected[0][1].logprobs_BT, expected[1]))
  gate = grads["units_0"]["blocks_0"]["mixer"]["gate"]
  assert np.abs(np.asarray(gate)).max() > 1e-4  # The weights' gradient reaches the router.
  share = scores.routing.agreed_L / scores.routing.recorded_L
  assert (share < 1).all() and (share > 0).all()
  (_, compared), _ = scored(False)(other_params(), *own[:3], experts_BTY)  # Comparing alone changes nothing.
  same(compared.logprobs_BT, other[0][1].logprobs_BT)
  assert compared.routing.agreed_L[0] == scores.routing.agreed_L[0]


def test_a_token_without_a_record_takes_the_routers_own_choice():
  tokens_BT, segment_ids_BT, mask_BT, experts_BTY = rows(on_one())
  own, _ = scored(True)(other_params(), tokens_BT, segment_ids_BT, mask_BT, None)
  got, _ = scored(True)(other_params(), tokens_BT, segment_ids_BT, mask_BT, np.zeros_like(experts_BTY))
  same(got[1].logprobs_BT, own[1].logprobs_BT)
  assert got[1].routing.recorded_L.sum() == 0


def test_prompts_taken_in_once_replay_their_own_record():
  p, d = programs(), on_one()
  length_Q = d.known_B[::G] * 0 + np.array([3, 1, 5, 2])
  prompts = Prompts(d.tokens_BT[::G, :P], length_Q, d.experts_BTY[::G, :P])
  place_BT = np.minimum(np.repeat(length_Q, G)[:, None] + np.arange(T)[None], T - 1)
  cut = lambda a_BT: np.take_along_axis(a_BT, place_BT.reshape(*place_BT.shape, *[1] * (a_BT.ndim - 2)), axis=1)
  inside_BT = (np.arange(T)[None] < (d.known_B - np.repeat(length_Q, G))[:, None]).astype(np.int32)
  tokens_BT, segment_ids_BT, mask_BT, experts_BTY = rows(d)

  def after(params):
    prefix, _ = p.take_in_fn_under()(params, prompts)
    read = cut(tokens_BT), inside_BT, cut(mask_BT) & (inside_BT > 0)
    return p.score_fn(params, *read, after=(prefix, length_Q), experts=cut(experts_BTY)).logprobs_BT

  (_, whole), _ = scored(True)(params(), tokens_BT, segment_ids_BT, mask_BT, None)
  expected_BT = np.where(inside_BT > 0, cut(np.asarray(whole.logprobs_BT)), 0)
  same(np.where(inside_BT > 0, jax.jit(after)(other_params()), 0), expected_BT)


def test_eight_devices_record_and_replay_what_one_does():
  p, one = programs(4, 2), on_one()
  d = sampled(p)
  np.testing.assert_array_equal(d.tokens_BT, one.tokens_BT)
  np.testing.assert_array_equal(d.experts_BTY, one.experts_BTY)
  tokens_BT, segment_ids_BT, mask_BT, experts_BTY = put_rows(rows(one), p.mesh)
  got_BT = p.logprobs(other_params(), tokens_BT, segment_ids_BT, mask_BT, np.float32(1), experts_BTY)
  (_, expected), _ = scored(True)(params(), *rows(one)[:3], None)
  same(got_BT, expected.logprobs_BT)


@pytest.mark.parametrize("E, dtype", [(255, np.uint8), (256, np.uint16)])
def test_a_record_has_the_smallest_type_and_is_divided_as_it_was_joined(E, dtype):
  experts_LBTX = as_record(jax.random.randint(jax.random.key(0), (7, 2, 3, X), -1, E), E)
  assert experts_LBTX.dtype == dtype and as_record(jnp.array([-1, E - 1]), E).tolist() == [0, E]
  scanned, alone = of_units(by_token(experts_LBTX), [("EE-", 3), ("ME", 1)], X)
  assert scanned[2] is None and alone[0] is None
  np.testing.assert_array_equal(jnp.stack(scanned[:2], axis=1).reshape(6, 2, 3, X), experts_LBTX[:6])
  np.testing.assert_array_equal(alone[1], experts_LBTX[6])
