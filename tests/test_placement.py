"""Packed rows on a mesh: what a device packs, that it is what one device packs, and that packing changes no number."""

import functools

import jax
import numpy as np
import pytest
from test_mesh_stages import T, V, assert_same, on

from nemocascade.data import packing
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh, put_rows, rows
from nemocascade.rollout.samples import Samples
from nemocascade.runtime import objective, scoring
from nemocascade.runtime.learner import arrange, learn
from nemocascade.runtime.signals import Sources
from nemocascade.runtime.start import start
from nemocascade.runtime.swap import HostParams
from nemocascade.runtime.uniform import uniform_share
from nemocascade.step import placement
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.rows import Lengths, pack_rows
from nemocascade.types import Rollout

pytestmark = pytest.mark.usefixtures("compiled_fast")
# Mesh and number of prompts: over all devices, over one axis of the mesh, and on all devices the same.
PLACES = [((1, 1), 8), ((2, 4), 8), ((2, 4), 4), ((8, 1), 4)]


def documents(Q, G, seed=0):
  """(arrays [Q, G, T, ...], lengths, which are kept) with documents of different lengths."""
  r = np.random.default_rng(seed)
  length_QG, kept_QG = r.integers(2, T + 1, (Q, G)).astype(np.int32), r.random((Q, G)) < 0.7
  real_QGT = np.arange(T) < length_QG[..., None]
  arrays = {
    "tokens": np.where(real_QGT, 1 + np.arange(Q * G * T).reshape(Q, G, T), 0).astype(np.int32),
    "segment_ids": real_QGT.astype(np.int32),
    "mask": real_QGT & kept_QG[..., None],
    "states": np.where(real_QGT[..., None], r.normal(size=(Q, G, T, 3)), 0).astype(np.float32),
  }
  return arrays, length_QG, kept_QG


def devices_of(array) -> list[set]:
  """The devices that hold each entry of the first dimension."""
  found = [set() for _ in range(len(array))]
  for device, index in array.sharding.devices_indices_map(array.shape).items():
    for i in range(len(array))[index[0]]:
      found[i].add(device)
  return found


def assert_each_is_packed_once(placed, kept_QG, batches):
  """Asserts that the rows have each kept document once, whole and unchanged, on a device that holds it."""
  found, of_prompt, arrays = [], devices_of(placed["tokens"]), jax.device_get(placed)
  for packed in batches:
    of_row, packed = devices_of(packed["tokens"]), jax.device_get(packed)
    for b, segment_ids_T in enumerate(packed["segment_ids"]):
      assert (packed["tokens"][b][segment_ids_T == 0] == 0).all()
      for segment in range(1, segment_ids_T.max() + 1):
        (place,) = np.nonzero(segment_ids_T == segment)
        assert (np.diff(place) == 1).all()
        q, g, first = np.unravel_index(packed["tokens"][b, place[0]] - 1, arrays["tokens"].shape)
        assert first == 0 and len(place) == (arrays["segment_ids"][q, g] > 0).sum() and of_row[b] & of_prompt[q]
        for name in ("tokens", "mask", "states"):
          np.testing.assert_array_equal(packed[name][b, place], arrays[name][q, g, : len(place)])
        found.append((q, g))
  assert sorted(found) == [tuple(place) for place in np.argwhere(kept_QG)]


