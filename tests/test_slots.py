"""Tests of slots: whatever the schedule, a request has the tokens that it would have alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PATTERNS, STOP, T, V, hybrid, row, table, toy_engine

from configs.tiny import if_rl
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.report.metrics import CompileCounter
from nemocascade.rollout import engine as engine_file
from nemocascade.rollout.sampling import Options
from nemocascade.runtime.checks import check_rl

pytestmark = pytest.mark.usefixtures("compiled_fast")

KEY = jax.random.key(7)
PROMPTS = [[3], [4, 5, 6, 7], [1, 1], [9, 8, 7]]
G = 2
B = G * len(PROMPTS)
LIMITS = np.array([9, 20, 5, 12, 20, 20, 7, 20], np.int32)
GIVEN = {0: [5, 6, 7], 2: [STOP], 4: [8, 1], 6: [1, STOP, 2, 4, 3]}
FIELDS = ("tokens_BT", "known_B", "sampled_BT", "behaviour_logprobs_BT", "drawn_logprobs_BT", "done_B")
engine = functools.cache(toy_engine)


def run(engine, params, *, order=range(B), ticks=engine_file.NEVER, seed=KEY, **how):
  """Decodes two turns of all requests: what FIELDS say of each at the end, by its number.

  Args:
    order: the requests in the order in which they are asked for.
    ticks: tokens between two looks.
  """
  order = np.array(order)
  options = jax.tree.map(lambda a: a[order], OPTIONS)
  d = engine.start(params, [PROMPTS[b // G] for b in order], 1, options=options, held=True, **how)
  d = d.replace(row_id_B=order.astype(np.int32), limit_B=LIMITS[order])
  place, waits, told = {b: i for i, b in enumerate(order.tolist())}, set(GIVEN), set()
  while not (np.asarray(d.done_B).all() and not waits):
    d = engine.decode(params, d, seed, ticks)
    ended = {b for b in range(B) if d.done_B[place[b]]}
    # A request is given tokens when its first turn has ended; one without is over.
    now, waits = waits & ended, waits - ended
    told |= now
    d = d.replace(limit_B=np.where([b in told for b in order], T, LIMITS[order]).astype(np.int32))
    d = d.replace(held_B=np.array([b in now | waits for b in order]))
    d = engine.extend(params, d, {place[b]: GIVEN[b] for b in sorted(now)})
  back = np.array([place[b] for b in range(B)])
  return {name: np.asarray(getattr(d, name))[back] for name in FIELDS}, jax.tree.map(int, d.counts)


OPTIONS = Options(
  temperature=np.array([1, 1, 0.7, 0, 1, 2, 1, 1]), top_k=np.array([0, 0, 0, 0, 5, 0, 0, 0]),
  top_p=np.array([1, 0.8, 1, 1, 1, 1, 1, 1]), min_p=np.array([0, 0, 0, 0, 0, 0.05, 0, 0]),
).by_row(B)  # fmt: skip


@functools.cache
def alone(which):
  """Each request in a slot of its own from the start."""
  return run(*MODELS[which]())[0]


def hybrid_model():
  with_params = hybrid(PATTERNS[0])
  return with_params[0], with_params[1]


MODELS = {"toy": lambda: (engine(), table()), "hybrid": hybrid_model}


def assert_same(got, expected, atol=0.0):
  for name in FIELDS:
    np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=atol, err_msg=name)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(1, 0), (3, 5), (8, 0)]), st.permutations(range(B)), st.integers(1, 20))
def test_tokens_do_not_depend_on_slots_order_or_looks(places, order, ticks):
  slots, parked = places
  assert_same(run(engine(), table(), slots=slots, parked=parked, order=order, ticks=ticks)[0], alone("toy"))


@pytest.mark.parametrize("slots, ticks", [(1, 3), (3, 1), (3, 7)])
def test_requests_of_the_hybrid_are_parked_and_resumed_with_the_same_tokens(slots, ticks):
  engine, params = hybrid_model()
  got, counts = run(engine, params, slots=slots, ticks=ticks, order=[5, 2, 0, 7, 1, 6, 4, 3])
  assert (got["known_B"] > LIMITS)[list(GIVEN)].sum() >= 3  # They went on after their tokens were given.
  for name in ("tokens_BT", "known_B", "sampled_BT", "done_B"):
    np.testing.assert_array_equal(got[name], alone("hybrid")[name])
  np.testing.assert_allclose(got["behaviour_logprobs_BT"], alone("hybrid")["behaviour_logprobs_BT"], atol=1e-5)
  assert counts.busy > 0.5 * counts.ticks * slots


@pytest.mark.parametrize("parked, begun", [(0, 6), (5, 8)])
def test_as_many_requests_wait_for_tools_outside_the_slots_as_there_are_places(parked, begun):
  limits = np.array([len(PROMPTS[b // G]) + 1 for b in range(B)], np.int32)
  d = engine().start(table(), PROMPTS, G, slots=3, parked=parked, held=True).replace(limit_B=limits)
  d = engine().decode(table(), d, KEY)
  assert int((d.known_B == limits).sum()) == begun and int((d.parked_B >= 0).sum()) == (parked or 3)
  assert int(d.waiting_B.sum()) == B - begun


def test_places_for_waiting_need_slots():
  c = if_rl.get_config("smoke")
  c.rollout.update(slots=4, parked=8)
  check_rl(c)
  c.rollout.slots = 0
  with pytest.raises(UserError, match="rollout.parked=8 with rollout.slots=0"):
    check_rl(c)


def test_slots_are_refilled_at_every_tick_and_stay_occupied():
  limits = np.array([len(PROMPTS[b // G]) + 1 for b in range(B)], np.int32)
  d = engine().start(table(), PROMPTS, G, slots=2).replace(limit_B=limits)
  d = engine().decode(table(), d, KEY)
  np.testing.assert_array_equal(d.known_B, limits)
  counts = jax.tree.map(int, d.counts)
  assert dataclasses.astuple(counts) == (4, 8, 8, 6, 6)


def test_few_requests_go_on_in_fewer_slots_and_nothing_compiles_after_the_first_call(monkeypatch):
  monkeypatch.setattr(engine_file, "FEWEST", 2)
  fresh = toy_engine()
  got, _ = run(fresh, table(), slots=8)
  assert_same(got, alone("toy"))
  d = fresh.start(table(), PROMPTS, G, options=OPTIONS).replace(limit_B=LIMITS)
  with CompileCounter() as compiled:
    d = fresh.decode(table(), d, KEY)
  assert compiled.programs == [] and d.row_S.shape == (2,) and bool(jnp.all(d.done_B))
  assert d.counts.busy <= d.counts.slots < 8 * d.counts.ticks  # Slots are counted as they were.
  for b in set(range(B)) - set(GIVEN):
    np.testing.assert_array_equal(d.tokens_BT[b], alone("toy")["tokens_BT"][b])


@pytest.mark.parametrize("slots, expert", [(8, 1), (4, 2)])
def test_slots_lie_with_their_requests_on_a_mesh(slots, expert, monkeypatch):
  monkeypatch.setattr(engine_file, "FEWEST", 1)
  mesh = make_mesh(data=2, expert=expert, of=jax.devices()[: 2 * expert])
  got, counts = run(toy_engine(mesh=mesh), table(), slots=slots, ticks=4, order=[5, 2, 0, 7, 1, 6, 4, 3])
  assert_same(got, alone("toy"), atol=1e-6)
  assert (counts.slots < slots * counts.ticks) == (slots == 8)  # On two devices, the last requests had fewer slots.


NAN = V - 1  # A token that turns the model's state into NaN.


@pytest.mark.parametrize("slots", [3, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_request_with_nan_ends_with_an_error_and_no_other_notices(pattern, slots):
  engine, params, *_ = hybrid(pattern)
  params = params | {"embedding": params["embedding"].at[NAN].set(jnp.nan)}
  options = Options(top_k=np.array([0, 0, 0, 0, 1, 0, 0, 0]))

  def decode(prompts):
    d = engine.start(params, prompts, 1, slots=slots, options=options)
    return engine.decode(params, d.replace(limit_B=np.full(8, 12, np.int32)), jax.random.key(3))

  prompts = [PROMPTS[b // 2] for b in range(8)]
  sound, sick = decode(prompts), decode([[3, NAN] if b in (1, 6) else prompts[b] for b in range(8)])
  failed_B = np.asarray(sick.failed_B)
  assert failed_B[[1, 6]].all() and bool(sick.done_B.all())
  np.testing.assert_array_equal(np.asarray(sick.known_B)[[1, 6]], 2)
  for b in set(range(8)) - {1, 6}:
    assert failed_B[b] == bool(sound.failed_B[b])
    np.testing.assert_array_equal(row(sick, b), row(sound, b))
    np.testing.assert_array_equal(sick.behaviour_logprobs_BT[b], sound.behaviour_logprobs_BT[b])


def test_the_likeliest_tokens_are_recorded_beside_the_sampled_ones():
  d = engine().start(table(), PROMPTS, G, likeliest=3, slots=3)
  d = engine().decode(table(), d, KEY)
  logprobs_BTK = np.asarray(d.likeliest_logprobs_BTK)
  sampled_BT = np.asarray(d.sampled_BT)
  assert (np.diff(logprobs_BTK[sampled_BT], axis=-1) <= 0).all() and not logprobs_BTK[~sampled_BT].any()
  same_BTK = np.asarray(d.likeliest_tokens_BTK) == np.asarray(d.tokens_BT)[..., None]
  same_BTK &= sampled_BT[..., None]
  own_BTK = np.broadcast_to(np.asarray(d.behaviour_logprobs_BT)[..., None], same_BTK.shape)
  assert same_BTK.any(axis=-1).sum() > 10
  np.testing.assert_allclose(logprobs_BTK[same_BTK], own_BTK[same_BTK], atol=1e-6)
