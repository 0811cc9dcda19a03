"""Judges that score or compare answers, and the rewards of groups computed from comparisons."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from nemocascade import errors
from nemocascade.verifiers.verdict import Completion, Message

Prompt = Sequence[Message]

LOWEST, HIGHEST = 1.0, 5.0  # The range of a score.
FIRST_FAR_BETTER, SECOND_FAR_BETTER = 1.0, 6.0  # The range of a ranking.
EVEN_SCORE, EVEN_RANKING = 3.0, 3.5


class Match(NamedTuple):
  """Two answers to one prompt that are to be compared."""

  prompt: Prompt
  first: str
  second: str


class Comparison(NamedTuple):
  """A judge's result on a match.

  Scores go from 1 (bad) to 5 (good), the ranking from 1 (first far better) to 6 (second far better).
  """

  score_1: float
  score_2: float
  ranking: float


EVEN = Comparison(EVEN_SCORE, EVEN_SCORE, EVEN_RANKING)
FIRST_WALKS_OVER = Comparison(HIGHEST, LOWEST, FIRST_FAR_BETTER)
SECOND_WALKS_OVER = Comparison(LOWEST, HIGHEST, SECOND_FAR_BETTER)


class Judge(Protocol):
  """Compares answers in pairs. A judge that is a reward model is a PointwiseJudge."""

  def compare(self, prompt: Prompt, first: str, second: str) -> Comparison: ...

  def compare_many(self, matches: Sequence[Match]) -> list[Comparison]:
    """Compares many matches, possibly of many prompts, in as few model calls as possible."""
    ...


class PointwiseJudge(Judge, Protocol):
  """A judge that also scores each answer by itself: float [len(answers)], NaN without a finite score."""

  def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray: ...


def first_wins(comparison: Comparison) -> bool:
  """Whether the first answer is preferred: by score, or by ranking if the scores tie."""
  if comparison.score_1 != comparison.score_2:
    return comparison.score_1 > comparison.score_2
  return comparison.ranking < EVEN_RANKING


class BradleyTerryJudge:
  """Turns a pointwise reward model into a pairwise judge.

  Let p = sigmoid(reward_1 - reward_2), the model's probability that the first answer is preferred.
  The scores are 1 + 4p and 5 - 4p and the ranking is 6 - 5p, so equal rewards give 3, 3 and 3.5.
  If a reward is not finite, all matches of that answer have NaN scores.

  `reward_fn(prompts, answers) -> rewards [len(answers)]` is called once per list of matches, even for an empty
  one: the processes of a run may have to call it together. Each distinct (prompt, answer) is passed once, even if
  it is in several matches.
  """

  def __init__(self, reward_fn: Callable[[list[Prompt], list[str]], np.ndarray]):
    self._reward_fn = reward_fn

  def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    rewards = np.asarray(self._reward_fn(list(prompts), list(answers)), np.float64)
    if rewards.shape != (len(answers),):
      raise ValueError(f"{len(answers)} answers got rewards of shape {rewards.shape}")
    return np.where(np.isfinite(rewards), rewards, np.nan)

  def compare(self, prompt: Prompt, first: str, second: str) -> Comparison:
    return self.compare_many([Match(prompt, first, second)])[0]

  def compare_many(self, matches: Sequence[Match]) -> list[Comparison]:
    players: dict[tuple[str, str], int] = {}
    prompts, answers = [], []

    names: dict[int, str] = {}  # Serialises each prompt object once, not once per match.

    def number(prompt: Prompt, answer: str) -> int:
      if id(prompt) not in names:
        names[id(prompt)] = json.dumps(list(prompt), sort_keys=True)
      key = (names[id(prompt)], answer)
      if key not in players:
        players[key] = len(players)
        prompts.append(prompt)
        answers.append(answer)
      return players[key]

    seats = [(number(m.prompt, m.first), number(m.prompt, m.second)) for m in matches]
    rewards = self.scores(prompts, answers)
    comparisons = []
    for i, j in seats:
      p = 0.5 * (1.0 + math.tanh(0.5 * (rewards[i] - rewards[j])))  # A sigmoid without overflow.
      comparisons.append(Comparison(1.0 + 4.0 * p, 5.0 - 4.0 * p, 6.0 - 5.0 * p))
    return comparisons


def roles_prompt(match: Match) -> list[Message]:
  """The conversation, then the answers as roles response_1 and response_2, for released GenRMs."""
  return [
    *match.prompt,
    {"role": "response_1", "content": match.first},
    {"role": "response_2", "content": match.second},
  ]


def words_prompt(match: Match) -> list[Message]:
  """One user message that any chat model can follow.

  The conversation and the answers are JSON strings, so that an answer cannot imitate its own end
  and then give the judge instructions.
  """
  conversation = json.dumps(
    [{"role": m["role"], "content": m.get("content") or ""} for m in match.prompt],
    ensure_ascii=False,
  )
  text = (
    "Compare two responses to the last user message of a conversation.\n\n"
    f"Conversation: {conversation}\n\n"
    f"Response 1: {json.dumps(match.first, ensure_ascii=False)}\n\n"
    f"Response 2: {json.dumps(match.second, ensure_ascii=False)}\n\n"
    "Give each response a helpfulness score from 1 (worst) to 5 (best), and a ranking from 1 "
    "(response 1 is much better) to 6 (response 2 is much better). End with one JSON object: "
    '{"score_1": number, "score_2": number, "ranking": number}'
  )
  return [{"role": "user", "content": text}]


def parse_comparison(text: str) -> Comparison | None:
  """Parses the last JSON object that holds both scores and the ranking, all in range; else None."""
  decoder = json.JSONDecoder()
  found, place = None, text.find("{")
  while place >= 0:
    try:
      value, end = decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
      place = text.find("{", place + 1)
      continue
    comparison = _as_comparison(value)
    found = comparison or found
    place = text.find("{", end if comparison else place + 1)  # It may be nested in another object.
  return found


def _as_comparison(value: dict) -> Comparison | None:
  numbers: list[Any] = [value.get(key) for key in Comparison._fields]
  if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
    return None
  score_1, score_2, ranking = numbers
  in_range = all(LOWEST <= score <= HIGHEST for score in (score_1, score_2))
  if not in_range or not FIRST_FAR_BETTER <= ranking <= SECOND_FAR_BETTER:
    return None
  return Comparison(float(score_1), float(score_2), float(ranking))


class GenRMJudge:
  """A generative reward model: it reads both answers, thinks, and ends with scores in JSON.

  `generate(messages) -> text` samples from the model. Text that cannot be parsed is sampled again,
  up to `retries` times; then the match counts as even (3, 3, 3.5). `workers` is the number of
  concurrent requests.
  """

  def __init__(
    self,
    generate: Callable[[list[Message]], str],
    *,
    make_prompt: Callable[[Match], list[Message]] = words_prompt,
    retries: int = 3,
    workers: int = 1,
  ):
    self._generate, self._make_prompt = generate, make_prompt
    self._retries, self._workers = retries, workers

  def compare(self, prompt: Prompt, first: str, second: str) -> Comparison:
    return self._compare(Match(prompt, first, second))

  def compare_many(self, matches: Sequence[Match]) -> list[Comparison]:
    if self._workers == 1:
      return [self._compare(match) for match in matches]
    with ThreadPoolExecutor(self._workers) as pool:
      return list(pool.map(self._compare, matches))

  def _compare(self, match: Match) -> Comparison:
    messages = self._make_prompt(match)
    for _ in range(1 + self._retries):
      comparison = parse_comparison(self._generate(messages))
      if comparison is not None:
        return comparison
    return EVEN


def _all_pairs(G: int) -> list[tuple[int, int]]:
  """Each answer meets every other once: G (G - 1) / 2 matches."""
  return list(itertools.combinations(range(G), 2))


def _circular(G: int) -> list[tuple[int, int]]:
  """Each answer meets the next, and the last meets the first: G matches."""
  return [(i, (i + 1) % G) for i in range(G)]


PAIRINGS = {"all_pairs": _all_pairs, "circular": _circular}


def answer_of(completion: Completion) -> str | None:
  """The final answer that a judge reads.

  None if the completion was cut off, its thoughts or calls are malformed, or its content is empty.
  """
  if not completion.finished or completion.turns[-1].error or not completion.content.strip():
    return None
  return completion.content.strip()


def base_scores(seats: Sequence[tuple[int, int]], comparisons: Sequence[Comparison], G: int) -> np.ndarray:
  """The mean score of each answer over its matches, float64 [G].

  If the scores of a match tie, 3.5 - ranking is added to the first and subtracted from the second.
  A match with non-finite numbers counts for neither side. An answer without any other match gets
  NaN.

  Args:
    seats: the two answers (indices below G) of each match.
    comparisons: the result of each match.
  """
  total_G, count_G = np.zeros(G), np.zeros(G)
  for (i, j), (score_1, score_2, ranking) in zip(seats, comparisons, strict=True):
    if not np.isfinite((score_1, score_2, ranking)).all():
      continue
    edge = EVEN_RANKING - ranking if score_1 == score_2 else 0.0
    total_G[i] += score_1 + edge
    total_G[j] += score_2 - edge
    count_G[i] += 1
    count_G[j] += 1
  return np.divide(total_G, count_G, out=np.full(G, np.nan), where=count_G > 0)


def length_weights(tokens_G: Sequence[int] | np.ndarray) -> np.ndarray:
  """Weights [G] from 1 (shortest) to 0 (longest), minus their mean; all 0 if all lengths are equal."""
  tokens_G = np.asarray(tokens_G, np.float64)
  spread = tokens_G.max() - tokens_G.min()
  if spread == 0:
    return np.zeros_like(tokens_G)
  weight_G = 1.0 - (tokens_G - tokens_G.min()) / spread
  return weight_G - weight_G.mean()


def concise(base_G: np.ndarray, tokens_G: np.ndarray, present_G: np.ndarray, *, quantile: float) -> np.ndarray:
  """bool [G]: which completions are the shortest and score in the top (1 - quantile) of the group.

  The size of the top is rounded down, but is at least 1. Absent answers, NaN scores and lengths of 0
  are excluded. All that tie for the shortest can qualify, so the order in the group does not matter.
  """
  best = max(1, math.floor(len(base_G) * (1.0 - quantile) + 1e-9))
  judged_G = np.isfinite(base_G)
  threshold = np.sort(np.where(judged_G, base_G, -np.inf))[::-1][best - 1]
  runs_G = present_G & judged_G & (tokens_G > 0)
  if not runs_G.any():
    return np.zeros_like(present_G)
  return runs_G & (tokens_G == tokens_G[runs_G].min()) & (base_G >= threshold)


def batch_rewards(
  judge: Judge,
  prompts: Sequence[Prompt],
  answers_QG: Sequence[Sequence[str | None]],
  *,
  think_tokens_QG: Sequence[Sequence[int]],
  answer_tokens_QG: Sequence[Sequence[int]],
  pairs: str = "all_pairs",
  lambda_think: float = 0.5,
  lambda_answer: float = 0.5,
  bonus: float = 0.5,
  quantile: float = 0.8,
) -> np.ndarray:
  """Rewards, float32 [Q, G], of groups whose answers a judge compares in pairs, in one call.

  The reward follows the Nemotron-3-Nano report (arXiv 2512.20848):

    base score + lambda_think w_think + lambda_answer w_answer + bonuses

  where w are the centred length weights. The shortest thoughts and the shortest answer each earn
  `bonus` if their base score is in the group's top (see `concise`). A completion without an answer
  loses every match without being judged, and gets the length of the longest in its group, so that
  it gains nothing by being short. A completion without any finite score gets NaN, which masks it.

  Args:
    answers_QG: the result of `answer_of` for each completion.
    think_tokens_QG: length of each completion's thoughts, in tokens.
    answer_tokens_QG: length of each completion's answer, in tokens.
    pairs: a key of PAIRINGS: "all_pairs" as in Nemotron-Cascade 2 (arXiv 2603.19220, section 4.5),
      "circular" as in Nemotron-3-Nano.

  Raises:
    UserError: unknown `pairs`, or a group of fewer than 2.
  """
  if pairs not in PAIRINGS:
    raise errors.unknown("pairing", pairs, PAIRINGS)
  for answers_G in answers_QG:
    if len(answers_G) < 2:
      raise errors.UserError(f"G = {len(answers_G)}: answers are compared, so a group needs 2")
  rewards_QG = []
  for q, base_G in enumerate(_base_scores_of_all(judge, prompts, answers_QG, PAIRINGS[pairs])):
    present_G = np.array([answer is not None for answer in answers_QG[q]])
    reward_G = base_G.copy()
    for tokens_QG, weight in ((think_tokens_QG, lambda_think), (answer_tokens_QG, lambda_answer)):
      tokens_G = np.asarray(tokens_QG[q])
      tokens_G = np.where(present_G, tokens_G, tokens_G.max())
      reward_G += weight * length_weights(tokens_G)
      reward_G += bonus * concise(base_G, tokens_G, present_G, quantile=quantile)
    rewards_QG.append(reward_G)
  return np.array(rewards_QG, np.float32)


def _base_scores_of_all(
  judge: Judge, prompts: Sequence[Prompt], answers_QG: Sequence[Sequence[str | None]], pairing: Callable
) -> list[np.ndarray]:
  """`base_scores` of each group. The matches of all groups are judged in one call."""
  matches, played = [], []  # Matches for the judge, and the (prompt, match) indices of each.
  seats_Q, comparisons_Q = [], []
  for q, (prompt, answers_G) in enumerate(zip(prompts, answers_QG, strict=True)):
    seats = pairing(len(answers_G))
    comparisons = [EVEN] * len(seats)
    for k, (i, j) in enumerate(seats):
      first, second = answers_G[i], answers_G[j]
      if first is not None and second is not None:
        matches.append(Match(prompt, first, second))
        played.append((q, k))
      elif first is not None:
        comparisons[k] = FIRST_WALKS_OVER
      elif second is not None:
        comparisons[k] = SECOND_WALKS_OVER
    seats_Q.append(seats)
    comparisons_Q.append(comparisons)
  for (q, k), comparison in zip(played, judge.compare_many(matches), strict=True):
    comparisons_Q[q][k] = comparison
  groups = zip(seats_Q, comparisons_Q, answers_QG, strict=True)
  return [base_scores(seats, comparisons, len(answers_G)) for seats, comparisons, answers_G in groups]


def group_rewards(
  judge: Judge,
  messages: Prompt,
  answers_G: Sequence[str | None],
  *,
  think_tokens_G: Sequence[int],
  answer_tokens_G: Sequence[int],
  **settings: Any,
) -> np.ndarray:
  """`batch_rewards` of one group: float32 [G]."""
  return batch_rewards(
    judge, [messages], [answers_G],
    think_tokens_QG=[think_tokens_G], answer_tokens_QG=[answer_tokens_G], **settings,
  )[0]  # fmt: skip
