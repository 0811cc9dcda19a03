"""Runs episodes: renders prompts, samples turns and answers tool calls. Sampled tokens are never re-encoded."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from nemocascade.data import chat
from nemocascade.domains.domain import Domain
from nemocascade.domains.rows import prompt_messages, prompt_tools
from nemocascade.rollout.engine import Decoding, Engine
from nemocascade.types import Params
from nemocascade.verifiers.verdict import Completion, Row


@dataclasses.dataclass(frozen=True)
class Samples:
  """G completions of each of Q rows, on the host."""

  rows: list[Row]
  domains: list[str]  # The domain's name for each row.
  tokens_QGT: np.ndarray  # int32; prompt and completion, then 0.
  segment_ids_QGT: np.ndarray  # int32; 1 on tokens, 0 on padding.
  loss_mask_QGT: np.ndarray  # bool; true on tokens that the policy sampled.
  behaviour_logprobs_QGT: np.ndarray  # fp32; under softmax(logits / temperature), 0 on given tokens.
  limit_QG: np.ndarray  # int32; tokens, prompt included, at which the sampler ends a completion.
  completions: list[list[Completion]]  # [Q][G]
  drawn_logprobs_QGT: np.ndarray | None = None  # fp32; under the top_p nucleus; None at top_p = 1.

  def take(self, q: Iterable[int]) -> "Samples":
    """The samples of the prompts with these indices."""
    q = list(q)

    def pick(value):
      if value is None:
        return None
      return value[q] if isinstance(value, np.ndarray) else [value[i] for i in q]

    return Samples(**{f.name: pick(getattr(self, f.name)) for f in dataclasses.fields(self)})

  @classmethod
  def concatenate(cls, parts: Sequence["Samples"]) -> "Samples":
    """The samples of all parts, in order."""

    def join(name):
      values = [getattr(part, name) for part in parts]
      if values[0] is None:
        return None
      return np.concatenate(values) if isinstance(values[0], np.ndarray) else sum(values, [])

    return cls(**{f.name: join(f.name) for f in dataclasses.fields(cls)})


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
) -> Samples:
  """Samples G episodes of every row.

  Args:
    key: the random key of the sampling.
    domains: name -> Domain, for the names in the rows.
    prompts: the result of `prompt_of` for each row, if the caller has it already.
    completion_tokens: the most tokens after a prompt, tool results included; None allows all that fit.
    thinking: whether the assistant thinks; None takes each row's domain's setting.
  """
  of_row = [domains[row_domain(row)] for row in rows]
  thinks = [domain.thinking if thinking is None else thinking for domain in of_row]
  if prompts is None:
    prompts = [prompt_of(row, domain, tokenizer, thinking) for row, domain in zip(rows, of_row, strict=True)]
  d = engine.start(params, prompts, G, drawn=top_p < 1)
  if completion_tokens is not None:
    d = d.replace(limit_B=np.minimum(d.limit_B, np.asarray(d.known_B) + np.int32(completion_tokens)))
  episodes = [
    _Episode(domain, think, domain.start(row))
    for row, domain, think in zip(rows, of_row, thinks, strict=True)
    for _ in range(G)
  ]
  d = _run(engine, params, d, key, episodes, tokenizer, temperature, top_p)
  return _samples(d, rows, episodes, shape=(len(rows), G, engine.T))


@dataclasses.dataclass
class _Episode:
  """One episode while it is sampled."""

  domain: Domain
  thinking: bool
  world: object | None
  turns: list[chat.Turn] = dataclasses.field(default_factory=list)

  def respond(self, tokens: list[int], tokenizer) -> list[int] | None:
    """Adds a sampled turn. Returns the tokens of its tools' results, or None if the episode ends."""
    turn = chat.parse(tokens, tokenizer, thinking=self.thinking)
    self.turns.append(turn)
    if not turn.finished or len(self.turns) >= self.domain.turns:
      return None
    results = self.domain.act(self.world, turn)
    if results is None:
      return None
    return chat.tokenize(chat.tool_response(results, enable_thinking=self.thinking), tokenizer)[0]

  def cut_off(self) -> None:
    """Marks the last turn as unfinished."""
    self.turns[-1] = dataclasses.replace(self.turns[-1], finished=False)


def _run(
  engine: Engine, params: Params, d: Decoding, key: jax.Array, episodes: list[_Episode], tokenizer, temperature, top_p
) -> Decoding:
  """Samples turns and appends tool results, until all episodes have ended. Returns the final decoding state."""
  begin_B = np.array(d.known_B)  # Where the turn being sampled begins.
  open_rows = list(range(len(episodes)))
  for round_ in range(max((episode.domain.turns for episode in episodes), default=1)):
    d = engine.decode(params, d, jax.random.fold_in(key, round_), temperature, top_p)
    tokens_BT, known_B, limit_B = np.asarray(d.tokens_BT), np.asarray(d.known_B), np.asarray(d.limit_B)
    given = {b: episodes[b].respond(tokens_BT[b, begin_B[b] : known_B[b]].tolist(), tokenizer) for b in open_rows}
    given = {b: tokens for b, tokens in given.items() if tokens is not None}
    open_rows = [b for b, tokens in given.items() if known_B[b] + len(tokens) < limit_B[b]]
    for b in given.keys() - set(open_rows):  # The results do not fit.
      episodes[b].cut_off()
    if not open_rows:
      break
    d = engine.extend(d, {b: given[b] for b in open_rows})
    begin_B = np.array(d.known_B)
  return d


def _samples(d: Decoding, rows: Sequence[Row], episodes: list[_Episode], shape: tuple[int, int, int]) -> Samples:
  """The samples of ended episodes; `shape` is (Q, G, T)."""
  Q, G, T = shape
  tokens_BT, known_B = np.asarray(d.tokens_BT), np.asarray(d.known_B)
  real_BT = np.arange(T)[None] < known_B[:, None]
  completions = [Completion(tuple(episode.turns), episode.world) for episode in episodes]
  return Samples(
    rows=list(rows),
    domains=[row_domain(row) for row in rows],
    tokens_QGT=np.where(real_BT, tokens_BT, 0).reshape(shape),
    segment_ids_QGT=real_BT.astype(np.int32).reshape(shape),
    loss_mask_QGT=np.asarray(d.sampled_BT).reshape(shape),
    behaviour_logprobs_QGT=np.asarray(d.behaviour_logprobs_BT).reshape(shape),
    limit_QG=np.asarray(d.limit_B).reshape(shape[:2]),
    drawn_logprobs_QGT=None if d.drawn_logprobs_BT is None else np.asarray(d.drawn_logprobs_BT).reshape(shape),
    completions=[completions[q * G : (q + 1) * G] for q in range(Q)],
  )
