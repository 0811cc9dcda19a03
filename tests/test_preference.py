"""Preference: mixed demonstrations against a good reference, and pairs ranked by a hidden quality measure."""

import collections
import json
import pathlib

import numpy as np
import pytest

from nemocascade.data import chat
from nemocascade.domains.preference import make_verify
from nemocascade.domains.rows import SPLITS, prompt_messages, split_of
from nemocascade.generated import generator, preference
from nemocascade.generated.generator import Style
from nemocascade.verifiers import judge
from nemocascade.verifiers.verdict import Completion, Verdict

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym/genrm_compare.jsonl"


def gold_rewards(prompts, answers):
  return np.array([preference.gold_quality(p, a) for p, a in zip(prompts, answers, strict=True)])


JUDGE = judge.BradleyTerryJudge(gold_rewards)
GENERATOR, VERIFY = preference.Preference(), make_verify(JUDGE)


def said(text, *, error=None, finished=True):
  return Completion((chat.Turn("so", text, (), error, finished),))


def win_rate(style, *, thinking=True, count=1000):
  chosen = preference.Preference()
  chosen.style = style
  rows = generator.rows(chosen, "train", 0, 0, count)
  rng = np.random.default_rng(0)
  texts = [chosen.demonstrate(row, rng, thinking=thinking)[-1]["content"] for row in rows]
  verdicts = VERIFY(rows, [said(text) for text in texts])
  assert not any(verdict.masked for verdict in verdicts)
  return np.mean([verdict.reward for verdict in verdicts])


@pytest.mark.parametrize("thinking", [True, False])
def test_careful_demonstrations_always_win(thinking):
  assert win_rate(Style("ponder", "dash", sloppy_rate=0.0), thinking=thinking, count=200) == 1.0


@pytest.mark.parametrize("thinking", [True, False])
def test_mixed_demonstrations_win_a_third_of_the_time(thinking):
  assert 0.28 < win_rate(preference.STYLE, thinking=thinking) < 0.42


def test_sloppy_errors_lose():
  assert win_rate(Style("ponder", "dash", sloppy_rate=1.0, error_rate=1.0), count=200) == 0.0


def test_the_reference_is_good_but_not_the_best():
  for row in generator.rows(GENERATOR, "train", 0, 0, 200):
    prompt = prompt_messages(row)
    assert preference.gold_quality(prompt, row["reference"]) in (4.0, 5.0)
    assert preference.gold_quality(prompt, preference.best_answer(prompt).text) == 6.0


def test_gold_quality_by_hand():
  prompt = [{"role": "user", "content": "How do I fix the lamp today ?"}]
  for text, quality in {
    "Gladly , to fix the lamp : test then mend .": 6,
    "To fix the lamp : test then mend .": 5,
    "Gladly , to fix the lamp : test then mend . And so on and so on and so on .": 5,
    "Gladly , to fix the lamp : it depends .": 4,
    "Obviously , to fix the lamp : test then mend .": 3,
    "Gladly , to fix the lamp : test then mend . Everyone knows that .": 4,
    "Gladly , to fix the kettle : test then mend .": 3,
    "Gladly , to fix the lamp : soak then rinse .": 4,
    "Gladly , to fix the lamp : mend then test .": 4,
    "Gladly , to fix the lamp : test then mend . Gladly , to fix the lamp : test then mend .": 5,
    "Gladly , Gladly , to fix the lamp : test then mend .": 5,
    "Gladly , to fix the lamp": 0,
    "": -1,
  }.items():
    assert preference.gold_quality(prompt, text) == quality, text


def test_there_are_two_thousand_prompts_and_none_tells_the_answer():
  rows = generator.rows(GENERATOR, "train", 0, 0, 6000)
  texts = {prompt_messages(row)[0]["content"] for row in rows}
  assert len(texts) >= 2000
  steps = {step for pair in preference.STEPS.values() for step in pair}
  assert not any(steps & set(text.split()) for text in texts)


def test_without_a_judge_there_is_no_verdict():
  (row,) = generator.rows(GENERATOR, "train", 0, 0, 1)
  (verdict,) = make_verify()([row], [said("hi")])
  assert verdict.masked and "judge" in verdict.reason


