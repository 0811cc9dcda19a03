"""Multiple choice: the answer is one letter in the last box."""

import itertools
import json
import pathlib
import re
from types import SimpleNamespace

import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import stem
from nemocascade.domains.rows import prompt_messages
from nemocascade.generated import generator
from nemocascade.generated import stem as generated_stem
from nemocascade.sandbox import limited
from nemocascade.verifiers import boxed
from nemocascade.verifiers.verdict import Completion, Verdict

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"
ROW = {
  "options": [{"A": "oak"}, {"B": "iron"}, {"C": "crow"}, {"D": "eel"}],
  "expected_answer": "B",
  "grading_mode": "strict_single_letter_boxed",
}


def judge(row, content):
  turn = Turn(reasoning="", content=content, tool_calls=(), error=None, finished=True)
  return stem.make_verify()([row], [Completion((turn,))])[0]


@pytest.mark.parametrize(
  ("content", "reward"),
  [("\\boxed{B}", 1), ("It is \\boxed{ B }.", 1), ("\\boxed{A} no, \\boxed{B}", 1),
   ("\\boxed{B} no, \\boxed{A}", 0), ("\\boxed{b}", 0), ("\\boxed{AB}", 0), ("\\boxed{E}", 0),
   ("\\boxed{\\text{B}}", 1), ("\\boxed{iron}", 0), ("B", 0), ("\\boxed{}", 0), ("\\boxed{B", 0)],
)  # fmt: skip
def test_strict_mode_takes_one_capital_letter_of_an_option(content, reward):
  assert judge(ROW, content) == Verdict(reward, judge(ROW, content).reason)


@pytest.mark.parametrize(
  ("content", "reward"),
  [("\\boxed{B}", 1), ("\\boxed{\\text{B}}", 1), ("\\boxed{(B)}", 1), ("\\boxed{B: iron}", 1),
   ("\\boxed{Iron}", 1), ("\\boxed{A}", 0), ("\\boxed{oak}", 0), ("iron", 0)],
)  # fmt: skip
def test_lenient_mode_takes_the_letter_in_wrappings_or_the_option_itself(content, reward):
  assert judge({**ROW, "grading_mode": "lenient_boxed"}, content).reward == reward


@pytest.mark.parametrize(
  ("content", "strict", "lenient"),
  [("<solution>B</solution>", 1, 1), ("so\n<solution> [b]\n</solution>", 1, 1), ("<solution>fix B</solution>", 0, 1),
   ("<solution>A</solution> no <solution>B</solution>", 0, 1), ("<solution>B</solution> <solution>A</solution>", 1, 0),
   ("<solution>E</solution>", 0, 0), ("\\boxed{B}", 0, 0), ("<solution></solution>", 0, 0), ("B", 0, 0)],
)  # fmt: skip
def test_a_letter_in_a_solution_tag(content, strict, lenient):
  assert judge({**ROW, "grading_mode": "strict"}, content).reward == strict
  assert judge({**ROW, "grading_mode": "lenient"}, content).reward == lenient


def test_an_unknown_grading_mode_gives_no_verdict_and_is_named():
  verdict = judge({**ROW, "grading_mode": "by taste"}, "\\boxed{B}")
  assert (verdict.masked, verdict.cause) == (True, "unknown") and "by taste" in verdict.reason


def test_a_pattern_of_the_row_that_never_ends_masks_the_sample_and_not_the_next(monkeypatch):
  monkeypatch.setattr(limited.call, "__kwdefaults__", {"limit_s": 0.5})
  row = {**ROW, "template_metadata": {"output_regex": "(a+)+$"}}
  verdict = judge(row, "a" * 60 + "!")
  assert (verdict.masked, verdict.cause, verdict.reward) == (True, "time", 0.0)
  assert judge(row, "\\boxed{B}").reward == 1


@pytest.mark.parametrize("expected", [None, "", " "])
def test_a_row_without_an_expected_letter_gives_no_verdict(expected):
  verdict = judge({**ROW, "expected_answer": expected}, "\\boxed{B}")
  assert (verdict.masked, verdict.cause) == (True, "row")


def test_exactly_one_option_belongs_to_the_asked_category():
  words = list(itertools.chain(*generated_stem.KNOWLEDGE.values()))
  assert len(set(words)) == len(words)
  for row in generator.rows(generated_stem.Stem(), "train", 0, 0, 300):
    asked = prompt_messages(row)[0]["content"].partition("?")[0].split()[-1]
    options = [(key, word) for option in row["options"] for key, word in option.items()]
    right = [key for key, word in options if word in generated_stem.KNOWLEDGE[asked]]
    assert right == [row["expected_answer"]]


def test_every_letter_is_right_about_as_often():
  rows = generator.rows(generated_stem.Stem(), "train", 0, 0, 1_000)
  for letter in "ABCD":
    assert 190 < sum(row["expected_answer"] == letter for row in rows) < 310


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
def test_released_rows_are_judged_by_their_letter():
  for line in (GYM / "mcqa.jsonl").read_text().splitlines():
    row = json.loads(line)
    for option in row["options"]:
      for letter in option:
        assert judge(row, f"\\boxed{{{letter}}}").reward == (letter == row["expected_answer"])


@pytest.mark.parametrize(
  ("content", "reward"),
  [("<solution>A</solution> <SOLUTION>B</SOLUTION>", 1), ("<solution><solution>B</solution>", 1),
   ("<solution>B</solution><solution>A", 1), ("</solution>B<solution>", 0), ("<solution>" * 100_000 + "B", 0),
   ("<solution>A</solution>" * 50_000 + "<solution>b</solution>", 1)],
)  # fmt: skip
def test_the_last_closed_tag_counts_and_is_found_in_one_pass(content, reward, monkeypatch):
  verdict = judge({**ROW, "grading_mode": "lenient"}, content)
  assert (verdict.reward, verdict.masked) == (reward, False)
  searched = []

  def finditer(pattern, text, flags):
    searched.append((pattern, text))
    return re.finditer(pattern, text, flags)

  # The whole text is searched once, and at each place no more characters are read than a tag has.
  monkeypatch.setattr(boxed, "re", SimpleNamespace(finditer=finditer, IGNORECASE=re.IGNORECASE))
  boxed.last_tagged(content, "solution", any_case=True)
  ((pattern, text),) = searched
  assert text is content and re._parser.parse(pattern).getwidth()[1] == len("</solution>")


def test_a_line_of_prefixes_does_not_hold_up_the_trainer(monkeypatch):
  monkeypatch.setattr(limited.call, "__kwdefaults__", {"limit_s": 1.0})
  row = {**ROW, "grading_mode": "lenient_answer_colon_md", "template_metadata": {"answer_prefix": "Risposta:"}}
  assert judge(row, "Risposta: A. No.\nRisposta: B").reward == 1
  verdict = judge(row, "Risposta: " * 20_000)
  assert (verdict.masked, verdict.cause) == (True, "time")


def test_a_pattern_may_match_more_than_a_reply_holds():
  row = {**ROW, "template_metadata": {"output_regex": "(?s)(.+)"}}
  verdict = judge(row, "B" * 2 * limited.MAX_REPLY_BYTES)
  assert (verdict.reward, verdict.masked) == (0, False)
