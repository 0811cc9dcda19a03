"""Runs episodes: renders prompts, samples turns and answers tool calls. Sampled tokens are never re-encoded."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from nemocascade.data import chat
from nemocascade.domains.domain import Domain
from nemocascade.domains.rows import prompt_messages, prompt_tools
from nemocascade.mesh import own_rows, owners, read_own
from nemocascade.rollout.engine import Decoding, Engine
from nemocascade.rollout.exchange import Exchange, alone, merge
from nemocascade.rollout.samples import Samples, by_groups
from nemocascade.types import Params
from nemocascade.verifiers.verdict import Completion, Row


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
  engine: Engine,
  params: Params,
  key: jax.Array,
  rows: Sequence[Row],
  domains: Mapping[str, Domain],
  *,
  tokenizer,
  G: int,
  prompts: Sequence[list[int]] | None = None,
  completion_tokens: int | None = None,
  temperature: float = 1.0,
  top_p: float = 1.0,
  thinking: bool | None = None,
  exchange: Exchange = alone,
) -> Samples:
  """Samples G episodes of every row.

  In several processes all of them call it with the same arguments. Each parses and answers the episodes whose
  tokens are on its devices.

  Args:
    key: the random key of the sampling.
    domains: name -> Domain, for the names in the rows.
    prompts: the result of `prompt_of` for each row, if the caller has it already.
    completion_tokens: the most tokens after a prompt, tool results included; None allows all that fit.
    thinking: whether the assistant thinks; None takes each row's domain's setting.
    exchange: connects the processes.
  """
  of_row = [domains[row_domain(row)] for row in rows]
  thinks = [domain.thinking if thinking is None else thinking for domain in of_row]
  if prompts is None:
    prompts = [prompt_of(row, domain, tokenizer, thinking) for row, domain in zip(rows, of_row, strict=True)]
  d = engine.start(params, prompts, G, drawn=top_p < 1)
  prompt_B = np.repeat(np.array([len(prompt) for prompt in prompts], np.int32), G)
  limit_B = np.full(len(rows) * G, engine.T, np.int32)
  if completion_tokens is not None:
    limit_B = np.minimum(limit_B, prompt_B + np.int32(completion_tokens))
    d = d.replace(limit_B=limit_B)
  own = np.flatnonzero(owners(engine.mesh, len(limit_B)) == jax.process_index())
  episodes = {
    b: _Episode(of_row[b // G], thinks[b // G], of_row[b // G].start(rows[b // G]), begin=int(prompt_B[b]))
    for b in own.tolist()
  }
  turns = max((domain.turns for domain in of_row), default=1)
  d = _run(engine, params, d, key, episodes, tokenizer, temperature, top_p, limit_B, turns, exchange)
  return _samples(engine, d, rows, episodes, limit_B, exchange)


@dataclasses.dataclass
class _Episode:
  """One episode while it is sampled."""

  domain: Domain
  thinking: bool
  world: object | None
  begin: int  # Where the turn being sampled begins.
  end: int = 0  # Tokens so far, prompt included.
  sampled: int = 0  # Tokens that the policy sampled.
  turns: list[chat.Turn] = dataclasses.field(default_factory=list)
  results: list[tuple[str, ...]] = dataclasses.field(default_factory=list)  # Of each turn that tools answered.

  def respond(self, tokens: list[int], tokenizer) -> list[int] | None:
    """Adds a sampled turn. Returns the tokens of its tools' results, or None if the episode ends."""
    turn = chat.parse(tokens, tokenizer, thinking=self.thinking)
    self.turns.append(turn)
    self.sampled += len(tokens)
    if not turn.finished or len(self.turns) >= self.domain.turns:
      return None
    results = self.domain.act(self.world, turn)
    if results is None:
      return None
    self.results.append(tuple(results))
    return chat.tokenize(chat.tool_response(results, enable_thinking=self.thinking), tokenizer)[0]

  def cut_off(self) -> None:
    """Marks the last turn as unfinished."""
    self.turns[-1] = dataclasses.replace(self.turns[-1], finished=False)

  @property
  def completion(self) -> Completion:
    return Completion(tuple(self.turns), self.world, tuple(self.results))


def _run(
  engine: Engine, params: Params, d: Decoding, key: jax.Array, episodes: dict[int, _Episode], tokenizer, temperature,
  top_p, limit_B: np.ndarray, turns: int, exchange: Exchange,
) -> Decoding:  # fmt: skip
  """Samples turns and appends tool results, until all episodes have ended. Returns the final decoding state.

  Args:
    episodes: row number -> episode, for the rows that this process owns.
    turns: the most turns of any row's episode.
  """
  held = {b: i for i, b in enumerate(own_rows(engine.mesh, len(limit_B)))}
  # Unless the devices divide the rows, other processes may hold a row too; they need its results as well.
  shared = len(limit_B) % engine.mesh.size > 0
  open_rows = list(episodes)
  for round_ in range(turns):
    d = engine.decode(params, d, jax.random.fold_in(key, round_), temperature, top_p)
    tokens_BT, known_B = read_own(d.tokens_BT)[1], read_own(d.known_B)[1]
    given = {}
    for b in open_rows:
      episode, end = episodes[b], int(known_B[held[b]])
      episode.end = end
      tokens = episode.respond(tokens_BT[held[b], episode.begin : end].tolist(), tokenizer)
      if tokens is None:
        continue
      if end + len(tokens) < limit_B[b]:
        given[b], episode.begin = tokens, end + len(tokens)
      else:  # The results do not fit.
        episode.cut_off()
    if round_ + 1 == turns:
      break
    goes_on = merge(([b, tokens if shared else None] for b, tokens in given.items()), exchange, "tools' results")
    if not goes_on:
      break
    open_rows = list(given)
    d = engine.extend(d, {b: given.get(b, tokens) for b, tokens in goes_on if b in held})
  return d


def _samples(
  engine: Engine, d: Decoding, rows: Sequence[Row], episodes: dict[int, _Episode], limit_B: np.ndarray,
  exchange: Exchange,
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
  )
