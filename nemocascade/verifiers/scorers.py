"""Scores answers by reasoning-gym's scorers, in a separate process and without evaluating answers.

Nine of its scorers evaluate the model's text: four call Python's eval, five use SymPy's parser, which
calls eval too. Two evaluate fields of the row. `prepare` replaces these evaluators by parsers. The
grading process (see `limited`) blocks any other evaluation.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from nemocascade.sandbox import limited

MAX_CHARS = 300  # A longer answer scores 0, unless it is at most 4 times as long as the row's JSON.

# Modules of reasoning-gym whose scorers evaluate text: lists by eval, an integer expression by eval,
# and expressions by SymPy's parser.
LITERALS = (
  "algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion",
  "algorithmic.number_sorting", "games.n_queens",
)  # fmt: skip
WHOLE = ("arithmetic.bitwise_arithmetic",)
# These modules import the name `parse_expr`, so it is replaced in each. The other modules look it up
# in SymPy, where `stand_in_for_sympy` replaces it.
EXPRESSIONS = ("games.countdown", "games.puzzle24")


def score(entry: dict[str, Any], answer: str) -> float | None:
  """The score in [0, 1] of an answer to an entry {question, answer, metadata}.

  None if reasoning-gym has no dataset named `metadata.source_dataset`.

  Raises:
    NoAnswer: the scorer exceeded its limits, or tried to evaluate the answer.
  """
  entry_json = json.dumps(entry, sort_keys=True)
  if len(answer) > max(MAX_CHARS, 4 * len(entry_json)):
    return 0.0
  return _ask(str(entry["metadata"]["source_dataset"]), entry_json, answer)


@functools.lru_cache(maxsize=1 << 16)
def _ask(dataset: str, entry_json: str, answer: str) -> float | None:
  """The grading process's result, cached; a NoAnswer is not cached."""
  return limited.call(grade, dataset, entry_json, answer)


# ---- runs in the grading process


def prepare() -> None:
  import ast

  from nemocascade.verifiers import arithmetic

  arithmetic.stand_in_for_sympy()
  evaluators = (
    (LITERALS, "eval", ast.literal_eval), (WHOLE, "eval", arithmetic.whole),
    (EXPRESSIONS, "parse_expr", arithmetic.parse),
  )  # fmt: skip
  for modules, name, evaluator in evaluators:
    for module in modules:
      setattr(importlib.import_module(f"reasoning_gym.{module}"), name, evaluator)


def grade(dataset: str, entry_json: str, answer: str) -> float | None:
  try:
    scorer = _scorer(dataset)
  except ValueError:
    return None
  if dataset == "game_of_life_halting":  # Its scorer uses bool(answer), so it accepts any text.
    truth = str(json.loads(entry_json)["answer"])
    return float(answer.strip().lower() == truth.strip().lower())
  try:
    found = float(scorer(answer=answer, entry=json.loads(entry_json)))
  except Exception:  # noqa: BLE001  As in NeMo Gym, an answer on which the scorer raises is wrong.
    return 0.0
  return min(1.0, max(0.0, found))


@functools.lru_cache(maxsize=32)
def _scorer(dataset: str):
  import reasoning_gym

  return reasoning_gym.get_score_answer_fn(dataset)
