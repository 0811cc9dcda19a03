"""Runs episodes: renders prompts, samples turns and answers tool calls. Sampled tokens are never re-encoded.

Tools run beside decoding: an episode waits for its own results only. Verifiers do, too: an episode is judged as soon as
it has ended.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from nemocascade.data import chat
from nemocascade.domains.domain import Domain, Failed
from nemocascade.domains.rows import prompt_messages, prompt_tools
from nemocascade.mesh import own_rows, owners, read_own
from nemocascade.rollout.beside import Beside
from nemocascade.rollout.decoding import Decoding
from nemocascade.rollout.engine import NEVER, Engine
from nemocascade.rollout.exchange import Exchange, alone, merge
from nemocascade.rollout.judging import VERDICT_S, Judging
from nemocascade.rollout.samples import Samples, by_groups
from nemocascade.rollout.sampling import Options
from nemocascade.types import Params
from nemocascade.verifiers.verdict import Completion, Row

LOOK = 8  # Tokens that are decoded between two looks at the episodes whose turns have ended,
JUDGED_LOOK = 64  # and where no tool may answer them, but verdicts may be given.
FEW = 4  # Processes up to which they look so often. Each look is an exchange, which costs more with more processes.
AT_ONCE = 64  # Episodes whose tools run at the same time.
WAIT_S = 0.05  # Time between two looks while nothing is decoded.
CALLS_S, EPISODE_S = 300.0, 3600.0


def look(processes: int, tokens: int = LOOK) -> int:
  """The tokens between two looks of this many processes; a few look every `tokens` tokens."""
  return min(NEVER, tokens * max(1, processes // FEW))


def row_domain(row: Row) -> str:
  """The name of the row's domain."""
  return row["agent_ref"]["name"]


def prompt_of(row: Row, domain: Domain, tokenizer, thinking: bool | None = None) -> list[int]:
  """The tokens of a row's prompt, the assistant's opening included; `thinking` as in `collect`."""
  pieces = chat.render(
    prompt_messages(row), tools=prompt_tools(row) or None,
    enable_thinking=domain.thinking if thinking is None else thinking, add_generation_prompt=True,
  )  # fmt: skip
  return chat.tokenize(pieces, tokenizer)[0]


