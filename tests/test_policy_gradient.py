"""Tests of the policy-gradient step: the published equations, and the same result for any split of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy_policy import (
  TX,
  G,
  Q,
  T,
  V,
  assert_same,
  gradient,
  gradient_of_rows,
  likeliest,
  own_logprobs,
  rollout,
  score,
  state,
  take_in,
  teacher_logprobs,
)

from nemocascade.advantage import ADVANTAGES, grpo, mopd, none
from nemocascade.data import packing
from nemocascade.mesh import make_mesh
from nemocascade.step import loss
from nemocascade.step.policy_gradient import (
  policy_gradient_step,
  proximal_logprobs,
  rollout_metrics,
)
from nemocascade.step.rows import after_prompts, lengths_of, pack_rows, rows_needed, to_rows
from nemocascade.types import Rollout

pytestmark = pytest.mark.usefixtures("compiled_fast")
MESH = make_mesh(1, 1)


def by_hand(r, coefficients_QGT, *, aggregation, kl_weight=0.0):
  """(value, gradient) of GRPO's and MOPD's printed objectives, one token at a time, in fp64.

  MOPD: Nemotron-Cascade 2 (arXiv 2603.19220), eq. 2 to 4. GRPO: its token-level form, a mean over all tokens.
  Coefficients are w * a. The gradient of log p(v | u) is one_hot(v) - p(. | u) in row u of the table.
  """
  table_VV = np.asarray(state().params["table_VV"], np.float64)
  logprobs_VV = table_VV - np.log(np.exp(table_VV).sum(axis=1, keepdims=True))
  tokens_QGT, mask_QGT = np.asarray(r.tokens_QGT), np.asarray(r.loss_mask_QGT)
  coefficients_QGT, reference_QGT = (np.asarray(a, np.float64) for a in (coefficients_QGT, r.reference_logprobs_QGT))
  samples = np.argwhere(np.asarray(r.valid_QG))
  tokens = sum(mask_QGT[q, g].sum() for q, g in samples)
  value, grad_VV = 0.0, np.zeros((V, V))
  for q, g in samples:
    own = mask_QGT[q, g].sum()
    share = 1 / tokens if aggregation is loss.token_mean else 1 / own / len(samples)
    for t in np.flatnonzero(mask_QGT[q, g]):
      before, token = tokens_QGT[q, g, t - 1 : t + 1]
      logp, coefficient = logprobs_VV[before, token], coefficients_QGT[q, g, t]
      gap = reference_QGT[q, g, t] - logp
      value += share * (-coefficient * logp + kl_weight * (np.exp(gap) - gap - 1))
      slope = share * (-coefficient + kl_weight * (1 - np.exp(gap)))
      grad_VV[before] += slope * (np.eye(V)[token] - np.exp(logprobs_VV[before]))
  return value, grad_VV


@pytest.mark.parametrize("kl_weight", [0.0, 0.03])
def test_grpo_is_the_printed_objective_in_value_and_gradient(kl_weight):
  r = rollout()
  expected = by_hand(r, grpo(r), aggregation=loss.token_mean, kl_weight=kl_weight)
  got_VV, metrics = gradient(r, kl_weight=kl_weight)
  assert_same((metrics["loss/policy"], got_VV), expected)


def test_mopd_with_icepop_is_the_printed_objective_in_value_and_gradient():
  r = rollout(noise=0.8)
  ratio_QGT = np.exp(own_logprobs(r) - r.behaviour_logprobs_QGT)
  inside_QGT = (ratio_QGT >= 0.5) & (ratio_QGT <= 2.0)
  learned_QGT = np.asarray(r.loss_mask_QGT & r.valid_QG[..., None])
  weights_QGT = np.where(inside_QGT, ratio_QGT, 0)
  expected = by_hand(r, weights_QGT * mopd(r), aggregation=loss.sequence_mean)
  got_VV, metrics = gradient(r, mopd, aggregation=loss.sequence_mean, correction=loss.icepop)
  assert_same((metrics["loss/policy"], got_VV), expected)
  outside = (~inside_QGT)[learned_QGT].mean()
  assert 0.1 < outside < 0.9  # Otherwise the test would show nothing.
  np.testing.assert_allclose(metrics["policy/ratio_masked"], outside, rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/ratio_max"], ratio_QGT[learned_QGT].max(), rtol=1e-5)
  gap = np.log(ratio_QGT)[learned_QGT]
  np.testing.assert_allclose(metrics["policy/sampler_error"], np.abs(gap).mean(), rtol=1e-5)


def test_mopd_step_on_every_completion_weighed_by_its_probability_descends_the_reverse_kl():
  # One prompt of one token, with each token of the vocabulary as one completion. The sampler is uniform
  # and all ratios are kept, so the mean over the group is an expectation over the policy.
  own_V = jax.nn.log_softmax(state().params["table_VV"][0])
  teacher_V = jax.nn.log_softmax(jax.random.normal(jax.random.key(9), (V,)))
  second = lambda a_V: jnp.pad(a_V[None, :, None], ((0, 0), (0, 0), (1, 0)))  # noqa: E731
  r = Rollout(
    tokens_QGT=second(jnp.arange(V)),
    segment_ids_QGT=jnp.ones((1, V, 2), jnp.int32),
    loss_mask_QGT=second(jnp.ones(V, bool)),
    behaviour_logprobs_QGT=second(jnp.full(V, -np.log(V))),
    rewards_QG=jnp.zeros((1, V)),
    valid_QG=jnp.ones((1, V), bool),
    # mopd subtracts the sampler's log-probability, so the trainer's is subtracted here instead.
    teacher_logprobs_QGT=second(teacher_V - own_V - np.log(V)),
  )

  def reverse_kl(table_VV):
    logp_V = jax.nn.log_softmax(table_VV[0])
    return jnp.sum(jnp.exp(logp_V) * (logp_V - teacher_V))

  got_VV, _ = gradient(r, mopd, correction=functools.partial(loss.icepop, low=0.0, high=1e9))
  assert_same(got_VV, jax.grad(reverse_kl)(state().params["table_VV"]))


@pytest.mark.parametrize("aggregation", [loss.token_mean, loss.sequence_mean])
def test_distilling_the_reverse_kl_is_mopd_in_expectation_over_what_could_have_been_said(aggregation):
  """Replaces each sampled token by every token in turn, weighted by the policy, with the states held fixed."""
  r = rollout()
  rows, count = to_rows(r, none(r), aggregation)
  got_VV, metrics = gradient_of_rows(rows, count, distillation=loss.reverse_kl, distillation_weight=1.0)
  there_QGTV = teacher_logprobs(r.teacher_states_QGTD, r.teacher_Q).reshape(-1, T, V)

  def expected(table_VV):  # -E[a log pi], where a = log teacher - log pi carries no gradient.
    own_BTV = jnp.pad(jax.nn.log_softmax(table_VV[rows["tokens"][:, :-1]]), ((0, 0), (1, 0), (0, 0)))
    a_BTV = jax.lax.stop_gradient(jnp.exp(own_BTV) * (there_QGTV - own_BTV))
    return -jnp.sum(rows["weights"][..., None] * a_BTV * own_BTV) / count

  assert_same(got_VV, jax.grad(expected)(state().params["table_VV"]))
  kl_BT = jnp.sum(jnp.exp(own := own_distribution(rows)) * (own - there_QGTV), axis=-1)
  np.testing.assert_allclose(metrics["loss/policy"], jnp.sum(rows["weights"] * kl_BT) / count, rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/teacher_kl"], jnp.mean(kl_BT[rows["mask"]]), rtol=1e-5)


def own_distribution(rows):
  own_BTV = jax.nn.log_softmax(state().params["table_VV"][rows["tokens"][:, :-1]])
  return jnp.pad(own_BTV, ((0, 0), (1, 0), (0, 0)))


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_the_top_of_all_tokens_teaches_what_the_states_teach(direction):
  r = rollout()
  tokens, logprobs = likeliest(r.teacher_states_QGTD, r.teacher_Q, k=V)
  rows, count = to_rows(r.replace(top_tokens_QGTK=tokens, top_logprobs_QGTK=logprobs), none(r))
  top = functools.partial(loss.DISTILLATIONS[f"{direction}_topk"], k=V)
  got, expected = (
    gradient_of_rows(rows, count, distillation=fn, distillation_weight=1.0)
    for fn in (top, loss.DISTILLATIONS[direction])
  )
  assert_same(got, expected, atol=1e-5)


CASES = {
  "grpo": dict(advantage=grpo, kl_weight=0.03),
  "mopd": dict(advantage=mopd, aggregation=loss.sequence_mean, correction=loss.icepop),
  "moved": dict(
    advantage=grpo, aggregation=loss.constant_length, correction=loss.tis, ratio=loss.dual_clip,
    kl=loss.k2, kl_weight=0.1, entropy_weight=0.2, moved=0.3,
  ),
  "sequences": dict(
    advantage=mopd, correction=functools.partial(loss.sequence_mask, low=0.7, high=1.5),
    ratio=functools.partial(loss.gspo, low=0.2, high=0.2), moved=0.3,
  ),
  "distilled": dict(
    advantage=none, aggregation=loss.sequence_mean, distillation=loss.reverse_kl, distillation_weight=1.0,
  ),
  "distilled_topk": dict(
    advantage=grpo, distillation=functools.partial(loss.forward_kl_topk, k=2), distillation_weight=0.5,
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_is_whole_though_pieces_cut_groups(case, accumulate):
  r = rollout(noise=0.5)
  assert_same(gradient(r, **case, accumulate=accumulate), gradient(r, **case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_packed_is_unpacked_and_empty_pieces_change_nothing(case, accumulate):
  case = dict(case)
  advantage, aggregation = case.pop("advantage"), case.pop("aggregation", loss.token_mean)
  r = rollout(noise=0.5)
  rows, count = to_rows(r, advantage(r), aggregation)
  packed = pack_rows(rows, lengths_of(r, MESH), mesh=MESH, B=9, T=2 * T + 1, accumulate=accumulate)
  filled_B = packed["mask"].any(axis=1)
  assert packed["mask"].sum() == np.asarray(rows["mask"]).sum()
  assert filled_B.sum() < 9 and packed["segment_ids"].max() >= 2  # Some rows hold several documents.
  got, expected = (gradient_of_rows(x, count, **case, accumulate=n) for x, n in ((packed, accumulate), (rows, 1)))
  assert_same(got, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_prompts_taken_in_once_teach_what_they_do_repeated(case, accumulate):
  case = dict(case)
  advantage, aggregation = case.pop("advantage"), case.pop("aggregation", loss.token_mean)
  r = rollout(noise=0.5)
  # One group has no valid samples; another prompt is one token shorter.
  r = r.replace(valid_QG=r.valid_QG.at[1].set(False), loss_mask_QGT=r.loss_mask_QGT.at[2, :, 1].set(True))
  rows, count = to_rows(r, advantage(r), aggregation)
  cut, prompts = after_prompts(rows, lengths_of(r, MESH), mesh=MESH, P=2, T=4)
  assert prompts.length_Q.tolist() == [2, 0, 1, 2] and cut["tokens"].shape == (Q * G, 4)
  assert cut["mask"].sum() == np.asarray(rows["mask"]).sum()
  got = gradient_of_rows(cut, count, prompts, **case, accumulate=accumulate)
  assert_same(got, gradient_of_rows(rows, count, **case))


def test_what_a_policy_says_of_its_samples_it_says_behind_a_prompt_taken_in_once():
  r = rollout()
  rows, _ = to_rows(r, grpo(r))
  cut, prompts = after_prompts(rows, lengths_of(r, MESH), mesh=MESH, P=2, T=3)
  got_BT = proximal_logprobs(score, state().params, cut, prompts, accumulate=2, take_in_fn=take_in)
  # Each piece has every second sample of each prompt.
  got_BT = np.asarray(got_BT).reshape(cut["tokens"].shape)
  expected_BT = proximal_logprobs(score, state().params, rows, accumulate=1)[:, 2:]
  learned_BT = np.asarray(cut["mask"])
  np.testing.assert_allclose(got_BT[learned_BT], expected_BT[learned_BT], atol=1e-6)


def test_a_prompt_or_what_follows_it_without_room_is_refused_with_the_numbers():
  r = rollout()
  rows, _ = to_rows(r, grpo(r))
  for P, N in ((1, 3), (2, 2)):
    with pytest.raises(ValueError, match=f"a prompt of 2 tokens and 3 behind it: there is room for {P} and {N}"):
      after_prompts(rows, lengths_of(r, MESH), mesh=MESH, P=P, T=N)


def test_rows_needed_is_enough_for_any_lengths_and_for_the_longest_just_so():
  rng = np.random.default_rng(0)
  for _ in range(50):
    longest, n = int(rng.integers(1, 12)), int(rng.integers(1, 40))
    capacity = int(rng.integers(longest, 40))
    lengths = rng.integers(1, longest + 1, n)
    assert len(packing.pack(lengths, capacity=capacity)) <= rows_needed(n, longest, capacity)
    assert len(packing.pack([longest] * n, capacity=capacity)) == rows_needed(n, longest, capacity)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_are_one(case, accumulate):
  r = jax.tree.map(lambda *a: jnp.concatenate(a), *[rollout(i, noise=0.5) for i in (1, 2)])
  mesh = Mesh(np.array(jax.devices()), ("data",))
  assert mesh.size == r.tokens_QGT.shape[0] == 8
  spread = jax.device_put(r, NamedSharding(mesh, PartitionSpec("data")))
  assert_same(gradient(spread, **case, accumulate=accumulate), gradient(r, **case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_stands_outside_the_mask_teaches_nothing_even_if_it_is_nan(case):
  r = rollout(noise=0.5)
  learned_QGT = r.loss_mask_QGT & r.valid_QG[..., None]
  poison = lambda a_QGT: jnp.where(learned_QGT, a_QGT, jnp.nan)  # noqa: E731
  poisoned = r.replace(
    rewards_QG=jnp.where(r.valid_QG, r.rewards_QG, jnp.nan),
    behaviour_logprobs_QGT=poison(r.behaviour_logprobs_QGT),
    teacher_logprobs_QGT=poison(r.teacher_logprobs_QGT),
    reference_logprobs_QGT=poison(r.reference_logprobs_QGT),
    teacher_states_QGTD=jnp.where(learned_QGT[..., None], r.teacher_states_QGTD, jnp.nan),
    top_logprobs_QGTK=jnp.where(learned_QGT[..., None], r.top_logprobs_QGTK, jnp.nan),
  )
  assert_same(gradient(poisoned, **case), gradient(r, **case), atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sample_that_is_not_valid_is_as_if_it_were_not_there(case):
  r = rollout()
  last = r.replace(valid_QG=jnp.ones((Q, G), bool).at[:, -1].set(False))
  without = jax.tree.map(lambda a: a[:, :-1] if a.ndim > 1 else a, last)
  assert_same(gradient(last, **case)[0], gradient(without, **case)[0])


def test_a_batch_without_valid_samples_changes_nothing():
  grad_VV, metrics = gradient(rollout().replace(valid_QG=jnp.zeros((Q, G), bool)))
  assert not np.any(grad_VV)
  assert all(bool(jnp.isfinite(value)) for value in metrics.values())


def test_the_better_half_becomes_likelier():
  # Two completions of one token: the rewarded one gains what the other loses.
  r = jax.tree.map(lambda a: a[:1, :2] if a.ndim > 1 else a[:1], rollout())
  r = r.replace(
    tokens_QGT=jnp.array([[[0, 1, 2, 0, 0], [0, 1, 3, 0, 0]]]),
    loss_mask_QGT=jnp.zeros((1, 2, T), bool).at[..., 2].set(True),
    rewards_QG=jnp.array([[1.0, 0.0]]),
    valid_QG=jnp.ones((1, 2), bool),
  )
  grad_VV, _ = gradient(r)
  assert grad_VV[1, 2] < 0 < grad_VV[1, 3]
  assert not np.any(np.delete(grad_VV, 1, axis=0))


@pytest.mark.parametrize("ratio", loss.RATIOS.values(), ids=loss.RATIOS)
@pytest.mark.parametrize("advantage", [grpo, mopd])
def test_on_policy_all_ratio_forms_are_reinforce(ratio, advantage):
  r = rollout(noise=0.5)
  assert_same(gradient(r, advantage, ratio=ratio)[0], gradient(r, advantage)[0])


def test_ratio_and_correction_off_policy_are_a_loop_over_tokens():
  """A fp64 loop: GSPO against the proximal policy, and the sequence mask against the sampler."""
  r = rollout(noise=0.5)
  rows, count = to_rows(r, mopd(r))
  own_BT = np.asarray(own_logprobs(r), np.float64).reshape(-1, T)
  rows["proximal"] = jnp.asarray(own_BT + 0.3 * np.sin(np.arange(own_BT.size)).reshape(own_BT.shape), jnp.float32)
  value, low, high = 0.0, 0.02, 0.03
  kept = clipped = 0
  for b in range(Q * G):
    learned_T = np.flatnonzero(rows["mask"][b])
    if not len(learned_T):
      continue
    proximal_T, behaviour_T, advantages_T = (
      np.asarray(rows[name][b], np.float64)[learned_T] for name in ("proximal", "behaviour", "advantages")
    )
    weights_T = np.exp(proximal_T - behaviour_T)
    inside = 0.8 <= np.exp(np.mean(proximal_T - behaviour_T)) <= 1.25
    ratio = np.exp(np.mean(own_BT[b, learned_T] - proximal_T))
    kept += inside
    for weight, a in zip(weights_T, advantages_T, strict=True):
      free, held = ratio * weight * a * inside, np.clip(ratio, 1 - low, 1 + high) * weight * a * inside
      clipped += held < free
      value -= min(free, held)
  _, metrics = gradient_of_rows(
    rows, count, ratio=functools.partial(loss.gspo, low=low, high=high),
    correction=functools.partial(loss.sequence_mask, low=0.8, high=1.25),
  )  # fmt: skip
  assert 0 < kept < Q * G and clipped  # Otherwise the test would show nothing.
  np.testing.assert_allclose(metrics["loss/policy"], value / float(count), rtol=1e-5)
  np.testing.assert_allclose(metrics["policy/clipped"], clipped / float(count), rtol=1e-5)


def test_the_entropy_term_is_the_weight_times_the_mean_entropy():
  r = rollout()
  (plain_VV, plain), (got_VV, got) = gradient(r), gradient(r, entropy_weight=0.5)
  np.testing.assert_allclose(got["loss/policy"], plain["loss/policy"] - 0.5 * plain["policy/entropy"], rtol=1e-5)
  rows, _ = to_rows(r, grpo(r))

  def mean_entropy(table_VV):
    scores = score({"table_VV": table_VV}, rows["tokens"], rows["segment_ids"])
    return jnp.sum(jnp.where(rows["mask"], scores.entropy_BT, 0.0)) / jnp.sum(rows["mask"])

  assert_same(got_VV - plain_VV, -0.5 * jax.grad(mean_entropy)(state().params["table_VV"]))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_proximal_logprobs_are_the_policys_own_of_every_learned_token(accumulate):
  r = rollout()
  rows, _ = to_rows(r, grpo(r))
  got_BT = proximal_logprobs(score, state().params, rows, accumulate=accumulate)
  learned_BT = np.asarray(rows["mask"])
  np.testing.assert_allclose(got_BT[learned_BT], own_logprobs(r).reshape(-1, T)[learned_BT], rtol=1e-6)


@pytest.mark.parametrize("advantage", ADVANTAGES.values(), ids=ADVANTAGES)
def test_several_steps_are_one_compilation(advantage):
  rows_fn = jax.jit(lambda r: (*to_rows(r, advantage(r)), rollout_metrics(r)))
  step, current = jax.jit(policy_gradient_step(score, TX)), state()
  for seed in range(3):
    rows, count, of_rollout = rows_fn(rollout(seed))
    current, metrics = step(current, rows, count)
    metrics |= of_rollout
  assert step._cache_size() == 1
  assert int(current.step) == 3
  assert set(metrics) >= {
    "loss/policy", "policy/entropy", "policy/sampler_kl", "policy/ratio_max",
    "policy/ratio_masked", "norm/grad", "norm/update", "norm/param", "reward/mean",
  }  # fmt: skip
