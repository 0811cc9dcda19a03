"""Renders messages with the chat template; the result says which tokens are trained on.

The template is that of Nemotron-Cascade 2 (arXiv 2603.19220, section 3.1.2); the details follow NVIDIA's
`nano3.jinja`. The output is a list of pieces. A piece ends where a generation prompt ends and at the
assistant's `<|im_end|>`, so training on a conversation sees exactly the tokens that a rollout of it produces.
`chat_parse` turns an assistant's tokens back into a message.
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

DEFAULT_SYSTEM = "You are a helpful and harmless assistant.\n\nYou are not allowed to use any tools."

# The template's fixed strings between special tokens. A tokenizer that we train gives each one token.
PHRASES: tuple[str, ...] = (
  "system\n", "user\n", "assistant\n", DEFAULT_SYSTEM, *tool_format.PHRASES,
)  # fmt: skip

# The template's arguments that a user may set -> the types allowed.
ARGUMENTS: dict[str, tuple[type, ...]] = {
  "enable_thinking": (bool,),
  "truncate_history_thinking": (bool,),
  "reasoning_budget": (int, type(None)),
}

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SYSTEM = ("system", "developer")  # Roles of a message that fills the system turn.
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
  """Renders a conversation as pieces; the first turn is always a system turn.

  Without a system message the system turn holds the list of tools, or DEFAULT_SYSTEM if there are no tools.

  Args:
    messages: in OpenAI form.
    tools: function schemas in OpenAI form.
    add_generation_prompt: whether the opening of an assistant turn follows the last message.
    enable_thinking: whether that opening starts a thought (`<think>`) or skips it (`<think></think>`).
    truncate_history_thinking: whether thoughts before the last user message are removed. A turn whose
      thought was removed is not trained on, because the model never generates it in that form.
    reasoning_budget: number of tokens stated at the end of the last user message; None states none.
    misspelt: catches unknown arguments, so that they raise UserError.

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
  _check_messages(messages)
  pieces = _system_turn(messages, tools)
  if messages and messages[0]["role"] in _SYSTEM:
    messages.pop(0)
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


def _check_messages(messages: Sequence[Message]) -> None:
  """Raises UserError if a message is no object, or has an unknown role."""
  for place, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise UserError(f"message {place}: must be an object, is {message!r:.80}")
    if message.get("role") not in _ROLES:
      raise unknown(f"role of message {place}", message.get("role"), _ROLES)


def training_sequences(
  messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None, truncate_history_thinking: bool = True
) -> list[tuple[list[Piece], int]]:
  """Splits a conversation into training sequences: (pieces, number of leading pieces that are context only).

  Every assistant turn is trained on in exactly one sequence, with the history that the model sees when it
  generates that turn: thoughts of earlier questions are removed. If the next user message changes how the turns
  so far are rendered, the conversation up to that message becomes a sequence of its own.
  The result is one sequence if no thought precedes the last user message, or if
  `truncate_history_thinking` is false. Sequences without a trained piece are left out.
  """
  messages = list(messages)
  draw = lambda count: render(messages[:count], tools=tools, truncate_history_thinking=truncate_history_thinking)
  sequences, context, whole = [], 0, draw(len(messages))
  # A user message changes only how earlier turns of the assistant are rendered.
  first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
  questions = [i for i, message in enumerate(messages) if message["role"] == "user" and i > first]
  for question in questions if truncate_history_thinking else ():
    now, later = draw(question), draw(question + 1)
    if later[: len(now)] != now:
      sequences.append((now, context))
      context = len(later)  # All following sequences begin with these pieces, as context.
  sequences.append((whole, context))
  return [(pieces, n) for pieces, n in sequences if any(piece.learned for piece in pieces[n:])]


def check_arguments(arguments: Mapping[str, object]) -> None:
  """Raises UserError on an unknown template argument or on a value of the wrong type."""
  for name, value in arguments.items():
    if name not in ARGUMENTS:
      raise unknown("template argument", name, ARGUMENTS)
    wrong_bool = isinstance(value, bool) and bool not in ARGUMENTS[name]
    if wrong_bool or not isinstance(value, ARGUMENTS[name]):
      kind = "true or false" if bool in ARGUMENTS[name] else "a whole number or null"
      raise UserError(f"template argument {name}={value!r}: must be {kind}")


