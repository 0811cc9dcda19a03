"""Serves requests as they come: submit, stream, cancel. What a server needs of the engine."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from nemocascade.data.detokenizer import Detokenizer
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError
from nemocascade.fields import COLDEST, HOTTEST
from nemocascade.rollout.engine import TOGETHER, Engine, width_of
from nemocascade.rollout.sampling import Options
from nemocascade.types import Params


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how it is to be continued.

  Attributes:
    prompt: token ids.
    max_tokens: most new tokens.
    seed: the new tokens depend on it, the prompt, the options and the parameters alone.
    options: how tokens are drawn; scalars.
    stop_ids: tokens that end the request, beside those of the engine. They are part of the answer.
    stop_strings: texts that end the request. The answer's text ends before them.
  """

  prompt: Sequence[int]
  max_tokens: int = 256
  seed: int = 0
  options: Options = Options()
  stop_ids: Sequence[int] = ()
  stop_strings: Sequence[str] = ()


@dataclasses.dataclass
class Answer:
  """What a request has got so far.

  Attributes:
    logprobs: of each token, under softmax(logits / temperature).
    drawn_logprobs: of each token, under what the cuts of the options leave of that.
    likeliest: for each token, the (token, logprob) of the likeliest ones at its place.
    text: of the tokens, without a stop token; None without a tokenizer.
    finish_reason: "" while it is decoded, then "stop", "length", "cancelled", or "error": the logits are not finite.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  drawn_logprobs: list[float] = dataclasses.field(default_factory=list)
  likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
  text: str | None = None
  finish_reason: str = ""


@dataclasses.dataclass
class _Open:
  """A request that has not ended."""

  number: int
  request: Request
  answer: Answer
  detokenizer: Detokenizer | None


class Scheduler:
  """Decodes requests in the slots of an engine. Others wait until a slot is free, in the order of their arrival.

  Use it from one thread, in one process. Every device of a mesh decodes all requests; they share the experts.

  Args:
    tokenizer: for texts; None for requests without stop strings.
    slots: requests that are decoded at a time.
    likeliest: number of likeliest tokens to tell for each sampled one.
    look: tokens that are decoded between two looks: after each of them, requests are admitted, cancelled and
      stopped at their stop strings.
  """

  def __init__(
    self, engine: Engine, params: Params, tokenizer: Tokenizer | None = None, *, slots: int = 16, likeliest: int = 0,
    look: int = 8,
  ):  # fmt: skip
    self.engine, self.params, self.tokenizer, self.look = engine, params, tokenizer, look
    # Numbers that are not divided among devices. At least as many prompts wait beside the slots as there are slots,
    # so that a slot can be refilled at once.
    whole = lambda least: next(n for n in itertools.count(least) if engine.layout(n).shards == 1)  # noqa: E731
    slots = whole(slots)
    self._d = engine.empty(params, whole(2 * slots), slots, likeliest)
    self._vocab = self._d.logits_SV.shape[1]
    self._numbers = itertools.count()
    self._queue: list[_Open] = []
    self._at: dict[int, _Open] = {}  # Number of the row -> request.
    self._answers: dict[int, Answer] = {}

  def submit(self, request: Request) -> int:
    """Takes a request and returns its number.

    Raises:
      UserError: what is asked for cannot be.
    """
    self.check(request)
    number, text = next(self._numbers), "" if self.tokenizer else None
    answer = self._answers[number] = Answer(text=text)
    self._queue.append(_Open(number, request, answer, Detokenizer(self.tokenizer) if self.tokenizer else None))
    return number

  def check(self, request: Request) -> None:
    """Raises UserError if what is asked for cannot be. May be called from any thread."""
    length, new, e = len(request.prompt), request.max_tokens, self.engine
    if not 0 < length <= e.P:
      raise UserError(f"the prompt has {length} tokens: allowed are 1 to {e.P}")
    wrong = next((token for token in request.prompt if not 0 <= token < self._vocab), None)
    if wrong is not None:
      raise UserError(f"the prompt has token {wrong}: the model's are 0 to {self._vocab - 1}")
    if not 0 < new <= e.T - length:
      raise UserError(f"max_tokens={new}: after {length} tokens of the prompt, allowed are 1 to {e.T - length}")
    if not 0 <= request.seed < 2**31:
      raise UserError(f"seed={request.seed}: must be 0 to 2147483647")
    o = request.options
    tempered = o.temperature == 0 or COLDEST <= o.temperature <= HOTTEST
    if not (tempered and o.top_k >= 0 and 0 < o.top_p <= 1 and 0 <= o.min_p <= 1):
      raise UserError(
        f"{o}: allowed are temperature 0 and {COLDEST:g} to {HOTTEST:g}, top_k from 0, top_p above 0 to 1, min_p 0 to 1"
      )
    if request.stop_strings and self.tokenizer is None:
      raise UserError("stop_strings need a tokenizer, and the model has none")
    if "" in request.stop_strings:
      raise UserError("stop_strings: an empty text would stop every answer")

  def cancel(self, number: int) -> None:
    """Ends a request; it keeps the tokens that it has. Does nothing if it has ended."""
    for waiting in [one for one in self._queue if one.number == number]:
      self._queue.remove(waiting)
      waiting.answer.finish_reason = "cancelled"
    for row, one in list(self._at.items()):
      if one.number == number:
        self._end([(row, "cancelled")])

  def answer(self, number: int) -> Answer:
    """What the request has got so far."""
    return self._answers[number]

  def forget(self, number: int) -> None:
    """Cancels the request and drops its answer."""
    self.cancel(number)
    self._answers.pop(number, None)

  @property
  def open(self) -> int:
    """The number of requests that have not ended."""
    return len(self._queue) + len(self._at)

  def stream(self, number: int) -> Iterator[str]:
    """Decodes until the request ends, and yields the new text at each look; of other requests, `answer` has it."""
    given, answer = 0, self._answers[number]
    strings = next((one.request.stop_strings for one in (*self._queue, *self._at.values()) if one.number == number), ())
    kept = max(map(len, strings), default=1) - 1  # The text's end may be the beginning of a stop string.
    while not answer.finish_reason:
      self.step()
      if answer.text is not None:
        sure = len(answer.text) - (0 if answer.finish_reason else kept)
        yield answer.text[given : max(given, sure)]
        given = max(given, sure)

  def run(self) -> None:
    """Decodes until all requests have ended."""
    while self.open:
      self.step()

  def step(self) -> None:
    """Admits requests, decodes `look` tokens of those in slots, and updates the answers."""
    self._admit()
    if not self._at:
      return
    self._d = self.engine.decode(self.params, self._d, jax.random.key(0), self.look, shrinks=False)
    names = ("known_B", "done_B", "failed_B", "tokens_BT", "behaviour_logprobs_BT", "drawn_logprobs_BT")
    d = {name: np.asarray(getattr(self._d, name)) for name in names}
    if self._d.likeliest_tokens_BTK is not None:
      d |= {name: np.asarray(getattr(self._d, name)) for name in ("likeliest_tokens_BTK", "likeliest_logprobs_BTK")}
    ended = []
    for row, one in self._at.items():
      if why := self._read(row, one, d):
        ended.append((row, why))
    self._end(ended)

  def _admit(self) -> None:
    """Gives rows that are free to requests that wait."""
    free = [row for row in range(self._d.known_B.shape[0]) if row not in self._at]
    now = [self._queue.pop(0) for _ in free[: len(self._queue)]]
    for start in range(0, len(now), TOGETHER):
      some = dict(zip(free[start:], now[start : start + TOGETHER], strict=False))
      asked = [one.request for one in some.values()]
      width = width_of(max(len(r.prompt) for r in asked))
      whole = lambda values: np.array(values, np.int32)  # noqa: E731
      options = [r.options.by_row(1) for r in asked]
      self._d = self.engine.admit(
        self.params, self._d, {row: one.request.prompt for row, one in some.items()}, min(width, self.engine.P),
        limit_B=whole([len(r.prompt) + r.max_tokens for r in asked]), held_B=np.zeros(len(asked), bool),
        row_id_B=whole([r.seed for r in asked]), order_B=whole([one.number for one in some.values()]),
        options=jax.tree.map(lambda *a: np.concatenate(a), *options),
      )  # fmt: skip
      self._at |= some

  def _read(self, row: int, one: _Open, d: dict[str, np.ndarray]) -> str:
    """Adds what is new to the answer; returns the reason if it has ended, else ""."""
    answer, request = one.answer, one.request
    begin, end = len(request.prompt) + len(answer.tokens), int(d["known_B"][row])
    stop_ids, why = (*self.engine.stop_ids, *request.stop_ids), ""
    for t in range(begin, end):
      token = int(d["tokens_BT"][row, t])
      answer.tokens.append(token)
      answer.logprobs.append(float(d["behaviour_logprobs_BT"][row, t]))
      answer.drawn_logprobs.append(float(d["drawn_logprobs_BT"][row, t]))
      if "likeliest_tokens_BTK" in d:
        pairs = zip(
          d["likeliest_tokens_BTK"][row, t].tolist(), d["likeliest_logprobs_BTK"][row, t].tolist(), strict=True
        )
        answer.likeliest.append(list(pairs))
      why = "stop" if token in stop_ids else ""
      if one.detokenizer is not None:
        if not why:
          answer.text = (answer.text or "") + one.detokenizer.add([token])
        why = self._cut(answer, request.stop_strings) or why
      if why:
        return why
    if d["failed_B"][row]:
      return "error"
    return "length" if d["done_B"][row] else ""

  def _cut(self, answer: Answer, stop_strings: Sequence[str]) -> str:
    """Cuts the text before the first stop string; "stop" if there is one."""
    assert answer.text is not None
    places = [place for text in stop_strings if (place := answer.text.find(text)) >= 0]
    if not places:
      return ""
    answer.text = answer.text[: min(places)]
    return "stop"

  def _end(self, rows: list[tuple[int, str]]) -> None:
    """Ends the requests of these rows, for these reasons."""
    if not rows:
      return
    done_B, waiting_B = (np.array(a) for a in (self._d.done_B, self._d.waiting_B))
    for row, why in rows:
      one = self._at.pop(row)
      one.answer.finish_reason, done_B[row], waiting_B[row] = why, True, False
      if one.detokenizer is not None and why in ("length", "cancelled", "error"):
        one.answer.text = (one.answer.text or "") + one.detokenizer.finish()
    self._d = self._d.replace(done_B=done_B, waiting_B=waiting_B)
