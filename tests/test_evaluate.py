"""Tests of held-out scores: each verdict counts once, in its own domain."""

import numpy as np
import pytest
from sampled import samples_of

from nemocascade.data.chat import Turn
from nemocascade.domains.rows import make_prompt
from nemocascade.evaluate.suites import evaluate, mean_interval, score_verdicts
from nemocascade.verifiers.verdict import Completion, Verdict


def verdicts(*rewards):
  return [Verdict(r or 0.0, "", masked=r is None) for r in rewards]


def numbered(rows, G=2):
  """A completion has as many sampled tokens as the number of its row, and is unfinished if that is odd."""
  n_Q = np.array([row["number"] for row in rows])
  mask_QGT = np.arange(16)[None, None] < np.broadcast_to(n_Q[:, None, None], (len(rows), G, 1))
  turn = lambda n: Turn(reasoning=None, content=str(n), tool_calls=(), error=None, finished=n % 2 == 0)  # noqa: E731
  completions = [[Completion((turn(n),)) for _ in range(G)] for n in n_Q]
  domains = [row["agent_ref"]["name"] for row in rows]
  return samples_of(completions, rows=list(rows), domains=domains, mask_QGT=mask_QGT, T=16)


def test_a_mean_is_over_prompts_and_what_has_no_verdict_is_in_none():
  # Prompt means are 1, 1/2 and 0. The fourth prompt has no verdict, and the third has only one of two.
  score = score_verdicts([verdicts(1.0, 1.0), verdicts(1.0, 0.0), verdicts(None, 0.0), verdicts(None, None)])
  assert score.mean == pytest.approx(0.5)
  assert (score.prompts, score.masked) == (3, 3)  # The mean is over three prompts.
  assert score.low < 0.5 < score.high


def test_no_verdicts_at_all_are_a_mean_of_0_that_may_be_anything():
  score = score_verdicts([verdicts(None)])
  assert (score.mean, score.low, score.high, score.masked) == (0.0, 0.0, 1.0, 1)


@pytest.mark.parametrize("n, successes", [(10, 0), (10, 10), (256, 64)])
def test_the_interval_of_shares_is_wilsons(n, successes):
  from scipy.stats import binomtest

  found = mean_interval(np.r_[np.ones(successes), np.zeros(n - successes)])
  expected = binomtest(successes, n).proportion_ci(method="wilson")
  np.testing.assert_allclose(found, (expected.low, expected.high), atol=1e-6)


@pytest.mark.parametrize(
  "rewards_Q", [[-1.0, -0.5], [5.0, 3.0, 8.0], [1.0, 1.0 + 1e-9], [3.0], [-1.0], [0.2, 1.5], [-7.0]]
)
def test_the_interval_of_rewards_of_another_range_holds_their_mean(rewards_Q):
  score = score_verdicts([[Verdict(reward, "")] for reward in rewards_Q])
  assert score.low < score.mean < score.high
  shifted = score_verdicts([[Verdict(reward - 10.0, "")] for reward in rewards_Q])
  if len(rewards_Q) > 1:
    np.testing.assert_allclose(shifted.high - shifted.low, score.high - score.low, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
def test_each_row_is_scored_once_in_its_own_domain_whatever_the_batch(batch):
  rows = {
    name: [make_prompt(name, f"{name} {i}", number=i + 1) for i in range(count)]
    for name, count in (("a", 5), ("b", 3), ("c", 0))
  }
  asked, judged = [], []

  def collect(chunk, index, count):
    assert len(chunk) == batch  # All calls have one compiled shape.
    asked.append((index, count))
    return numbered(chunk)

  def judge(samples, count):
    judged.extend(row["responses_create_params"]["input"][0]["content"] for row in samples.rows[:count])
    return [verdicts(float(row["number"] == 1), 0.0) for row in samples.rows[:count]]

  scores = evaluate(rows, collect, judge, batch=batch)
  assert len(judged) == len(set(judged)) == 8  # Rows that only fill up the last batch are not judged.
  assert set(scores) == {"a", "b"}  # A domain without rows has no score.
  assert asked == [(i, min(batch, 8 - i)) for i in range(0, 8, batch)]
  assert (scores["a"].prompts, scores["b"].prompts) == (5, 3)
  assert scores["a"].mean == pytest.approx(0.5 / 5) and scores["b"].mean == pytest.approx(0.5 / 3)
  assert (scores["a"].tokens, scores["b"].tokens) == (2 * 15, 2 * 6)
  assert (scores["a"].unfinished, scores["b"].unfinished) == (2 * 3, 2 * 2)
