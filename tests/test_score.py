"""Tests of scoring: each verdict goes to its completion, and masked samples are left out of the loss."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from sampled import samples_of

from nemocascade.data.chat import Turn
from nemocascade.domains.domain import Domain
from nemocascade.rollout import rewards
from nemocascade.verifiers.verdict import Completion, Verdict

T = 4


class Echo:
  """A Verify that remembers what it was asked. A completion's text is its reward; "9" is masked."""

  def __init__(self):
    self.calls = []

  def __call__(self, rows, completions):
    self.calls.append((list(rows), list(completions)))
    return [Verdict(float(c.content), "", masked=c.content == "9") for c in completions]


def samples(contents_QG, *, names=None, finished=True):
  """Completions that say their own rewards; rows are their numbers."""
  finished_QG = np.broadcast_to(finished, np.shape(contents_QG))
  completions = [
    [Completion((Turn(None, str(content), finished=bool(end)),)) for content, end in zip(contents, ends, strict=True)]
    for contents, ends in zip(contents_QG, finished_QG, strict=True)
  ]
  tokens_QGT = np.arange(finished_QG.size * T, dtype=np.int32).reshape(*finished_QG.shape, T)
  mask_QGT = np.broadcast_to(np.arange(T) >= 1, tokens_QGT.shape)
  return samples_of(completions, domains=names, tokens_QGT=tokens_QGT, mask_QGT=mask_QGT)


def judged(contents_QG, **fields):
  s = samples(contents_QG, **fields)
  return s, rewards.judge(s, {"echo": Domain("echo", None, Echo())})


def test_every_completion_gets_its_own_verdict_and_a_domain_is_asked_once():
  s = samples([[1, 2], [3, 4], [5, 6]], names=["a", "b", "a"])
  domains = {name: Domain(name, None, Echo()) for name in ("a", "b", "idle")}
  verdicts = rewards.judge(s, domains)
  assert [[v.reward for v in group] for group in verdicts] == [[1, 2], [3, 4], [5, 6]]
  assert [len(domains[name].verify.calls) for name in domains] == [1, 1, 0]
  rows, completions = domains["a"].verify.calls[0]
  assert rows == [0, 0, 2, 2] and [c.content for c in completions] == ["1", "2", "5", "6"]


class Heard(Exception):
  """Ends a process after what it has said in an exchange."""


def test_each_process_judges_its_own_completions_and_gets_all_verdicts():
  s, said, asked = samples([[1, 2], [3, 4], [5, 6]], names=["a", "b", "a"]), [], {}
  parts = []
  for i in range(2):
    own = [[c if (q + g) % 2 == i else None for g, c in enumerate(group)] for q, group in enumerate(s.completions)]
    parts.append(dataclasses.replace(s, completions=own))
  parts.append(dataclasses.replace(s, completions=[[None] * 2] * 3))  # A third process has none.

  def tell(value, what):
    said.append(json.loads(json.dumps(value)))
    raise Heard(what)

  for part in parts:
    echoes = {name: Echo() for name in "ab"}
    domains = {name: Domain(name, None, echo) for name, echo in echoes.items()}
    with pytest.raises(Heard, match="verdicts"):
      rewards.judge(part, domains, exchange=tell)
    for name, echo in echoes.items():
      asked.setdefault(name, []).append([c.content for c in echo.calls[0][1]])
  assert asked == {"a": [["1", "5"], ["2", "6"], []], "b": [["4"], ["3"], []]}
  for part in parts:
    verdicts = rewards.judge(part, {name: Domain(name, None, Echo()) for name in "ab"}, exchange=lambda *_: said)
    assert [[v.reward for v in group] for group in verdicts] == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
  "overlong, shaped, valid",
  [
    ("zero", [1, 0, 0, 0], [True, True, True, True]),
    ("filter", [1, 1, 0, 0], [True, False, True, False]),
    ("keep", [1, 1, 0, 0], [True, True, True, True]),
  ],
)
def test_what_becomes_of_completions_that_met_the_limit(overlong, shaped, valid):
  s, verdicts = judged([[1, 1, 0, 0]], finished=[[True, False, True, False]])
  rollout, counts = rewards.to_rollout(s, verdicts, overlong=rewards.OVERLONG[overlong])
  np.testing.assert_array_equal(rollout.rewards_QG, [shaped])
  np.testing.assert_array_equal(rollout.valid_QG, [valid])
  assert rollout.rewards_QG.dtype == np.float32
  assert counts["rollout/unfinished"] == 0.5


@pytest.mark.parametrize("overlong", rewards.OVERLONG)
def test_a_completion_without_a_verdict_is_never_trained_on(overlong):
  s, verdicts = judged([[1, 9, 0]])
  rollout, counts = rewards.to_rollout(s, verdicts, overlong=rewards.OVERLONG[overlong])
  np.testing.assert_array_equal(rollout.valid_QG, [[True, False, True]])
  assert counts["rollout/masked"] == pytest.approx(1 / 3)
  assert counts["rollout/verdict"] == 0.5  # Mean over the samples with a verdict.


def test_masked_samples_are_counted_by_their_cause():
  s, _ = judged([[1, 0, 0, 0]])
  masked = [Verdict(0.0, "", masked=True, cause=cause) for cause in ("time", "time", "")]
  _, counts = rewards.to_rollout(s, [[Verdict(1.0, ""), *masked]], overlong=rewards.keep)
  found = {name: n for name, n in counts.items() if name.startswith("rollout/masked")}
  assert found == {
    "rollout/masked": 0.75, "rollout/masked_time": 0.5, "rollout/masked_other": 0.25,
  }  # fmt: skip


