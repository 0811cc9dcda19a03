"""Parses an assistant's tokens into its thought, its text and its tool calls, while they are sampled."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

from nemocascade.data import tokenizer as special
from nemocascade.data.detokenizer import Detokenizer
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.data.tool_format import ToolCall, parse_call

STOPS = (special.IM_END, special.EOS)


@dataclasses.dataclass(frozen=True)
class FormatError:
  """A format error in a turn.

  Attributes:
    kind: the part of the turn that has the error: "thought", "answer", "tool_call" or "after_call".
    message: one line that says what is wrong.
    call: number of the malformed call, from 0; None for the other kinds.
    text: the malformed call as written; "" for the other kinds.
  """

  kind: str
  message: str
  call: int | None = None
  text: str = ""

  def as_response(self) -> str:
    """The error as JSON, to be sent to the model as a tool response."""
    fields: dict[str, str | int] = {"type": self.kind, "message": self.message}
    if self.call is not None:
      fields["call"] = self.call
    return json.dumps({"error": fields}, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Turn:
  """A parsed assistant turn."""

  reasoning: str | None  # None in non-thinking mode.
  content: str
  tool_calls: tuple[ToolCall, ...] = ()
  error: FormatError | None = None  # The first error. Well-formed calls are in tool_calls all the same.
  finished: bool = False  # True if the model sampled a stop token.


@dataclasses.dataclass(frozen=True)
class Delta:
  """An increment of a turn: more text, one complete call or one error. Exactly one field is set."""

  reasoning: str = ""
  content: str = ""
  tool_call: ToolCall | None = None
  error: FormatError | None = None


class TurnParser:
  """Incremental parser of the tokens after a generation prompt. It accepts every token sequence.

  Only special tokens are structure; plain text that spells a tag is content. The deltas of all calls
  add up to `turn()`.
  """

  def __init__(self, tokenizer: Tokenizer, *, thinking: bool):
    self._tokenizer, self._thinking = tokenizer, thinking
    self._text = Detokenizer(tokenizer)
    self._part = "thought" if thinking else "answer"  # Later "call", "between", "after" or "end".
    self._held = ""  # Trailing white space, kept back: it is dropped if no text follows.
    self._begun = not thinking  # Whether the newline after </think> has been removed.
    self._call: list[int] = []  # Tokens of the current call.
    self._number = 0  # Calls so far, malformed ones included.
    self._finished = False
    self._reasoning: list[str] = []
    self._content: list[str] = []
    self._calls: list[ToolCall] = []
    self._error: FormatError | None = None

  def feed(self, tokens: Sequence[int]) -> list[Delta]:
    """Parses more tokens and returns their deltas; tokens after a stop token are ignored."""
    deltas = []
    for token, run in itertools.groupby(map(int, tokens), self._structure):
      if self._part == "end":
        break
      if token in STOPS:
        self._finished = True
        deltas += self.finish()
      elif token is None:
        deltas += _PARTS[self._part](self, list(run))
      else:
        for special_token in run:
          deltas += _PARTS[self._part](self, [special_token])
    return [delta for delta in deltas if delta != Delta()]

  def finish(self) -> list[Delta]:
    """Ends the turn: returns the text that was held back, or an error if a part is incomplete."""
    part, self._part = self._part, "end"
    if part == "thought":
      deltas = self._think(self._text.finish()) + self._say_thought(self._held)
      return deltas + self._fail("thought", "the thought has no </think>")
    if part == "answer":
      return self._answer(self._text.finish())
    if part == "call":
      return self._fail("tool_call", "a tool call has no </tool_call>", call=True)
    return self._follow(self._text.finish()) if part == "between" else []

  def turn(self) -> Turn:
    """The turn parsed so far."""
    return Turn(
      "".join(self._reasoning) if self._thinking else None,
      "".join(self._content),
      tuple(self._calls),
      self._error,
      self._finished,
    )

  def _structure(self, token: int) -> int | None:
    """The token itself if it is special, None if it is text."""
    return token if token in self._tokenizer.special_names or token in STOPS else None

  # One method for each part of a turn. `tokens` is one special token, or a run of text tokens.

  def _in_thought(self, tokens: list[int]) -> list[Delta]:
    if tokens != [special.THINK_END]:
      return self._think(self._text.add(tokens))
    deltas = self._think(self._text.finish())
    self._part, self._held = "answer", ""  # Drops the newline before </think>.
    return deltas

  def _in_answer(self, tokens: list[int]) -> list[Delta]:
    if tokens == [special.TOOL_CALL]:
      deltas = self._answer(self._text.finish())
      self._part, self._call = "call", []
      return deltas
    deltas = self._answer(self._text.add(tokens))
    if name := self._tokenizer.special_names.get(tokens[0]):
      deltas += self._fail("answer", f"{name} stands in the answer")
    return deltas

  def _in_call(self, tokens: list[int]) -> list[Delta]:
    if tokens != [special.TOOL_CALL_END]:
      self._call += tokens
      return []
    self._part = "between"
    if not self._tokenizer.special_names.keys().isdisjoint(self._call):
      found = "a special token stands in a tool call"
    else:
      found = parse_call(self._tokenizer.decode(self._call))
    if isinstance(found, str):
      return self._fail("tool_call", found, call=True)
    self._number += 1
    self._calls.append(found)
    return [Delta(tool_call=found)]

  def _between_calls(self, tokens: list[int]) -> list[Delta]:
    if tokens != [special.TOOL_CALL]:
      return self._follow(self._text.add(tokens))
    deltas = self._follow(self._text.finish())
    if self._part == "between":
      self._part, self._call = "call", []
    return deltas

  def _follow(self, text: str) -> list[Delta]:
    """Handles text after a call: white space is allowed, other text is an error."""
    if not text.strip():
      return []
    self._part = "end" if self._part == "end" else "after"
    return self._fail("after_call", "text follows a tool call")

  def _after_calls(self, tokens: list[int]) -> list[Delta]:
    del tokens  # Once other text has followed a call, the rest of the turn is ignored.
    return []

  # These return text at once, except for trailing white space, which is dropped at the end of a part.

  def _think(self, text: str) -> list[Delta]:
    text = self._held + text
    self._held = "\n" if text.endswith("\n") else ""
    return self._say_thought(text.removesuffix("\n"))

  def _say_thought(self, text: str) -> list[Delta]:
    self._reasoning.append(text)
    return [Delta(reasoning=text)]

  def _answer(self, text: str) -> list[Delta]:
    if text and not self._begun:
      text, self._begun = text.removeprefix("\n"), True
    text = self._held + text
    said = text.rstrip()
    self._held = text[len(said) :]
    self._content.append(said)
    return [Delta(content=said)]

  def _fail(self, kind: str, message: str, *, call: bool = False) -> list[Delta]:
    number, text = None, ""
    if call:
      number, text = self._number, self._tokenizer.decode(self._call)
      self._number += 1
    error = FormatError(kind, message, number, text)
    self._error = self._error or error
    return [Delta(error=error)]


_PARTS = {
  "thought": TurnParser._in_thought,
  "answer": TurnParser._in_answer,
  "call": TurnParser._in_call,
  "between": TurnParser._between_calls,
  "after": TurnParser._after_calls,
}


def parse(tokens: Sequence[int], tokenizer: Tokenizer, *, thinking: bool) -> Turn:
  """Parses a complete turn.

  Args:
    tokens: the sampled tokens after the generation prompt.
    thinking: whether the generation prompt opened a thought.
  """
  parser = TurnParser(tokenizer, thinking=thinking)
  parser.feed(tokens)
  parser.finish()
  return parser.turn()