def user_turn(text: str, *, enable_thinking: bool) -> list[Piece]:
  """Pieces to append after a sampled `<|im_end|>`: the user's next message and a generation prompt."""
  turn = [mark("<|im_start|>"), Piece("user\n"), Piece(text), *_END]
  return [Piece("\n"), *turn, *generation_prompt(enable_thinking)]


def tool_response(results: Sequence[str], *, enable_thinking: bool) -> list[Piece]:
  """Pieces to append after a sampled `<|im_end|>`: the results of the turn's calls and a generation prompt."""
  return [Piece("\n"), *_result_turn(results), *generation_prompt(enable_thinking)]


def generation_prompt(enable_thinking: bool) -> list[Piece]:
  """The opening of an assistant turn, up to the first token that the model samples."""
  opening = (mark("<think>"), Piece("\n")) if enable_thinking else _NO_THOUGHT
  return [mark("<|im_start|>"), Piece("assistant\n"), *opening]


def _system_turn(messages: Sequence[Message], tools: Sequence[Mapping] | None) -> list[Piece]:
  """The first turn: the system message if the conversation begins with one, and the list of tools."""
  if messages and messages[0]["role"] in _SYSTEM:
    text = _text(messages[0].get("content"))
  else:
    text = "" if tools else DEFAULT_SYSTEM
  turn = [mark("<|im_start|>"), Piece("system\n"), Piece(text)]
  if tools:
    turn += [Piece("\n\n" if text else ""), *tool_format.tools_section(tools)]
  return [*turn, *_END]


def _result_turn(results: Sequence[str]) -> list[Piece]:
  """The user turn that holds consecutive tool results; the template has no tool role."""
  return [mark("<|im_start|>"), Piece("user\n"), *tool_format.responses(results), *_END]


def _assistant_turn(message: Message, *, cut: bool) -> list[Piece]:
  content = _text(message.get("content"))
  reasoning = message.get("reasoning_content")
  calls = message.get("tool_calls") or ()
  header = (mark("<|im_start|>"), Piece("assistant\n"))

  # `thought` includes its newlines; `answer` is all text after </think>.
  if isinstance(reasoning, str) and reasoning.strip():
    thought, answer = f"\n{reasoning}\n", f"\n{content}"
  elif not _THINK_TAG.search(content):
    thought, answer = "", content
  elif "</think>" in content and (cut or content.lstrip().startswith("<think>")):
    thought, _, answer = content.lstrip().removeprefix("<think>").rpartition("</think>")
  elif cut and calls:
    answer, thought, _ = content.partition("<think>")  # The thought has no </think>.
  else:
    # The content has one tag without the other, or a tag in mid-text: keep it as written, add no thought.
    spans = _THINK_TAG.split(content.strip() + ("\n" if calls else ""))
    as_written = [Piece(span, bool(_THINK_TAG.fullmatch(span)), learned=True) for span in spans]
    said = [*header, *as_written, *tool_format.calls(calls, learned=True)]
    return [*said, mark("<|im_end|>", True), Piece("\n")]

  learned = not (cut and thought.strip())
  if cut:
    thought, answer = "", answer.rpartition("</think>")[2]
  if calls:  # Calls start on a new line, even after an empty answer.
    answer = (answer.strip() if cut else answer.rstrip()) + "\n"
  else:
    answer = answer.rstrip()

  # The newline after <think> belongs to the generation prompt; the model samples everything after it.
  if thought:
    newline = "\n" if thought.startswith("\n") else ""
    opening = [mark("<think>"), Piece(newline)]
    opening += [Piece(thought.removeprefix("\n"), learned=True), mark("</think>", True)]
  else:
    opening = _NO_THOUGHT
  said = [Piece(answer, learned=learned), *tool_format.calls(calls, learned=learned)]
  return [*header, *opening, *said, mark("<|im_end|>", learned), Piece("\n")]


def _text(content: object) -> str:
  """The text of a message's content, which is a string, None, or OpenAI's list of text parts."""
  if content is None:
    return ""
  if isinstance(content, str):
    return content
  if isinstance(content, Sequence) and all(
    isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
  ):
    return "".join(part["text"] for part in content)
  raise UserError(f"content of a message: must be text or a list of text parts, not {content!r:.80}")