def test_masked_samples_of_groups_that_are_not_kept_are_counted_too():
  none, mixed = judged([[9, 9], [9, 9]]), judged([[1, 0], [0, 1]])
  s, verdicts = rewards.refill([none, mixed])
  assert not any(v.masked for group in verdicts for v in group)
  _, counts = rewards.to_rollout(s, verdicts, judged=none[1] + mixed[1])
  assert counts["rollout/masked"] == counts["rollout/masked_other"] == 0.5 and counts["rollout/verdict"] == 0.5


def test_a_batch_without_any_verdict_still_counts():
  s, verdicts = judged([[9, 9]])
  rollout, counts = rewards.to_rollout(s, verdicts, overlong=rewards.keep)
  assert not rollout.valid_QG.any() and counts["rollout/verdict"] == 0.0


def test_rewards_of_compared_groups_take_the_verdicts_place():
  s, verdicts = judged([[1, 0], [1, 1]], finished=[[True, True], [True, False]])
  rollout, counts = rewards.to_rollout(
    s,
    verdicts,
    overlong=rewards.zero,
    compared=[[Verdict(r, "") for r in group] for group in ([0.25, 0.75], [0.5, 0.5])],
  )
  np.testing.assert_array_equal(rollout.rewards_QG, [[0.25, 0.75], [0.5, 0.0]])
  assert counts["rollout/verdict"] == 0.75


def test_tokens_masks_and_logprobs_pass_through_and_their_length_is_counted():
  s, verdicts = judged([[1, 0]])
  rollout, counts = rewards.to_rollout(s, verdicts, overlong=rewards.keep)
  for name in ("tokens_QGT", "segment_ids_QGT", "loss_mask_QGT", "behaviour_logprobs_QGT"):
    np.testing.assert_array_equal(getattr(rollout, name), getattr(s, name))
  assert counts["rollout/tokens"] == T - 1


def test_the_soft_penalty_grows_with_every_token_of_the_last_few():
  # The limit is 10 and the last 4 tokens are penalised: up to 6 lose 0, 8 lose 0.5, 10 lose 1; unfinished lose 1.
  s, verdicts = judged([[1, 1, 1, 0, 1]], finished=[[True, True, True, True, False]])
  lengths_G = np.array([5, 6, 8, 10, 3])
  s = samples_of(s.completions, length_QG=lengths_G[None], T=10)
  rollout, _ = rewards.to_rollout(s, verdicts, overlong=functools.partial(rewards.soft, tokens=4))
  np.testing.assert_allclose(rollout.rewards_QG, [[1, 1, 0.5, -1, 0]])
  assert rollout.rewards_QG.dtype == np.float32 and rollout.valid_QG.all()


def test_dynamic_filtering_is_of_raw_verdicts_though_the_soft_penalty_parts_them():
  s, verdicts = judged([[1, 1]], finished=[[True, False]])
  s.length_QG[0, 0] = 1
  rollout, _ = rewards.to_rollout(s, verdicts, overlong=functools.partial(rewards.soft, tokens=2))
  assert rollout.rewards_QG[0, 0] != rollout.rewards_QG[0, 1]
  assert not rewards.dynamic_filter(rollout, verdicts).valid_QG.any()


def test_dynamic_filtering_leaves_out_groups_whose_raw_verdicts_are_equal():
  # The third group differs only by the length limit, the fourth only by a completion without a verdict.
  s, verdicts = judged(
    [[1, 0], [1, 1], [1, 1], [1, 9], [0, 0]],
    finished=[[True, True], [True, True], [True, False], [True, True], [True, True]],
  )
  rollout, counts = rewards.to_rollout(s, verdicts, overlong=rewards.zero)
  assert rollout.rewards_QG[2].tolist() == [1, 0]
  valid_QG = rewards.dynamic_filter(rollout, verdicts).valid_QG
  np.testing.assert_array_equal(valid_QG, [[True, True]] + [[False, False]] * 4)
  assert counts["rollout/groups_with_signal"] == pytest.approx(1 / 5)
  assert rewards.informative([verdicts, verdicts[1:]]) == [[0], []]


def test_dynamic_filtering_does_not_bring_back_what_was_left_out():
  s, verdicts = judged([[1, 0, 9]])
  rollout, _ = rewards.to_rollout(s, verdicts, overlong=rewards.keep)
  filtered = rewards.dynamic_filter(rollout, verdicts)
  np.testing.assert_array_equal(filtered.valid_QG, [[True, True, False]])


def test_refill_takes_informative_groups_first_in_order_and_keeps_the_shape():
  first, second = judged([[1, 1], [1, 0], [0, 0]]), judged([[0, 1], [1, 1], [1, 0]])
  s, verdicts = rewards.refill([first, second])
  assert [c.content for group in s.completions for c in group] == list("100110")
  assert [[v.reward for v in group] for group in verdicts] == [[1, 0], [0, 1], [1, 0]]
  np.testing.assert_array_equal(s.tokens_QGT[0], first[0].tokens_QGT[1])


def test_refill_fills_up_with_uninformative_groups_when_there_are_too_few():
  s, verdicts = rewards.refill([judged([[1, 1], [1, 0], [0, 0]])])
  assert s.tokens_QGT.shape[0] == 3
  assert [[v.reward for v in group] for group in verdicts] == [[1, 0], [1, 1], [0, 0]]