# With more pieces, a piece has fewer rows than there are devices, and devices share rows.
@pytest.mark.parametrize("grid, Q, pieces", [(*place, 2) for place in PLACES] + [((2, 4), 8, 4), ((2, 4), 4, 8)])
def test_every_document_is_packed_once_whole_on_a_device_that_holds_it_and_comes_back(grid, Q, pieces):
  mesh = make_mesh(*grid)
  arrays, length_QG, kept_QG = documents(Q, G := 16 // Q)
  placed, of = put_rows(arrays, mesh), Lengths(length_QG, kept_QG, length_QG)
  flat = {name: a.reshape(Q * G, T, *a.shape[3:]) for name, a in placed.items()}
  assert_each_is_packed_once(placed, kept_QG, [pack_rows(flat, of, mesh=mesh, B=16, T=T + 5, accumulate=pieces)])

  batches, back, B = [], put_rows(np.zeros((Q, G, T, 3), np.float32), mesh), 16 // pieces
  for places in placement.plan_batches(mesh, length_QG, kept_QG, B=B, T=T):
    places = put_rows(places, mesh)
    batches.append(placement.pack(placed, places, mesh=mesh, Q=Q, B=B, T=T))
    back = placement.unpack(batches[-1]["states"], places, back, mesh=mesh)
  assert_each_is_packed_once(placed, kept_QG, batches)
  np.testing.assert_array_equal(back, arrays["states"] * kept_QG[..., None, None])
  assert back.sharding.is_equivalent_to(rows(mesh, Q), back.ndim)


def test_on_one_device_rows_are_filled_as_a_loop_over_documents_fills_them():
  """The loop is the definition of the order, in numpy."""
  arrays, length_QG, kept_QG = documents(8, 3)
  flat = {name: a.reshape(24, T, *a.shape[3:]) for name, a in arrays.items()}
  B, pieces, kept = 15, 3, np.flatnonzero(kept_QG)
  expected = {name: np.zeros((B, 2 * T, *a.shape[2:]), a.dtype) for name, a in flat.items()}
  for i, of_row in enumerate(packing.pack(length_QG.ravel()[kept], capacity=2 * T)):
    b, start = i % (B // pieces) * pieces + i // (B // pieces), 0
    for segment, n in enumerate(kept[of_row], start=1):
      place = slice(start, start := start + length_QG.ravel()[n])
      for name, a in flat.items():
        expected[name][b, place] = a[n, : place.stop - place.start]
      expected["segment_ids"][b, place] = segment
  of = Lengths(length_QG, kept_QG, length_QG)
  packed = pack_rows(flat, of, mesh=make_mesh(1, 1), B=B, T=2 * T, accumulate=pieces)
  assert packed.keys() == expected.keys() and expected["segment_ids"].max() > 1
  jax.tree.map(np.testing.assert_array_equal, packed, expected)


def test_documents_without_room_are_refused():
  mesh = make_mesh(8, 1)
  length_QG, all_QG = np.full((8, 3), T), np.ones((8, 3), bool)
  with pytest.raises(ValueError, match=f"documents of a device need more than its 2 rows of {T} tokens"):
    placement.plan_rows(mesh, length_QG, all_QG, B=16, T=T)
  with pytest.raises(ValueError, match="16 rows do not divide into 3 pieces"):
    placement.plan_rows(mesh, length_QG, all_QG, B=16, T=T, pieces=3)
  with pytest.raises(ValueError, match="4 prompts do not divide over 8 devices"):
    placement.plan_prompts(mesh, length_QG[:4], all_QG[:4], np.ones(4, int))


def test_too_few_rows_for_a_devices_prompts_are_refused_with_the_number_that_suffices():
  c = on(2, 4)[0].copy_and_resolve_references()
  c.rollout.completions = 3
  with pytest.raises(UserError, match="packing.rows=16: must be at least 24 on 8 devices, .* 3 completions of 24"):
    objective.check_room(c, make_mesh(2, 4))
  c.packing.rows = 24
  objective.check_room(c, make_mesh(2, 4))
  c.packing.update(rows=16, row_tokens=2 * T)  # On 8 devices, 3 completions need 2 rows; on one, 24 need 12.
  objective.check_room(c, make_mesh(2, 4))
  c.packing.rows = 12
  objective.check_room(c, make_mesh(1, 1))


@functools.cache
def rollout(Q):
  """16 samples of Q prompts; one prompt has no valid sample."""
  arrays, length_QG, _ = documents(Q, G := 16 // Q, seed=1)
  r = np.random.default_rng(2)
  mask_QGT = (arrays["segment_ids"] > 0) & (np.arange(T) > 1) & (r.random((Q, G, T)) < 0.7)
  valid_QG = np.ones((Q, G), bool)
  valid_QG[1] = False
  return Rollout(
    tokens_QGT=np.where(arrays["segment_ids"], r.integers(0, V, (Q, G, T)), 0).astype(np.int32),
    segment_ids_QGT=arrays["segment_ids"],
    loss_mask_QGT=mask_QGT,
    behaviour_logprobs_QGT=np.where(mask_QGT, -np.log(V), 0).astype(np.float32),
    rewards_QG=r.random((Q, G)).astype(np.float32),
    valid_QG=valid_QG,
  )


@functools.cache
def arranged(grid, Q, shared):
  """(rows, sources) of the rollout on this mesh."""
  c, p = on(*grid)
  c = c.copy_and_resolve_references()
  c.rollout.update(prompts=Q, completions=16 // Q, prompt_tokens=T)
  c.packing.shared_prompts = shared
  s = Sources(c, p.programs, None, np.float32(1), None, None, None, None)
  return arrange(rollout(Q), s), s


def documents_of(packed):
  """The documents of packed rows, each with all that was packed with it, in a fixed order."""
  packed, found = jax.device_get(packed), []
  for b, segment_ids_T in enumerate(packed["segment_ids"]):
    for segment in range(1, segment_ids_T.max() + 1):
      place = segment_ids_T == segment
      found.append(tuple(packed[name][b, place].tobytes() for name in sorted(packed) if name != "segment_ids"))
  return sorted(found)


@pytest.mark.parametrize("grid, Q, shared", [((2, 4), 8, False), ((2, 4), 4, False), ((8, 1), 8, True)])
def test_eight_devices_arrange_and_learn_what_one_does(grid, Q, shared, tmp_path):
  (batch, s), (alone, s_alone) = arranged(grid, Q, shared), arranged((1, 1), Q, shared)
  # Advantages are among the values. They are computed from whole groups, so they are the same to the bit.
  r = rollout(Q)
  taught = (r.loss_mask_QGT & r.valid_QG[..., None]).any(-1).sum()
  assert documents_of(batch.rows) == documents_of(alone.rows) and len(documents_of(batch.rows)) == taught > 10
  assert batch.tokens == alone.tokens and float(batch.count) == float(alone.count)
  assert batch.rows["tokens"].sharding.is_equivalent_to(rows(s.programs.mesh, 16), 2)
  if shared:
    jax.tree.map(np.testing.assert_array_equal, batch.prompts, alone.prompts)
    real = sum((np.asarray(batch.rows["segment_ids"]) > 0).sum(1)) + np.asarray(batch.prompts.length_Q).sum()
    assert batch.tokens == real
    return  # test_mesh_stages compares a step of such rows.

  def learned(batch, s, name):
    parts = on(*s.programs.mesh.devices.shape)[1]
    tx = make_optimizer(total_steps=1, **s.c.optimizer)
    state, _, _ = start(s.c, tmp_path / name, parts, tx, "")
    state, metrics, _ = learn(state, batch, s)
    return metrics, jax.device_get(state.params)

  assert_same(learned(batch, s, "eight"), learned(alone, s_alone, "one"))


def samples_of(Q, mesh):
  r = rollout(Q)
  length_QG, sampled_QG = (a.sum(-1).astype(np.int32) for a in (r.segment_ids_QGT, r.loss_mask_QGT))
  return Samples(
    [], ["math", "code"] * (Q // 2),
    *put_rows((r.tokens_QGT, r.segment_ids_QGT, r.loss_mask_QGT, r.behaviour_logprobs_QGT), mesh),
    limit_QG=np.full(length_QG.shape, T), length_QG=length_QG, sampled_QG=sampled_QG, finished_QG=length_QG < T,
    completions=[],
  )  # fmt: skip


@functools.cache
def scored(grid, Q):
  """(parameters, log-probabilities, states and likeliest tokens of the samples) on this mesh."""
  programs = on(*grid)[1].programs
  places = jax.tree.map(lambda p: p.sharding, programs.template)
  params = jax.jit(programs.fresh_params, out_shardings=places)(jax.random.key(1))

  def program(*rows):
    return programs.logprobs(params, *rows, np.float32(0.7)), programs.states(params, *rows[:2])

  return params, scoring.over_rows(programs, program, samples_of(Q, programs.mesh), range(Q))


@pytest.mark.parametrize("grid, Q", [((1, 1), 8), ((2, 4), 4)])
def test_a_packed_document_is_scored_as_if_it_were_alone(grid, Q):
  """Log-probabilities and states of each document are those of a row that holds it alone, on one device."""
  _, (logprobs_QGT, states_QGTD) = scored(grid, Q)
  assert logprobs_QGT.sharding.is_equivalent_to(rows(make_mesh(*grid), Q), 3)
  programs, params, r = on(1, 1)[1].programs, scored((1, 1), Q)[0], rollout(Q)
  arrays = (a.reshape(16, T) for a in (r.tokens_QGT, r.segment_ids_QGT, r.loss_mask_QGT))
  alone = [np.pad(a, ((0, scoring.SCORED_ROWS - 16), (0, 0))) for a in arrays]
  expected_BT = np.asarray(programs.logprobs(params, *alone, np.float32(0.7)))[:16]
  np.testing.assert_allclose(logprobs_QGT.reshape(16, T), expected_BT, rtol=1e-5, atol=1e-5)
  # Nothing predicts the first token of a document, so its state has no meaning.
  predicted_BT = ((alone[1] > 0) & (np.arange(T) > 0))[:16]
  expected_BTD = np.asarray(programs.states(params, *alone[:2]))[:16]
  got_ND = np.asarray(states_QGTD).reshape(16, T, -1)[predicted_BT]
  np.testing.assert_allclose(got_ND, expected_BTD[predicted_BT], rtol=1e-5, atol=1e-5)
  assert np.abs(expected_BT).max() > 1 and not np.asarray(logprobs_QGT)[~np.asarray(r.loss_mask_QGT)].any()


@pytest.mark.parametrize("grid, Q", PLACES)
def test_the_share_of_uniform_tokens_is_that_of_a_loop_over_tokens(grid, Q):
  mesh, r = make_mesh(*grid), np.random.default_rng(3)
  G, K, domains = 16 // Q, 2, ["math", "code"] * (Q // 2)
  # Log-probabilities on both sides of one nat around -log V.
  near = lambda *shape: (-np.log(V) + r.normal(size=shape)).astype(np.float32)  # noqa: E731
  states, heads = r.normal(size=(Q, G, T, 4)).astype(np.float32), 0.6 * r.normal(size=(2, 4, V)).astype(np.float32)
  teacher_Q = np.array([0, 1] * (Q // 2), np.int32)
  logits = np.einsum("QGTD,QDV->QGTV", states, heads[teacher_Q])
  of_states = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).max(-1)
  for fields, logprobs in (
    (dict(teacher_logprobs_QGT=(x := near(Q, G, T))), x),
    (dict(top_logprobs_QGTK=(x := near(Q, G, T, K))), x.max(-1)),
    (dict(teacher_states_QGTD=states, teacher_Q=teacher_Q), of_states),
  ):
    one = rollout(Q).replace(**fields)
    learned_QGT = one.loss_mask_QGT & one.valid_QG[..., None]
    shares = []
    for name in ("math", "code"):
      found = logprobs[np.array(domains) == name][learned_QGT[np.array(domains) == name]]
      if "teacher_states_QGTD" in fields:
        found = found[np.linspace(0, len(found) - 1, 64).astype(int)]
      shares.append(np.mean(np.abs(found + np.log(V)) < 1))
    assert 0 < max(shares) < 1
    got = uniform_share(put_rows(one, mesh), domains, V, mesh, heads)
    np.testing.assert_allclose(got["teacher/uniform"], max(shares), rtol=1e-6)
  assert uniform_share(one.replace(valid_QG=np.zeros((Q, G), bool)), domains, V, mesh, heads) == {}


def test_parameters_wait_on_the_host_once_and_come_back_where_they_were():
  params, _ = scored((2, 4), 8)
  waiting = HostParams.of(params)
  held = jax.tree.leaves(waiting._waiting, is_leaf=lambda x: hasattr(x, "shards"))
  assert sum(shard.size for array in held for shard in array.shards.values()) == sum(
    x.size for x in jax.tree.leaves(params)
  )
  jax.tree.map(np.testing.assert_array_equal, waiting.put(), params)
  jax.tree.map(lambda x, y: np.testing.assert_equal(x.sharding, y.sharding), waiting.put(), params)
