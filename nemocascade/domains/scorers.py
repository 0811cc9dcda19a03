"""reasoning-gym's own scores of answers, in a process of its own, and with no answer evaluated.

Nine of its scorers evaluate what a model wrote: four as Python, five through SymPy's parser, which
does the same. Two evaluate fields of the row. `prepare` puts parsers in the place of the evaluators;
what it does not know of is stopped by the process, which runs no code that is not a file's.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from nemocascade.domains import limited

MAX_CHARS = 300  # A longer answer is wrong, unless the row is about as long.
TAGS = ("<answer>", "</answer>")

# Modules of reasoning-gym whose scorers call eval.
LITERALS = (  # To read a list.
  "algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion",
  "algorithmic.number_sorting", "games.n_queens",
)  # fmt: skip
WHOLE = ("arithmetic.bitwise_arithmetic",)  # To work out the problem.
EXPRESSIONS = ("games.countdown", "games.puzzle24")  # These hold SymPy's parser; others look it up.


def tagged(text: str) -> str | None:
  """What the last <answer> tag of a text holds."""
  opening, closing = TAGS
  found, end = None, 0
  while (start := text.find(opening, end)) >= 0:
    stop = text.find(closing, start)
    if stop < 0:
      break
    found, end = text[start + len(opening) : stop].strip(), stop + len(closing)
  return found


def score(entry: dict[str, Any], answer: str) -> float | None:
  """The score in [0, 1] of an answer to an entry {question, answer, metadata}.

  None where reasoning-gym has no dataset of the name in `metadata.source_dataset`.

  Raises:
    NoAnswer: the scorer came to no end, or would have evaluated the answer.
  """
  entry_json = json.dumps(entry, sort_keys=True)
  if len(answer) > max(MAX_CHARS, 4 * len(entry_json)):
    return 0.0
  return _ask(str(entry["metadata"]["source_dataset"]), entry_json, answer)


@functools.lru_cache(maxsize=1 << 16)
def _ask(dataset: str, entry_json: str, answer: str) -> float | None:
  """The answer of the process; none is remembered where there was none."""
  return limited.call(grade, dataset, entry_json, answer)


# ---- in the process


def prepare() -> None:
  import ast

  from nemocascade.domains import arithmetic

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
  if dataset == "game_of_life_halting":  # Its scorer pays for any text: it asks for bool(answer).
    truth = str(json.loads(entry_json)["answer"])
    return float(answer.strip().lower() == truth.strip().lower())
  try:
    found = float(scorer(answer=answer, entry=json.loads(entry_json)))
  except Exception:  # noqa: BLE001  As in NeMo Gym: an answer that breaks the scorer is wrong.
    return 0.0
  return min(1.0, max(0.0, found))


@functools.lru_cache(maxsize=32)
def _scorer(dataset: str):
  import reasoning_gym

  return reasoning_gym.get_score_answer_fn(dataset)