@pytest.mark.parametrize("bad", [said("x", finished=False), said("x", error="no </think>"), said("  "), Completion(())])
def test_malformed_and_unfinished_completions_lose(bad):
  (row,) = generator.rows(GENERATOR, "train", 0, 0, 1)
  (verdict,) = VERIFY([row], [bad])
  assert verdict == Verdict(0.0, verdict.reason) and not verdict.masked


def test_the_reference_itself_does_not_win():
  rows = generator.rows(GENERATOR, "train", 0, 0, 20)
  verdicts = VERIFY(rows, [said(row["reference"]) for row in rows])
  assert {verdict.reward for verdict in verdicts} == {0.0}


def test_a_judge_that_fails_masks_what_it_was_asked_and_no_more():
  def broken(prompts, answers):
    raise RuntimeError("out of order")

  rows = generator.rows(GENERATOR, "train", 0, 0, 2)
  chosen = make_verify(judge.BradleyTerryJudge(broken))
  asked, silent = chosen(rows, [said("hi"), said("", finished=False)])
  assert asked.masked and "out of order" in asked.reason
  assert not silent.masked and silent.reward == 0.0


def test_verdicts_keep_their_order_and_the_judge_is_asked_once():
  calls = []

  def counting(prompts, answers):
    calls.append(len(answers))
    return gold_rewards(prompts, answers)

  rows = generator.rows(GENERATOR, "train", 0, 0, 3)
  best = [preference.best_answer(prompt_messages(row)).text for row in rows]
  chosen = make_verify(judge.BradleyTerryJudge(counting))
  verdicts = chosen(rows, [said(best[0]), said("", finished=False), said(best[2])])
  assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0]
  assert calls == [4]


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_ordered_by_the_hidden_measure_and_stay_in_their_split(split):
  pairs = preference.preference_pairs(0, 400, split)
  assert pairs == preference.preference_pairs(0, 400, split)
  for messages, chosen, rejected in pairs:
    quality = [preference.gold_quality(messages, text) for text in (chosen, rejected)]
    assert quality[0] > quality[1]
    assert split_of({"responses_create_params": {"input": messages}}) == split


def test_no_length_and_no_word_alone_gives_the_pairs_away():
  pairs = preference.preference_pairs(1, 2000, "train")
  longer = np.mean([len(chosen.split()) > len(rejected.split()) for _, chosen, rejected in pairs])
  assert 0.3 < longer < 0.7
  seen = collections.Counter()
  for _, chosen, rejected in pairs:
    for part in ("Gladly", "Obviously", "depends", "so on", "Everyone"):
      seen[part, "chosen"] += part in chosen
      seen[part, "rejected"] += part in rejected
  assert all(seen[part, side] > 20 for part, side in seen), seen


@pytest.mark.skipif(not GYM.exists(), reason="real rows are not here")
def test_real_rows_have_no_reference_and_are_masked():
  rows = [json.loads(line) for line in GYM.read_text().splitlines()]
  verdicts = VERIFY(rows, [said("hi") for _ in rows])
  assert all(verdict.masked and "reference" in verdict.reason for verdict in verdicts)


@pytest.mark.skipif(not GYM.exists(), reason="real rows are not here")
def test_real_rows_are_compared_in_groups():
  rows = [json.loads(line) for line in GYM.read_text().splitlines()]
  by_length = judge.BradleyTerryJudge(lambda prompts, answers: np.array([len(a) for a in answers]))
  rewards_QG = judge.batch_rewards(
    by_length, [prompt_messages(row) for row in rows],
    [["short", "rather long"] for _ in rows],
    think_tokens_QG=np.ones((len(rows), 2), int), answer_tokens_QG=np.ones((len(rows), 2), int),
    bonus=0.0,
  )  # fmt: skip
  assert (rewards_QG[:, 1] > rewards_QG[:, 0]).all()


def test_phrases_stand_in_what_is_written():
  rows = generator.rows(GENERATOR, "train", 0, 0, 300)
  text = "\n".join(
    str(message) for row in rows
    for message in [*prompt_messages(row), row["reference"],
                    *GENERATOR.demonstrate(row, np.random.default_rng(len(str(row))), thinking=True)]
  )  # fmt: skip
  pairs = preference.preference_pairs(0, 200)
  text += "\n".join(chosen + rejected for _, chosen, rejected in pairs)
  assert [phrase for phrase in GENERATOR.phrases if phrase not in text] == []
