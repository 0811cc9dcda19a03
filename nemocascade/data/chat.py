"""Messages to tokens with a mask of what is learned.

The template is the family's (paper.md 2.2 to 2.4). It is rendered as pieces, cut where a
generation prompt ends and where the assistant's `<|im_end|>` stands, so that training on a
conversation sees exactly the tokens that a rollout of it makes. `chat_parse` reads them back.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

from nemocascade.data import tool_format
from nemocascade.data.chat_parse import Turn as Turn
from nemocascade.data.chat_parse import parse as parse
from nemocascade.data.pieces import Piece, mark
from nemocascade.data.pieces import text_of as text_of
from nemocascade.data.pieces import tokenize as tokenize
from nemocascade.data.tool_format import ToolCall as ToolCall
from nemocascade.errors import UserError, unknown

Message = Mapping  # OpenAI: role, content, reasoning_content?, tool_calls?

DEFAULT_SYSTEM = (
  "You are a helpful and harmless assistant.\n\nYou are not allowed to use any tools."
)

# Fixed strings of the template, as cut by special tokens: each is worth a token of its own.
PHRASES: tuple[str, ...] = (
  "system\n", "user\n", "assistant\n", DEFAULT_SYSTEM, *tool_format.PHRASES,
)  # fmt: skip

# What a user may set of the template, and the kinds of value.
ARGUMENTS: dict[str, tuple[type, ...]] = {
  "enable_thinking": (bool,),
  "truncate_history_thinking": (bool,),
  "reasoning_budget": (int, type(None)),
}

_ROLES = ("system", "developer", "user", "assistant", "tool")
_END = (mark("<|im_end|>"), Piece("\n"))
_NO_THOUGHT = (mark("<think>"), mark("</think>"))
_THINK_TAG = re.compile("(</?think>)")


def render(
  messages: Sequence[Message],
  *,
  tools: Sequence[Mapping] | None = None,
  add_generation_prompt: bool = False,
  enable_thinking: bool = True,
  truncate_history_thinking: bool = True,
  reasoning_budget: int | None = None,
  **misspelt: object,
) -> list[Piece]:
  """Pieces of a conversation, beginning with a system turn.

  Thoughts from before the last user message are cut unless `truncate_history_thinking` is
  false; a turn that lost its thoughts is context only, since no prompt would bring it forth.
  Without a system message there is the default one, or with tools the tools alone.

  Raises:
    UserError: a message or tool that cannot be rendered, or an argument that does not exist.
  """
  check_arguments(
    misspelt
    | {
      "enable_thinking": enable_thinking,
      "truncate_history_thinking": truncate_history_thinking,
      "reasoning_budget": reasoning_budget,
    }
  )
  messages = list(messages)
  for place, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise UserError(f"message {place}: must be an object, is {message!r:.80}")
    if message.get("role") not in _ROLES:
      raise unknown(f"role of message {place}", message.get("role"), _ROLES)
  if messages and messages[0]["role"] in ("system", "developer"):
    system_text = _text(messages.pop(0).get("content"))
  else:
    system_text = "" if tools else DEFAULT_SYSTEM
  pieces = [mark("<|im_start|>"), Piece("system\n"), Piece(system_text)]
  if tools:
    pieces += [Piece("\n\n" if system_text else ""), *tool_format.tools_section(tools)]
  pieces += [mark("<|im_end|>"), Piece("\n")]

  last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
  for is_result, run in itertools.groupby(enumerate(messages), lambda im: im[1]["role"] == "tool"):
    if is_result:
      pieces += _result_turn([_text(message.get("content")) for _, message in run])
      continue
    for i, message in run:
      if message["role"] == "assistant":
        pieces += _assistant_turn(message, cut=truncate_history_thinking and i < last_user)
        continue
      text = _text(message.get("content"))
      if i == last_user and reasoning_budget is not None:
        text += f"\n\n{{thinking token budget: {reasoning_budget}}}"
      role = "user" if message["role"] == "user" else "system"
      pieces += [mark("<|im_start|>"), Piece(f"{role}\n"), Piece(text), *_END]

  if add_generation_prompt:
    pieces += generation_prompt(enable_thinking)
  return [piece for piece in pieces if piece.text]


def training_sequences(
  messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None, truncate_history_thinking: bool = True
) -> list[tuple[list[Piece], int]]:
  """A conversation as a model is trained on it: sequences of (pieces, how many of them at its start are context only).

  The turns of a question, tool calls included, are learned behind the history that the model is shown when it
  makes them: earlier questions' thoughts are cut. Where the next question changes how a question's turns are
  shown, the conversation up to there is a sequence of its own, and so each turn is learned in exactly one.
  A conversation without thoughts before its last question, or whose history is not cut, is one sequence.
  """
  messages = list(messages)
  draw = lambda count: render(messages[:count], tools=tools, truncate_history_thinking=truncate_history_thinking)
  sequences, context, whole = [], 0, draw(len(messages))
  questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
  for question in questions if truncate_history_thinking else ():
    now, later = draw(question), draw(question + 1)
    if later[: len(now)] != now:
      sequences.append((now, context))
      context = len(later)  # The next sequences begin with the same pieces.
  sequences.append((whole, context))
  return [(pieces, n) for pieces, n in sequences if any(piece.learned for piece in pieces[n:])]


def check_arguments(arguments: Mapping[str, object]) -> None:
  """Raises UserError on an argument that the template does not have, or on a value it cannot be."""
  for name, value in arguments.items():
    if name not in ARGUMENTS:
      raise unknown("template argument", name, ARGUMENTS)
    wrong_bool = isinstance(value, bool) and bool not in ARGUMENTS[name]
    if wrong_bool or not isinstance(value, ARGUMENTS[name]):
      kind = "true or false" if bool in ARGUMENTS[name] else "a whole number or null"
      raise UserError(f"template argument {name}={value!r}: must be {kind}")


def user_turn(text: str, *, enable_thinking: bool) -> list[Piece]:
  """What follows a sampled `<|im_end|>`: the user's next message, then a generation prompt."""
  turn = [mark("<|im_start|>"), Piece("user\n"), Piece(text), *_END]
  return [Piece("\n"), *turn, *generation_prompt(enable_thinking)]


