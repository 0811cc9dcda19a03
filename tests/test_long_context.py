"""Long contexts: one document holds the answer; prompts are long enough where they are judged."""

import numpy as np
import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains.long_context import make_verify
from nemocascade.domains.rows import prompt_messages
from nemocascade.generated import generator, long_context, registry
from nemocascade.verifiers.verdict import Completion

TASK = long_context.LongContext()


def judge(row, content):
  turn = Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True)
  return make_verify()([row], [Completion((turn,))])[0]


def words(row):
  return len(prompt_messages(row)[0]["content"].split())


def test_the_question_is_answered_by_exactly_one_document():
  for row in generator.rows(TASK, "train", 0, 0, 100):
    name = row["question"].removesuffix("?").split()[-1]
    (text,) = [text for text in row["documents"] if text.startswith(f"{name} ")]
    assert f" has box {row['expected_answer']} " in text


def test_prompts_are_eight_times_as_long_as_those_of_other_domains():
  others = map(registry.make, ["instruction", "math", "stem", "structured"])
  mean = np.mean([words(row) for task in others for row in generator.rows(task, "train", 0, 0, 50)])
  assert min(words(row) for row in generator.rows(TASK, "train", 0, 0, 50)) >= 8 * mean


def test_demonstrations_are_mostly_short_and_some_of_full_length():
  rows = generator.rows(TASK, "train", 0, 0, 500, teaching=True)
  counts = np.array([len(row["documents"]) for row in rows])
  full = counts == long_context.DOCUMENTS
  least, most = long_context.TEACHING_DOCUMENTS
  assert set(counts[~full]) == set(range(least, most + 1))
  assert 0.04 < full.mean() < 0.13


def test_lengths_can_be_chosen():
  task = long_context.LongContext(documents=5, teaching_documents=(2, 2), teaching_full_share=0.0)
  assert {len(row["documents"]) for row in generator.rows(task, "train", 0, 0, 20)} == {5}
  assert {len(r["documents"]) for r in generator.rows(task, "train", 0, 0, 20, teaching=True)} == {2}


def test_the_asked_document_is_anywhere():
  asked = [row["asked"] for row in generator.rows(TASK, "train", 0, 0, 600)]
  assert np.bincount(asked, minlength=long_context.DOCUMENTS).min() > 4


@pytest.mark.parametrize(
  ("content", "reward"),
  [("\\boxed{4}", 1), ("\\boxed{ 4 }", 1), ("\\boxed{5}", 0), ("\\boxed{04}", 0), ("4", 0),
   ("\\boxed{4}\\boxed{5}", 0), ("\\boxed{4 5}", 0), ("\\boxed{}", 0)],
)  # fmt: skip
def test_the_last_box_must_match_exactly(content, reward):
  assert judge({"expected_answer": "4"}, content).reward == reward
