"""A conversation with a model: its messages, and the tokens that a voice continues. Answers are streamed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemocascade.data import chat
from nemocascade.data.chat_parse import Delta, Turn, TurnParser
from nemocascade.data.tokenizer import IM_END, THINK_END, Tokenizer
from nemocascade.errors import UserError
from nemocascade.rollout.voice import Voice


class Conversation:
  """The messages of a conversation and the tokens that the model was given for them.

  A new message is appended to the sampled tokens as they are. There is one exception: if the template removes
  the thoughts of earlier turns (nano3.jinja's `truncate_history_thinking`), the history changes, so it is
  rendered again.

  Attributes:
    messages: in OpenAI form, without the system message, which is `system`.
    turn: the last complete answer, or None.
    tokens: all tokens so far, those for the next answer included.
    voice: what continues the tokens.
  """

  def __init__(
    self,
    voice: Voice,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = 1024,
    thinking: bool = True,
    truncate_history_thinking: bool = True,
    system: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
  ):
    self.voice, self.tokenizer = voice, tokenizer
    self.max_new_tokens, self.thinking = max_new_tokens, thinking
    self.truncate_history_thinking = truncate_history_thinking
    self.system, self.tools = system, list(tools)
    self.reset()

  def reset(self) -> None:
    """Starts an empty conversation; system message and tools are kept."""
    self.messages: list[dict[str, Any]] = []
    self.turn: Turn | None = None
    self._forget()

  def _forget(self) -> None:
    self.tokens: list[int] = []  # Empty if the next message renders the history again.
    self._owed: list[int] = []
    self._has_thoughts = False  # Whether `tokens` hold thoughts that the next user message would remove.

  def offer(self, tools: Sequence[dict[str, Any]]) -> None:
    """Replaces the tools. They are part of the system turn, so the history is rendered again.

    That waits for the next message, unless there is one that has no answer yet. Raises UserError like `ask`.
    """
    self.tools = list(tools)
    self._forget()
    if self.messages and self.messages[-1]["role"] != "assistant":
      self._begin(self.messages)

  def ask(self, text: str) -> None:
    """Adds the user's next message.

    Raises:
      UserError: it does not fit into the voice's room; the conversation is then unchanged.
    """
    message = {"role": "user", "content": text}
    if not self.tokens or (self._has_thoughts and self.truncate_history_thinking):
      self._begin([*self.messages, message])
    else:
      self._add(chat.user_turn(text, enable_thinking=self.thinking))
    self.messages.append(message)

  def respond(self, results: Sequence[str]) -> None:
    """Adds the results of the last answer's calls, in their order. Raises UserError like `ask`."""
    messages = [{"role": "tool", "content": result} for result in results]
    if not self.tokens:  # Other tools have been offered since.
      self._begin([*self.messages, *messages])
    else:
      self._add(chat.tool_response(results, enable_thinking=self.thinking))
    self.messages += messages

  def answer(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Delta]:
    """Samples the next turn and yields its deltas; `turn` and `messages` are updated at the end.

    Args:
      stopped: called every few tokens; the turn ends when it returns true.
    """
    parser = TurnParser(self.tokenizer, thinking=self.thinking)
    begin = len(self.tokens)
    most = min(self.max_new_tokens, self.voice.room - begin)
    with contextlib.closing(self.voice.stream(self.tokens, most)) as pieces:
      while not stopped() and (new := next(pieces, None)) is not None:
        self.tokens = self.tokens + new
        yield from parser.feed(new)
    yield from parser.finish()
    self.turn = parser.turn()
    # Tokens that close an unfinished turn. They are added in front of the next message.
    self._owed = []
    if not self.turn.finished:
      in_thought = self.thinking and THINK_END not in self.tokens[begin:]
      self._owed = [THINK_END, IM_END] if in_thought else [IM_END]
    self._has_thoughts |= bool((self.turn.reasoning or "").strip())
    self.messages.append(_message(self.turn))

  def _begin(self, messages: Sequence[dict[str, Any]]) -> None:
    system = [] if self.system is None else [{"role": "system", "content": self.system}]
    pieces = chat.render(
      [*system, *messages],
      tools=self.tools,
      add_generation_prompt=True,
      enable_thinking=self.thinking,
      truncate_history_thinking=self.truncate_history_thinking,
    )
    tokens = chat.tokenize(pieces, self.tokenizer)[0]
    self._check_room(len(tokens))
    self.tokens, self._owed = tokens, []
    roles = [message["role"] for message in messages]
    question = len(roles) - 1 - roles[::-1].index("user") if "user" in roles else 0
    shown = messages[question:] if self.truncate_history_thinking else messages
    self._has_thoughts = any((message.get("reasoning_content") or "").strip() for message in shown)

  def _add(self, pieces: Sequence[chat.Piece]) -> None:
    given = self._owed + chat.tokenize(pieces, self.tokenizer)[0]
    self._check_room(len(self.tokens) + len(given))
    self.tokens, self._owed = self.tokens + given, []

  def _check_room(self, tokens: int) -> None:
    if tokens >= self.voice.room:
      raise UserError(f"the conversation would have {tokens} tokens, and there is room for {self.voice.room}")


def _message(turn: Turn) -> dict[str, Any]:
  message: dict[str, Any] = {"role": "assistant", "content": turn.content}
  if turn.reasoning is not None:
    message["reasoning_content"] = turn.reasoning
  if turn.tool_calls:
    message["tool_calls"] = [
      {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in turn.tool_calls
    ]
  return message
