"""The interface of a domain: prompts, demonstrations of mixed quality, verdicts on completions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemocascade import errors
from nemocascade.domains import limited

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

# A row of the released data: responses_create_params {input, tools?}, agent_ref {type, name}, and
# the fields of its domain.
Row = dict[str, Any]
Message = dict[str, Any]

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # One prompt in 8, chosen by the hash of its text, is held out of training.
# Draws tried per row. Needing more means that all prompts of the domain fall in one split: a bug.
MAX_DRAWS = 10_000
NON_THINKING_SHARE = 0.1  # Share of a thinking domain's demonstrations that have no thoughts.


@dataclasses.dataclass
class Completion:
  """The assistant turns of one episode, and the world they acted on (None if there is none)."""

  turns: tuple[Turn, ...]
  world: object | None = None

  @property
  def content(self) -> str:
    """The last turn's text after its thoughts: the only text that is judged."""
    return self.turns[-1].content if self.turns else ""

  @property
  def reasoning(self) -> str | None:
    return self.turns[-1].reasoning if self.turns else None

  @property
  def finished(self) -> bool:
    """Whether the model ended the last turn itself, before the length limit."""
    return bool(self.turns) and self.turns[-1].finished

  @property
  def text(self) -> str:
    """All turns with their thoughts and calls, for logs."""
    parts = []
    for turn in self.turns:
      if turn.reasoning is not None:
        parts.append(f"<think>\n{turn.reasoning}\n</think>\n")
      parts.append(turn.content)
      parts += [f"{call.name}({call.arguments})" for call in turn.tool_calls]
    return "".join(parts)


