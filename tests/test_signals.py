"""Signals: which ones a config needs, and what becomes of samples whose judge fails."""

import jax
import numpy as np
import pytest
from sampled import samples_of

from configs.tiny import if_rl
from nemocascade.data.chat import Turn
from nemocascade.errors import UserError
from nemocascade.report.metrics import Phases
from nemocascade.runtime import signals
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.sampler import Sampled
from nemocascade.runtime.signals import SIGNALS, Signal, Sources
from nemocascade.verifiers.judge import Comparison
from nemocascade.verifiers.verdict import Completion, Verdict, no_verdict

NONE = dict(advantage="grpo", kl_weight=0.0, distillation_weight=0.0, reward="verdict")


@pytest.mark.parametrize(
  "fields, names",
  [
    ({}, []),
    ({"reward": "pairwise"}, ["compared"]),
    ({"advantage": "mopd"}, ["teacher_logprobs"]),
    ({"distillation_weight": 1.0, "distillation": "reverse_kl"}, ["teacher_states"]),
    ({"distillation_weight": 1.0, "distillation": "forward_kl_topk"}, ["teacher_likeliest"]),
    ({"kl_weight": 0.1, "advantage": "mopd"}, ["teacher_logprobs", "reference"]),
  ],
)
def test_a_stage_gets_the_signals_that_its_config_needs(fields, names):
  c = if_rl.get_config("smoke")
  c.update(NONE | fields)
  assert [signal.name for signal in signals.wanted(c)] == names
  scored = [signal for signal in SIGNALS if signal.name in names and signal.phase == "score"]
  assert signals.scored_tokens(samples(), signals.wanted(c)) == 4 * 3 * len(scored)


class Words:
  """Stands for a tokenizer: a token per word."""

  def encode(self, text):
    return text.split()


class Longer:
  """A judge that prefers the longer answer."""

  def compare_many(self, matches):
    score = lambda text: float(len(text))
    return [Comparison(score(m.first), score(m.second), 3.5) for m in matches]


class Down:
  def __init__(self, error):
    self.error = error

  def compare_many(self, matches):
    raise self.error


def samples():
  """Two prompts with two finished completions of one and two words; three tokens each."""
  say = lambda text: Completion((Turn(None, text, finished=True),))
  rows = [{"responses_create_params": {"input": "talk"}}] * 2
  return samples_of([[say("one"), say("one two")]] * 2, rows=rows, domains=["preference"] * 2, limit=9, T=3)


def annotated(judge):
  c = if_rl.get_config("smoke")
  c.update(NONE | {"reward": "pairwise", "dynamic_filtering": False, "overlong": "keep"})
  verdicts = [[no_verdict("row", "no judge")] * 2] * 2
  sampled = Sampled(samples(), verdicts, verdicts, rounds=1, too_long=0, spent=Spent(), cost={})
  s = Sources(c, None, Words(), np.float32(1), judge, None, None, None)
  return signals.annotate(sampled, signals.wanted(c), s, Phases())


def test_answers_that_a_judge_compares_get_rewards_though_their_own_verdicts_are_masked():
  rollout, counts = annotated(Longer())
  assert rollout.valid_QG.all() and counts["rollout/masked"] == 0
  assert (rollout.rewards_QG[:, 1] > rollout.rewards_QG[:, 0]).all()


def test_a_judge_that_raises_masks_its_samples_and_is_counted():
  rollout, counts = annotated(Down(RuntimeError("connection lost")))
  assert not rollout.valid_QG.any() and not rollout.rewards_QG.any()
  assert counts["rollout/masked"] == counts["rollout/masked_error"] == 1


def test_a_wrong_request_to_the_judge_is_no_failure_of_it():
  with pytest.raises(UserError, match="the judge's folder"):
    annotated(Down(UserError("the judge's folder")))


def test_a_new_signal_needs_its_entry_alone_to_reach_an_advantage():
  c = if_rl.get_config("smoke")
  c.update(NONE | {"dynamic_filtering": False})
  surprise = Signal("surprise", lambda c: True, lambda s, samples: {"surprise_QGT": samples.behaviour_logprobs_QGT - 1})
  verdicts = [[Verdict(1.0, "")] * 2] * 2
  sampled, s = (
    Sampled(samples(), verdicts, verdicts, 1, 0, Spent(), {}),
    Sources(c, None, None, 1, None, None, None, None),
  )
  rollout, _ = signals.annotate(sampled, [surprise], s, Phases())
  advantages_QGT = jax.jit(lambda r: r.signals["surprise_QGT"] * r.rewards_QG[..., None])(rollout)
  np.testing.assert_array_equal(advantages_QGT, -1)