def collect(
  engine: Engine, params: Params, key: jax.Array, rows: Sequence[Row], domains: Mapping[str, Domain], *, tokenizer,
  G: int, prompts: Sequence[list[int]] | None = None, completion_tokens: int | None = None, temperature: float = 1.0,
  top_p: float = 1.0, thinking: bool | None = None, slots: int = 0, parked: int = 0, calls_s: float = CALLS_S,
  episode_s: float = EPISODE_S, judged: int = 0, verdict_s: float = VERDICT_S, exchange: Exchange = alone,
) -> Samples:  # fmt: skip
  """Samples G episodes of every row.

  An episode's tokens depend on the parameters, the key, its number and its tools' results alone. If its tools fail or
  meet a time limit, it ends, and its verdict is masked.

  In several processes all of them call it with the same arguments. Each parses and answers the episodes whose
  tokens are on its devices.

  Args:
    key: the random key of the sampling.
    domains: name -> Domain, for the names in the rows.
    prompts: the result of `prompt_of` for each row, if the caller has it already.
    completion_tokens: the most tokens after a prompt, tool results included; None allows all that fit.
    thinking: whether the assistant thinks; None takes each row's domain's setting.
    slots: episodes that are decoded at a time; 0 decodes all.
    parked: episodes that may wait for tools outside the slots; 0 takes as many as slots.
    calls_s: time limit of the tool calls of one turn.
    episode_s: time limit of all tool calls of an episode.
    judged: the episodes of so many rows, the first ones, are judged beside decoding where their domain allows it.
    verdict_s: time limit of one verdict.
    exchange: connects the processes.
  """
  of_row = [domains[row_domain(row)] for row in rows]
  thinks = [domain.thinking if thinking is None else thinking for domain in of_row]
  if prompts is None:
    prompts = [prompt_of(row, domain, tokenizer, thinking) for row, domain in zip(rows, of_row, strict=True)]
  prompt_B = np.repeat(np.array([len(prompt) for prompt in prompts], np.int32), G)
  limit_B = np.full(len(rows) * G, engine.T, np.int32)
  held_B = np.repeat(np.array([domain.turns > 1 for domain in of_row], bool), G)
  options = Options(temperature, top_p=top_p)
  d = engine.start(params, prompts, G, options=options, slots=slots, parked=parked, held=held_B)
  if completion_tokens is not None:
    limit_B = np.minimum(limit_B, prompt_B + np.int32(completion_tokens))
    d = d.replace(limit_B=limit_B)
  own = np.flatnonzero(owners(engine.mesh, len(limit_B)) == jax.process_index())
  episodes = {
    b: _Episode((q, b % G), rows[q], of_row[q], thinks[q], of_row[q].start(rows[q]), int(prompt_B[b]))
    for b, q in ((b, b // G) for b in own.tolist())
  }
  judging = Judging(verdict_s) if any(domain.beside for domain in of_row[:judged]) else None
  run = _Run(engine, tokenizer, episodes, limit_B, held_B, calls_s, episode_s, exchange, judging, judged)
  d = run.to_the_end(params, d, key)
  return _samples(engine, d, rows, episodes, limit_B, run.metrics(d), judging, exchange)


@dataclasses.dataclass
class _Episode:
  """One episode while it is sampled."""

  place: tuple[int, int]  # (q, g)
  row: Row
  domain: Domain
  thinking: bool
  world: object | None
  begin: int  # Where the turn being sampled begins.
  end: int = 0  # Tokens so far, prompt included.
  sampled: int = 0  # Tokens that the policy sampled.
  tools_s: float = 0.0  # Time that its tools have run.
  turns: list[chat.Turn] = dataclasses.field(default_factory=list)
  results: list[tuple[str, ...]] = dataclasses.field(default_factory=list)  # Of each turn that tools answered.

  def take(self, tokens: list[int], tokenizer) -> bool:
    """Adds a sampled turn; returns whether tools may answer it."""
    turn = chat.parse(tokens, tokenizer, thinking=self.thinking)
    self.turns.append(turn)
    self.sampled += len(tokens)
    return turn.finished and len(self.turns) < self.domain.turns

  def act(self, tokenizer) -> tuple[tuple[str, ...], list[int]] | None:
    """(results, their tokens) of the last turn's tools, or None if the episode ends. May run in a thread."""
    results = self.domain.act(self.world, self.turns[-1])
    if results is None:
      return None
    return tuple(results), chat.tokenize(chat.tool_response(results, enable_thinking=self.thinking), tokenizer)[0]

  @property
  def completion(self) -> Completion:
    return Completion(tuple(self.turns), self.world, tuple(self.results))


class _Run:
  """Decodes episodes and answers their turns.

  Args:
    episodes: number of the request -> episode, for those of this process.
    held_B: whether the episode may have another turn; changed as episodes end.
    judging: judges the episodes of the first `judged` rows; None if none is judged beside decoding.
  """

  def __init__(
    self, engine: Engine, tokenizer, episodes: dict[int, _Episode], limit_B: np.ndarray, held_B: np.ndarray,
    calls_s: float, episode_s: float, exchange: Exchange, judging: Judging | None, judged: int,
  ):  # fmt: skip
    self.engine, self.tokenizer, self.episodes = engine, tokenizer, episodes
    self.limit_B, self.held_B, self.exchange = limit_B, held_B, exchange
    self.calls_s, self.episode_s = calls_s, episode_s
    self.judging, self.judged = judging, judged
    tokens = LOOK if held_B.any() else JUDGED_LOOK if judging is not None else NEVER
    self.look = look(jax.process_count(), tokens)
    self.beside = Beside(AT_ONCE)
    self.place = {b: i for i, b in enumerate(own_rows(engine.mesh, len(limit_B)))}
    # Unless the devices divide the rows, other processes may hold a row too; they need its results as well.
    self.shared = len(limit_B) % engine.mesh.size > 0
    self.sampling = set(episodes)
    self.over: list[int] = []  # Held episodes that have ended since the last exchange.
    self.inline: list[int] = []  # Episodes whose tools run in this thread.
    self.decode_s = self.host_s = self.tools_s = 0.0

  def to_the_end(self, params: Params, d: Decoding, key: jax.Array) -> Decoding:
    """Samples turns and adds tool results, until all episodes have ended. Returns the final decoding state."""
    idle, ticks, turns = False, 0, bool(self.held_B.any())
    if turns:
      d = self.engine.extend(params, d, {})  # Compiles it.
    while True:
      began = time.monotonic()
      d = self.engine.decode(params, d, key, self.look)
      done_B = read_own(d.done_B)[1]
      decoded = time.monotonic()
      self._take_turns(d, done_B)
      given = self._answers(idle)
      if self.judging is not None:
        self.judging.look()
      # Every process must make the same calls, so all of them go on until none has anything left to do.
      mine = [[b, tokens if self.shared else len(tokens)] for b, tokens in given.items()]
      working = len(self.beside) + len(self.inline)
      parts = self.exchange([len(self.sampling) + working, self.over, mine], "tools' results")
      told = dict(item for *_, items in parts for item in items)
      # Processes that hold the same row must agree when it leaves its slot.
      self.held_B[[b for _, over, _ in parts for b in over]] = False
      self.over = []
      before, ticks = ticks, int(d.counts.ticks)
      idle = not told and ticks == before
      if told:
        of: Callable = lambda b, tokens: given.get(b, tokens if self.shared else [0] * tokens)  # noqa: E731
        d = d.replace(held_B=self.held_B.copy())
        d = self.engine.extend(params, d, {b: of(b, tokens) for b, tokens in told.items()})
      elif turns:
        d = d.replace(held_B=self.held_B.copy())
      self.decode_s, self.host_s = self.decode_s + decoded - began, self.host_s + time.monotonic() - decoded
      if not told and not any(unfinished for unfinished, *_ in parts):
        if self.judging is not None:
          self.judging.end_of_decoding()
        return d

  def _take_turns(self, d: Decoding, done_B: np.ndarray) -> None:
    """Starts the tools of the turns that have ended since the last look."""
    ended = [b for b in sorted(self.sampling) if done_B[self.place[b]]]
    if not ended:
      return
    tokens_BT, known_B, failed_B = (read_own(a)[1] for a in (d.tokens_BT, d.known_B, d.failed_B))
    for b in ended:
      self.sampling.remove(b)
      episode, i = self.episodes[b], self.place[b]
      episode.end = int(known_B[i])
      asks = episode.take(tokens_BT[i, episode.begin : episode.end].tolist(), self.tokenizer)
      if failed_B[i]:
        self._fail(b, "the model's logits are not finite")
      elif not asks:
        self._end(b)
      elif episode.domain.in_threads:
        limit_s = max(min(self.calls_s, self.episode_s - episode.tools_s), 0.0)
        self.beside.start(b, functools.partial(episode.act, self.tokenizer), limit_s)
      else:
        self.inline.append(b)

  def _answers(self, idle: bool) -> dict[int, list[int]]:
    """What tools have answered since the last look: number of the request -> tokens of the results."""
    found: list[tuple] = self.beside.ended(WAIT_S if idle and not self.inline else 0.0)
    while self.engine.whole_turns and len(self.beside):  # Whatever is given now waits for the longest turn anyway.
      found += self.beside.ended(WAIT_S)
    for b in self.inline:
      began, answer, failed = time.monotonic(), None, None
      try:
        answer = self.episodes[b].act(self.tokenizer)
      except Exception as error:  # noqa: BLE001  A tool ends its own episode only.
        failed = error
      found.append((b, answer, failed, time.monotonic() - began))
    self.inline.clear()
    return {b: tokens for b, *answer in found if (tokens := self._take_answer(b, *answer)) is not None}

  def _take_answer(self, b: int, answer, error: Exception | None, seconds: float) -> list[int] | None:
    """The tokens that the episode goes on with, or None if it ends."""
    episode = self.episodes[b]
    episode.tools_s += seconds
    self.tools_s += seconds
    if error is not None:
      self._fail(b, f"tools failed: {type(error).__name__}: {error}")
      return None
    if answer is not None:
      results, tokens = answer
      episode.results.append(results)
      if episode.end + len(tokens) < self.limit_B[b]:
        episode.begin = episode.end + len(tokens)
        self.sampling.add(b)
        return tokens
      episode.turns[-1] = dataclasses.replace(episode.turns[-1], finished=False)  # The results do not fit.
    self._end(b)
    return None

  def _end(self, b: int) -> None:
    """Lets the episode's slot go, in all processes from the next exchange on, and has it judged."""
    if self.held_B[b]:
      self.over.append(b)
    one = self.episodes[b]
    if self.judging is not None and one.domain.beside and one.place[0] < self.judged:
      self.judging.start(one.place, one.domain, one.row, one.completion)

  def _fail(self, b: int, why: str) -> None:
    """Ends the episode; its verdict will be masked."""
    episode = self.episodes[b]
    episode.turns[-1] = dataclasses.replace(episode.turns[-1], finished=False)
    episode.world = Failed(why)
    self._end(b)

  def metrics(self, d: Decoding) -> dict[str, float]:
    """What the sampling has cost in this process; what depends on how long tools take is under speed/ and time/."""
    c = jax.tree.map(int, d.counts)
    found = {
      "speed/ticks": float(c.ticks),
      "speed/occupancy": c.busy / max(c.slots, 1),
      "speed/queued_occupancy": c.queued_busy / c.queued_slots if c.queued_slots else 1.0,
      "time/decode": self.decode_s,
      "time/host": self.host_s,
      "time/tools": self.tools_s,
      **self.engine.metrics(),
    }
    if self.judging is None:
      return found
    begun = sum(one.domain.beside and one.place[0] < self.judged for one in self.episodes.values())
    return found | {"speed/early_verdicts": self.judging.early / max(begun, 1)}


def _samples(
  engine: Engine, d: Decoding, rows: Sequence[Row], episodes: dict[int, _Episode], limit_B: np.ndarray,
  metrics: dict[str, float], judging: Judging | None, exchange: Exchange,
) -> Samples:  # fmt: skip
  """The samples of ended episodes."""
  Q, B = len(rows), len(limit_B)
  length_B, sampled_B, finished_B = np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, bool)
  ends = ([b, one.end, one.sampled, one.completion.finished] for b, one in episodes.items())
  for b, *end in merge(ends, exchange, "ends of episodes"):
    length_B[b], sampled_B[b], finished_B[b] = end
  completions = [episodes[b].completion if b in episodes else None for b in range(B)]
  return Samples(
    rows=list(rows),
    domains=[row_domain(row) for row in rows],
    **by_groups(d, Q, engine.mesh),
    limit_QG=limit_B.reshape(Q, -1),
    length_QG=length_B.reshape(Q, -1),
    sampled_QG=sampled_B.reshape(Q, -1),
    finished_QG=finished_B.reshape(Q, -1),
    completions=[completions[q * B // Q : (q + 1) * B // Q] for q in range(Q)],
    metrics=metrics,
    judging=judging,
  )