def tool_response(results: Sequence[str], *, enable_thinking: bool) -> list[Piece]:
  """What follows a sampled `<|im_end|>`: results of its calls, then the next generation prompt."""
  return [Piece("\n"), *_result_turn(results), *generation_prompt(enable_thinking)]


def generation_prompt(enable_thinking: bool) -> list[Piece]:
  """The assistant's opening, after which it is its turn to speak."""
  opening = (mark("<think>"), Piece("\n")) if enable_thinking else _NO_THOUGHT
  return [mark("<|im_start|>"), Piece("assistant\n"), *opening]


def _result_turn(results: Sequence[str]) -> list[Piece]:
  """There is no tool role: results of neighbouring calls share one user turn."""
  return [mark("<|im_start|>"), Piece("user\n"), *tool_format.responses(results), *_END]


def _assistant_turn(message: Message, *, cut: bool) -> list[Piece]:
  content = _text(message.get("content"))
  reasoning = message.get("reasoning_content")
  calls = message.get("tool_calls") or ()
  header = (mark("<|im_start|>"), Piece("assistant\n"))

  # The thought with its newlines, and what follows </think>.
  if isinstance(reasoning, str) and reasoning.strip():
    thought, answer = f"\n{reasoning}\n", f"\n{content}"
  elif not _THINK_TAG.search(content):
    thought, answer = "", content
  elif "</think>" in content and (cut or content.lstrip().startswith("<think>")):
    thought, _, answer = content.lstrip().removeprefix("<think>").rpartition("</think>")
  elif cut and calls:
    answer, thought, _ = content.partition("<think>")  # A thought without an end.
  else:
    # Half a pair of tags, or one in mid-text: as it was written, with no thought made up.
    spans = _THINK_TAG.split(content.strip() + ("\n" if calls else ""))
    as_written = [Piece(span, bool(_THINK_TAG.fullmatch(span)), learned=True) for span in spans]
    said = [*header, *as_written, *tool_format.calls(calls, learned=True)]
    return [*said, mark("<|im_end|>", True), Piece("\n")]

  learned = not (cut and thought.strip())
  if cut:
    thought, answer = "", answer.rpartition("</think>")[2]
  if calls:  # On a line of their own, also where nothing was said.
    answer = (answer.strip() if cut else answer.rstrip()) + "\n"
  else:
    answer = answer.rstrip()

  # The generation prompt holds the newline after <think>; the rest is the assistant's.
  if thought:
    newline = "\n" if thought.startswith("\n") else ""
    opening = [mark("<think>"), Piece(newline)]
    opening += [Piece(thought.removeprefix("\n"), learned=True), mark("</think>", True)]
  else:
    opening = _NO_THOUGHT
  said = [Piece(answer, learned=learned), *tool_format.calls(calls, learned=learned)]
  return [*header, *opening, *said, mark("<|im_end|>", learned), Piece("\n")]


def _text(content: object) -> str:
  """The text of a message's content: a string, nothing, or OpenAI's list of text parts."""
  if content is None:
    return ""
  if isinstance(content, str):
    return content
  if isinstance(content, Sequence) and all(
    isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
  ):
    return "".join(part["text"] for part in content)
  raise UserError(
    f"content of a message: must be text or a list of text parts, not {content!r:.80}"
  )