NONFINITE = "nonfinite"  # Cause of masking: the reward is NaN or infinite.


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A reward and the reason for it, for logs.

  A masked verdict means that the verifier could not judge; the sample is not trained on. `cause`
  says why in one word, and masked samples are counted per cause:
    the causes of limited.NoAnswer ("time", "memory", "crash", "error", "evaluation"),
    "unknown": the verifier lacks the row's mode, format or id,
    "row": the row cannot be judged,
    NONFINITE: the reward was not finite,
    "": any other reason.

  A non-finite reward is replaced by 0 and masked, so that it cannot enter the statistics of a group
  or a batch.
  """

  reward: float
  reason: str
  masked: bool = False
  cause: str = ""

  def __post_init__(self):
    if not math.isfinite(self.reward):
      for name, value in (("reward", 0.0), ("masked", True), ("cause", NONFINITE)):
        object.__setattr__(self, name, value)

  @property
  def success(self) -> bool:
    """Whether the reward is full (at least 1), as pass@k counts. A partial reward is no success."""
    return not self.masked and self.reward >= 1


@dataclasses.dataclass(frozen=True)
class Style:
  """Two ways to write a step of thought in demonstrations: careful (always right) or sloppy.

  Each step begins with a marker word that shows which way it is. Every domain has its own markers,
  so that training on one domain cannot improve another through a shared word.
  """

  careful: str  # Marker words.
  sloppy: str
  sloppy_rate: float = 0.6  # Share of sloppy steps.
  error_rate: float = 0.7  # Share of sloppy steps that are wrong.

  def draw(self, rng: np.random.Generator) -> tuple[str, bool]:
    """(marker, whether the step is wrong) of one step."""
    sloppy, errs = rng.random() < self.sloppy_rate, rng.random() < self.error_rate
    return (self.sloppy if sloppy else self.careful), bool(sloppy and errs)


class Domain:
  """The base of all domains. By default it is single-turn and judges one completion at a time.

  A subclass defines `name`, `style`, `make_row`, `demonstrate`, and `judge` or a batched `verify`.
  A domain with tools also defines `max_turns`, `start` and `act`.
  """

  name: str = ""
  thinking: bool = True  # Whether its completions have thoughts.
  phrases: tuple[str, ...] = ()  # Strings that become one token each, with their spaces as written.
  max_turns: int = 1  # Assistant turns of one episode.
  style: Style

  def make_row(self, rng: np.random.Generator) -> Row:
    raise NotImplementedError

  def make_teaching_row(self, rng: np.random.Generator) -> Row:
    """A row to demonstrate. It may be easier than those of `make_row`, used in RL and evaluation."""
    return self.make_row(rng)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    """The messages that follow the row's input, of mixed quality; an assistant turn comes last."""
    raise NotImplementedError

  def judge(self, row: Row, completion: Completion) -> Verdict:
    """The verdict on one completion. An exception means that it could not be judged."""
    raise NotImplementedError

  def verify(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """One verdict per completion, in order. A failure of `judge` becomes a masked verdict.

    `judge` runs in as many threads as `limited` has processes, to keep all of them busy.
    """
    pairs = list(zip(rows, completions, strict=True))
    with concurrent.futures.ThreadPoolExecutor(limited.WORKERS) as pool:
      return list(pool.map(lambda pair: guarded(self.judge, *pair), pairs))

  def start(self, row: Row) -> object | None:
    """A fresh world for one episode, or None if the domain has none."""
    del row
    return None

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """Runs the turn's tool calls and returns their results in order; None ends the episode."""
    del world, turn
    return None


def no_verdict(cause: str, reason: str) -> Verdict:
  """A masked verdict."""
  return Verdict(0.0, reason[:200], masked=True, cause=cause)


def guarded(
  judge: Callable[[Row, Completion], Verdict], row: Row, completion: Completion
) -> Verdict:
  """The verdict of `judge`, or a masked one if it raises."""
  try:
    return judge(row, completion)
  except limited.NoAnswer as error:
    return no_verdict(error.cause, f"no answer: {error}")
  except Exception as error:  # noqa: BLE001  No completion may stop a run.
    return no_verdict("error", f"verifier failed: {type(error).__name__}: {error}")


def prompt_messages(row: Row) -> list[Message]:
  """The messages of the prompt; a plain string is one user message."""
  prompt = row["responses_create_params"]["input"]
  return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_tools(row: Row) -> list[dict[str, Any]]:
  """The schemas of the functions offered with the prompt."""
  return list(row["responses_create_params"].get("tools") or ())


def make_prompt(
  name: str, text: str, *, tools: Sequence[dict[str, Any]] = (), **fields: Any
) -> Row:
  """A row in the released form, with one user message and the domain's own `fields`."""
  params: dict[str, Any] = {"input": [{"role": "user", "content": text}]}
  if tools:
    params["tools"] = list(tools)
  agent_ref = {"type": "responses_api_agents", "name": name}
  return {"responses_create_params": params, "agent_ref": agent_ref, **fields}


def assistant(content: str, *, thoughts: Sequence[str] | None = None, **fields: Any) -> Message:
  """An assistant message; `thoughts` are the reasoning steps before its content, if any."""
  message: Message = {"role": "assistant", "content": content, **fields}
  if thoughts is not None:
    message["reasoning_content"] = "\n".join(thoughts)
  return message


def split_of(row: Row) -> str:
  """The row's split. It depends only on the prompt's text, so it is the same for every seed."""
  text = "\n".join(str(message.get("content") or "") for message in prompt_messages(row))
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


def make_rng(*parts: object) -> np.random.Generator:
  """A generator seeded by the parts (any JSON values); the same parts give it on every machine."""
  digest = hashlib.sha256(json.dumps(parts).encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


def rows(
  domain: Domain, split: str, seed: int, start: int, count: int, *, teaching: bool = False
) -> list[Row]:
  """Rows [start, start + count) of the domain's endless, reproducible list for this split and seed.

  Args:
    teaching: draws with `make_teaching_row` instead of `make_row`.
  """
  if split not in SPLITS:
    raise errors.unknown("split", split, SPLITS)
  make = domain.make_teaching_row if teaching else domain.make_row

  def draw(i: int) -> Row:
    rng = make_rng(seed, domain.name, split, i)
    for _ in range(MAX_DRAWS):
      row = make(rng)
      if split_of(row) == split:
        return row
    raise RuntimeError(f"domain {domain.name!r}: no {split} prompt in {MAX_DRAWS} draws")

  return [draw(i) for i in range(start, start + count)]


def demonstrations(
  domain: Domain, seed: int, start: int, count: int, *, split: str = "train",
  non_thinking_share: float = NON_THINKING_SHARE,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """Yields SFT examples {messages, tools, thinking} on rows [start, start + count) of the split.

  Args:
    non_thinking_share: share of examples without thoughts, in a domain that thinks.
  """
  for i in range(start, start + count):
    (row,) = rows(domain, split, seed, i, 1, teaching=True)
    rng = make_rng(seed, domain.name, split, i, "demonstration")
    thinking = domain.thinking and bool(rng.random() >= non_thinking_share)
    messages = prompt_messages(row) + domain.demonstrate(row, rng, thinking=thinking)
    yield {"messages": messages, "tools": prompt_tools(row), "thinking": thinking}
