"""What a domain is: prompts, demonstrations of mixed quality, and verdicts on completions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemocascade import errors
from nemocascade.domains import limited

if TYPE_CHECKING:
  from nemocascade.data.chat import Turn

# The released form: responses_create_params {input, tools?}, agent_ref {type, name}, own fields.
Row = dict[str, Any]
Message = dict[str, Any]

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # One prompt in 8, by the hash of its text, is never trained on.
MAX_DRAWS = 10_000  # A domain whose prompts all fall on one side of the split is a bug.
NON_THINKING_SHARE = 0.1  # Of the demonstrations of a domain that thinks.


@dataclasses.dataclass
class Completion:
  """The assistant turns of one episode, and the world they acted on (None for a single turn)."""

  turns: tuple[Turn, ...]
  world: object | None = None

  @property
  def content(self) -> str:
    """What the last turn says after its thoughts: the only text that is judged."""
    return self.turns[-1].content if self.turns else ""

  @property
  def reasoning(self) -> str | None:
    return self.turns[-1].reasoning if self.turns else None

  @property
  def finished(self) -> bool:
    """Whether the last turn was ended by the model, not by the length limit."""
    return bool(self.turns) and self.turns[-1].finished

  @property
  def text(self) -> str:
    """All turns, thoughts and calls included, for logs."""
    parts = []
    for turn in self.turns:
      if turn.reasoning is not None:
        parts.append(f"<think>\n{turn.reasoning}\n</think>\n")
      parts.append(turn.content)
      parts += [f"{call.name}({call.arguments})" for call in turn.tool_calls]
    return "".join(parts)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A reward and its reason. `masked`: nothing could be said, so the sample is not trained on.

  `cause` is one word for why it is masked, by which such samples are counted: those of
  limited.NoAnswer ("time", "memory", "crash", "error"), "unknown" for a mode, format or id that
  this verifier lacks, "row" for a row that cannot be judged, "" for others.
  """

  reward: float
  reason: str
  masked: bool = False
  cause: str = ""


@dataclasses.dataclass(frozen=True)
class Style:
  """The two ways of writing a step of thought: careful is right, sloppy errs now and then.

  The markers are words of one domain only: shared ones would leak gains between domains.
  """

  careful: str
  sloppy: str
  sloppy_rate: float = 0.6
  error_rate: float = 0.7  # Of the sloppy steps.

  def draw(self, rng: np.random.Generator) -> tuple[str, bool]:
    """The marker of one step, and whether the step errs."""
    sloppy, errs = rng.random() < self.sloppy_rate, rng.random() < self.error_rate
    return (self.sloppy if sloppy else self.careful), bool(sloppy and errs)


class Domain:
  """The base of all domains: single-turn, and judged one completion at a time.

  A subclass gives `name`, `style`, `make_row`, `demonstrate` and `judge` (or a batched `verify`),
  and a domain with tools `max_turns`, `start` and `act` too.
  """

  name: str = ""
  thinking: bool = True
  phrases: tuple[str, ...] = ()  # Fixed strings worth one token each; spaces are spaces here.
  max_turns: int = 1
  style: Style

  def make_row(self, rng: np.random.Generator) -> Row:
    raise NotImplementedError

  def make_teaching_row(self, rng: np.random.Generator) -> Row:
    """A row to demonstrate. It may be easier than `make_row`'s, which is trained on and judged."""
    return self.make_row(rng)

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    """What follows the row's input, of mixed quality: it ends in an assistant turn."""
    raise NotImplementedError

  def judge(self, row: Row, completion: Completion) -> Verdict:
    """The verdict on one completion. Raising means that none could be given."""
    raise NotImplementedError

  def verify(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Verdict]:
    """Verdicts in order. A verifier that fails is reported by a masked verdict, never raised.

    `judge` runs in as many threads as `limited` has processes, so that all of these are busy.
    """
    pairs = list(zip(rows, completions, strict=True))
    with concurrent.futures.ThreadPoolExecutor(limited.WORKERS) as pool:
      return list(pool.map(lambda pair: guarded(self.judge, *pair), pairs))

  def start(self, row: Row) -> object | None:
    """A fresh world for one episode, None where there is none."""
    del row
    return None

  def act(self, world: object, turn: Turn) -> list[str] | None:
    """The results of the turn's tool calls in order; None when the episode is over."""
    del world, turn
    return None


def no_verdict(cause: str, reason: str) -> Verdict:
  """A masked verdict."""
  return Verdict(0.0, reason[:200], masked=True, cause=cause)


def guarded(
  judge: Callable[[Row, Completion], Verdict], row: Row, completion: Completion
) -> Verdict:
  """`judge`'s verdict, or a masked one where it raises."""
  try:
    return judge(row, completion)
  except limited.NoAnswer as error:
    return no_verdict(error.cause, f"no answer: {error}")
  except Exception as error:  # noqa: BLE001  Nothing a completion provokes may stop a run.
    return no_verdict("error", f"verifier failed: {type(error).__name__}: {error}")


def prompt_messages(row: Row) -> list[Message]:
  """The messages of the prompt; a plain string is one user message."""
  prompt = row["responses_create_params"]["input"]
  return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_tools(row: Row) -> list[dict[str, Any]]:
  """The function schemas offered with the prompt."""
  return list(row["responses_create_params"].get("tools") or ())


def make_prompt(
  name: str, text: str, *, tools: Sequence[dict[str, Any]] = (), **fields: Any
) -> Row:
  """A row in the released form: one user message, and the domain's own fields."""
  params: dict[str, Any] = {"input": [{"role": "user", "content": text}]}
  if tools:
    params["tools"] = list(tools)
  agent_ref = {"type": "responses_api_agents", "name": name}
  return {"responses_create_params": params, "agent_ref": agent_ref, **fields}


def assistant(content: str, *, thoughts: Sequence[str] | None = None, **fields: Any) -> Message:
  """An assistant turn; `thoughts` are the steps before its content, None where it has none."""
  message: Message = {"role": "assistant", "content": content, **fields}
  if thoughts is not None:
    message["reasoning_content"] = "\n".join(thoughts)
  return message


def split_of(row: Row) -> str:
  """The side of the split, from the text of the prompt alone: no seed moves a prompt across."""
  text = "\n".join(str(message.get("content") or "") for message in prompt_messages(row))
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


def make_rng(*parts: object) -> np.random.Generator:
  """A generator that depends on the parts alone, strings included, on every machine."""
  digest = hashlib.sha256(json.dumps(parts).encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


def rows(
  domain: Domain, split: str, seed: int, start: int, count: int, *, teaching: bool = False
) -> list[Row]:
  """Rows start .. start + count of the domain's endless list; `teaching`: rows to demonstrate."""
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
  """SFT examples {messages, tools, thinking} on rows of the split, each example its own draw."""
  for i in range(start, start + count):
    (row,) = rows(domain, split, seed, i, 1, teaching=True)
    rng = make_rng(seed, domain.name, split, i, "demonstration")
    thinking = domain.thinking and bool(rng.random() >= non_thinking_share)
    messages = prompt_messages(row) + domain.demonstrate(row, rng, thinking=thinking)
    yield {"messages": messages, "tools": prompt_tools(row), "thinking": thinking}
