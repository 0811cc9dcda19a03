"""Inputs that once gave wrong numbers in the policy gradient, with the correct ones (cases/policy.json)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import samples_of
from test_episode import TALK, TOKENIZER
from test_episode import run as collected
from test_policy_gradient import TX, rollout, score, state
from test_preference import said

from configs.nano_30b import code_rl
from configs.tiny import if_rl
from experiments import rl
from nemocascade.advantage import ADVANTAGES, grpo, mopd, mopd_clipped, needs_of, reinforce_pp
from nemocascade.data.tokenizer import IM_END
from nemocascade.domains.preference import make_verify
from nemocascade.errors import UserError
from nemocascade.evaluate.suites import score_verdicts
from nemocascade.rollout import rewards as scoring
from nemocascade.step import loss
from nemocascade.step.policy_gradient import policy_gradient_step
from nemocascade.step.rows import to_rows
from nemocascade.verifiers.judge import BradleyTerryJudge, answer_of, batch_rewards
from nemocascade.verifiers.verdict import NONFINITE, Verdict

CASES = json.loads((Path(__file__).parent / "cases" / "policy.json").read_text())
ROW_MEAN = lambda x_BT: jnp.broadcast_to(jnp.mean(x_BT, axis=1, keepdims=True), x_BT.shape)  # noqa: E731
of_log_ratios = pytest.mark.parametrize("x", CASES["log_ratios"])


def rows_of(name):
  return pytest.mark.parametrize("case", CASES[name], ids=[case["id"] for case in CASES[name]])


# Exponents.


@pytest.mark.parametrize("x", [-30.0, -20.0, -1.0, 0.0, 0.7, 5.0, 19.9, 20.0])
def test_the_bounded_exponential_is_the_exponential_in_value_and_slope_up_to_its_bound(x):
  value, slope = jax.value_and_grad(loss.bounded_exp)(jnp.float32(x))
  np.testing.assert_array_equal(value, jnp.exp(jnp.float32(x)))
  np.testing.assert_array_equal(slope, jnp.exp(jnp.float32(x)))


@of_log_ratios
@pytest.mark.parametrize("form", loss.RATIOS)
def test_a_ratio_form_is_finite_and_points_the_right_way_however_far_the_policy_has_moved(form, x):
  a_1T = jnp.array([CASES["advantages"]])

  def value(logprobs_1T):
    gain_1T, clipped_1T = loss.RATIOS[form](logprobs_1T, jnp.full_like(a_1T, -3.0), a_1T, ROW_MEAN)
    return jnp.sum(gain_1T), (gain_1T, clipped_1T)

  slope_1T, (gain_1T, clipped_1T) = jax.grad(value, has_aux=True)(jnp.full_like(a_1T, x - 3.0))
  assert np.isfinite(gain_1T).all() and np.isfinite(slope_1T).all()
  a, slope, clipped = (np.asarray(v[0]) for v in (a_1T, slope_1T, clipped_1T))
  said_ = CASES["ratio_slopes"][form]["up" if x > 0 else "down"]
  if said_ == "a < 0: steep":  # Tokens with a < 0 that became too likely have a steep gradient; all others have none.
    assert (slope[a < 0] <= -np.exp(20.0) * 0.999).all() and not slope[a >= 0].any()
    assert clipped[a > 0].all() and not clipped[a <= 0].any()
  else:
    expected = {"0": 0.0, "a": a, "1.28 a": 1.28 * a}[said_]
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-5)


@of_log_ratios
@pytest.mark.parametrize("name", loss.CORRECTIONS)
def test_a_correction_is_finite_however_far_the_trainer_is_from_the_sampler(name, x):
  gap_1T = jnp.array([[x]])
  weight = float(loss.CORRECTIONS[name](gap_1T, gap_1T, ROW_MEAN)[0, 0])
  assert weight == pytest.approx(CASES["correction_weights"][name]["up" if x > 0 else "down"], abs=1e-8)
  # Only the drawn probability is far off: a token that is kept must have a finite weight.
  assert np.isfinite(loss.CORRECTIONS[name](jnp.zeros((1, 1)), gap_1T, ROW_MEAN)).all()


@of_log_ratios
@pytest.mark.parametrize("name", loss.KLS)
def test_a_kl_estimate_is_finite_and_draws_the_policy_to_its_reference(name, x):
  value, slope = jax.value_and_grad(lambda logprob: loss.KLS[name](logprob, jnp.float32(-3.0)))(jnp.float32(x - 3.0))
  assert np.isfinite(value) and np.isfinite(slope)
  if name == "k1":
    assert slope == 1 and value == pytest.approx(x, rel=1e-5)
  else:
    assert value > 0 and np.sign(slope) == np.sign(x)  # Gradient descent must shrink the gap.


@pytest.mark.parametrize("x", [-1e30, -1e15, 1e15, 1e30])
def test_every_function_is_finite_where_a_policy_is_lost(x):
  a_1T, gap_1T = jnp.array([CASES["advantages"]]), jnp.full((1, len(CASES["advantages"])), x)
  for form in loss.RATIOS.values():
    gain = lambda logprobs_1T, form=form: jnp.sum(form(logprobs_1T, jnp.zeros_like(a_1T), a_1T, ROW_MEAN)[0])
    assert all(np.isfinite(found).all() for found in jax.value_and_grad(gain)(gap_1T)), form
  for kl in loss.KLS.values():
    total = lambda logprobs_1T, kl=kl: jnp.sum(kl(logprobs_1T, jnp.zeros_like(a_1T)))
    assert all(np.isfinite(found).all() for found in jax.value_and_grad(total)(gap_1T)), kl
  for correction in loss.CORRECTIONS.values():
    assert np.isfinite(correction(jnp.zeros_like(gap_1T), gap_1T, ROW_MEAN)).all(), correction


@of_log_ratios
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("name", loss.DISTILLATIONS)
def test_a_distillation_is_finite_however_far_the_policy_is_from_its_teacher(name, temperature, x):
  one, wanted = jnp.ones((1, 1, 1)), jnp.ones((1, 1), bool)
  heads_ZDV = jnp.zeros((1, 1, 3))
  rows = {
    "teacher_states": one, "teacher": jnp.zeros((1, 1), jnp.int32),
    "top_tokens": jnp.array([[[1, 0]]]), "top_logprobs": jnp.full((1, 1, 2), -np.log(3.0)),
  }  # fmt: skip

  def kl(head_DV):
    return loss.DISTILLATIONS[name](one, head_DV, wanted, rows, heads_ZDV, jnp.float32(temperature))[0, 0]

  value, slope_DV = jax.value_and_grad(kl)(jnp.array([[x, 0.0, 0.0]]))
  assert np.isfinite(value) and np.isfinite(slope_DV).all() and value > 0.1
  if name.startswith("forward"):  # The gradient is p - q: it lowers a token that is too likely.
    assert np.sign(slope_DV[0, 0]) == np.sign(x)


@of_log_ratios
def test_advantages_of_teachers_are_finite_and_no_more_than_the_gap(x):
  r = rollout()
  r = r.replace(teacher_logprobs_QGT=r.behaviour_logprobs_QGT + x)
  for name in (name for name, fn in ADVANTAGES.items() if needs_of(fn).teachers):
    assert np.isfinite(ADVANTAGES[name](r)).all()
  np.testing.assert_allclose(mopd(r), x, rtol=1e-4)
  np.testing.assert_allclose(mopd_clipped(r, clip=20.0), np.clip(x, -20, 20), rtol=1e-4)


@pytest.mark.parametrize(
  "ratio, correction", [*((r, "icepop") for r in loss.RATIOS), *(("token_clip", c) for c in loss.CORRECTIONS)]
)
def test_a_step_is_finite_in_all_it_says_and_does(ratio, correction):
  """Sampler, proximal policy and reference each differ from the policy by x in log-probability."""
  r = rollout()
  rows, count = to_rows(r, grpo(r))
  own_BT = score(state().params, rows["tokens"], rows["segment_ids"]).logprobs_BT
  step = jax.jit(policy_gradient_step(
    score, TX, ratio=loss.RATIOS[ratio], correction=loss.CORRECTIONS[correction], kl_weight=0.1
  ))  # fmt: skip
  for x in CASES["log_ratios"]:
    far = {name: own_BT - x for name in ("proximal", "reference")} | {"behaviour": own_BT - 2 * x}
    after, metrics = step(state(), rows | far, count)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics))), x


# Rewards that are not finite.


def samples(rewards_G, limit=8):
  return samples_of([[said("x") for _ in rewards_G]], rows=[{}], limit=limit, T=8)


@rows_of("nonfinite_rewards")
@pytest.mark.parametrize("from_judge", [False, True], ids=["verdict", "pairwise"])
@pytest.mark.parametrize("advantage", [grpo, reinforce_pp])
def test_a_reward_that_is_no_number_masks_its_sample_and_changes_no_other(case, from_judge, advantage):
  rewards_G = np.array(case["rewards"], np.float64)
  verdicts = [Verdict(1.0 if from_judge else r, "") for r in rewards_G]
  rollout_, counts = scoring.to_rollout(
    samples(rewards_G), [verdicts], compared=[[Verdict(r, "") for r in rewards_G]] if from_judge else None
  )
  finite_G = np.isfinite(rewards_G)
  np.testing.assert_array_equal(rollout_.valid_QG, finite_G[None])
  assert np.isfinite(rollout_.rewards_QG).all() and all(np.isfinite(value) for value in counts.values())
  assert counts["rollout/masked_nonfinite"] == counts["rollout/masked"] == pytest.approx(1 - finite_G.mean())
  as_jax = lambda r: jax.tree.map(jnp.asarray, r)  # noqa: E731
  got_G = np.asarray(advantage(as_jax(rollout_)))[0, :, 0]
  assert not got_G[~finite_G].any()
  if finite_G.any():
    alone, _ = scoring.to_rollout(samples(rewards_G[finite_G]), [[Verdict(r, "") for r in rewards_G[finite_G]]])
    np.testing.assert_allclose(got_G[finite_G], np.asarray(advantage(as_jax(alone)))[0, :, 0], rtol=1e-6)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_verdict_of_no_number_is_none_and_makes_no_signal(reward):
  verdict = Verdict(reward, "half right")
  assert (verdict.reward, verdict.masked, verdict.cause) == (0.0, True, NONFINITE)
  assert scoring.informative([[[verdict, Verdict(1.0, ""), Verdict(1.0, "")]]]) == [[]]
  assert not verdict.success and score_verdicts([[verdict]]).masked == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_answer_that_the_reward_model_gives_no_number_is_as_if_it_had_not_played(bad):
  of = {"bad": bad, "a": 0.3, "b": -1.0, "c": 2.0}
  judge = BradleyTerryJudge(lambda prompts, answers: np.array([of[answer] for answer in answers]))

  def rewards(*answers):
    ones = np.ones((1, len(answers)), int)
    told = dict(think_tokens_QG=ones, answer_tokens_QG=ones)
    return batch_rewards(judge, [[{"role": "user", "content": "?"}]], [[answer_of(said(x)) for x in answers]], **told)[
      0
    ]

  got = rewards("a", "bad", "b", "c")
  assert np.isnan(got[1])
  np.testing.assert_allclose(got[[0, 2, 3]], rewards("a", "b", "c"), rtol=1e-6)
  assert np.isnan(rewards("a", "bad")).all()  # Its only opponent has no valid score.


def test_a_preference_that_is_no_number_is_no_verdict():
  judge = BradleyTerryJudge(
    lambda prompts, answers: np.array([np.nan if x == "bad" else float(len(x)) for x in answers])
  )
  row = {"responses_create_params": {"input": [{"role": "user", "content": "?"}]}, "reference": "aa"}
  verdicts = make_verify(judge)([row] * 3, [said("bad"), said("a"), said("aaa")])
  assert [(v.reward, v.masked) for v in verdicts] == [(0.0, True), (0.0, False), (1.0, False)]


# The length limit is the sampler's.


@rows_of("soft_room")
def test_the_soft_penalty_counts_the_room_that_the_sampler_had(case):
  word = TOKENIZER.encode("one")[-1]
  P = collected([], [TALK], thinking=False).length_QG[0, 0] - 1  # The model says only a stop token.
  script = [0] * P + [word] * (case["completion"] - 1) + [IM_END]
  taken = collected([script], [TALK], thinking=False, completion_tokens=case["row_tokens"])
  assert taken.sampled_QG[0, 0] == case["completion"]
  expected = taken.tokens_QGT.shape[-1] if case["row_tokens"] is None else P + case["row_tokens"]
  assert (taken.limit_QG == expected).all()
  verdicts = [[Verdict(1.0, "")] * taken.tokens_QGT.shape[1]]
  rollout_, _ = scoring.to_rollout(taken, verdicts, overlong=scoring.soft)
  np.testing.assert_allclose(rollout_.rewards_QG, case["reward"], atol=1e-6)


# Pass at k.


@rows_of("pass_at_k")
def test_a_success_is_a_full_verdict(case):
  scored = score_verdicts([[Verdict(float(r), "") for r in group] for group in case["verdicts"]])
  assert (scored.best, scored.mean) == (case["best"], pytest.approx(case["mean"]))


# Nucleus sampling.


@rows_of("truncated_sampling")
def test_a_nucleus_without_a_correction_is_refused_with_the_bias_it_would_bring(case):
  for c in (if_rl.get_config("smoke"), code_rl.get_config()):
    c.rollout.top_p, c.correction = case["top_p"], case["correction"]
    if not case["refused"]:
      rl.check(c)
      continue
    with pytest.raises(UserError) as error:
      rl.check(c)
    said_ = str(error.value)
    assert f"rollout.top_p={case['top_p']}" in said_ and "too much" in said_ and "icepop" in said_
    assert len(said_) < 200 and "\n" not in said_


def test_a_rollout_of_a_nucleus_carries_both_log_probabilities_to_the_step():
  """Metrics compare with the whole distribution; importance weights use the distribution drawn from."""
  r = rollout()
  r = r.replace(drawn_logprobs_QGT=r.behaviour_logprobs_QGT - jnp.log(0.9))
  told = {}

  def correction(gap_BT, drawn_gap_BT, mean_of):
    told.update(gap=gap_BT, drawn=drawn_gap_BT)
    return loss.tis(gap_BT, drawn_gap_BT, mean_of)

  changes = {}
  for name, of in (("nucleus", r), ("whole", r.replace(drawn_logprobs_QGT=None))):
    rows, count = to_rows(of, grpo(of))
    with jax.disable_jit():
      after, metrics = policy_gradient_step(score, TX, correction=correction)(state(), rows, count)
    changes[name] = state().params["table_VV"] - after.params["table_VV"]
    mask_BT = np.asarray(rows["mask"])
    np.testing.assert_allclose(told["gap"][mask_BT], 0.0, atol=1e-6)
    np.testing.assert_allclose(told["drawn"][mask_BT], np.log(0.9) if name == "nucleus" else 0.0, atol=1e-6)
    assert metrics["policy/sampler_error"] < 1e-6 and abs(metrics["policy/ratio_max"] - 1) < 1e-5
  np.testing.assert_allclose(changes["nucleus"], 0.9 * changes["whole"], atol=1e-6)
  assert np.abs(changes["whole"]).max() > 1e-3
