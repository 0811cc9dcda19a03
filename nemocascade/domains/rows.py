"""Rows in the form of the released RL data: the parts of a prompt, and the split of each."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemocascade.data import chat
from nemocascade.data.tool_format import without_nulls
from nemocascade.errors import UserError
from nemocascade.verifiers.verdict import Message, Row

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # One prompt in 8, chosen by the hash of its text, is held out of training.
ITEMS = ("function_call", "function_call_output", "reasoning")  # Types of items that are no messages.


def prompt_messages(row: Row) -> list[Message]:
  """The messages of the prompt in OpenAI form; a plain string is one user message.

  Items of the Responses API (`function_call`, `function_call_output`, `reasoning`) become the tool calls, tool
  results and thoughts of messages.
  """
  prompt = row["responses_create_params"]["input"]
  if isinstance(prompt, str):
    return [{"role": "user", "content": prompt}]
  if any(isinstance(item, dict) and item.get("type") in ITEMS for item in prompt):
    return _from_items(prompt)
  return list(prompt)


def prompt_tools(row: Row) -> list[dict[str, Any]]:
  """The schemas of the functions offered with the prompt, without null fields."""
  return without_nulls(list(row["responses_create_params"].get("tools") or ()))


def make_prompt(name: str, text: str, *, tools: Sequence[dict[str, Any]] = (), **fields: Any) -> Row:
  """A row in the released form, with one user message and the domain's own `fields`."""
  params: dict[str, Any] = {"input": [{"role": "user", "content": text}]}
  if tools:
    params["tools"] = list(tools)
  agent_ref = {"type": "responses_api_agents", "name": name}
  return {"responses_create_params": params, "agent_ref": agent_ref, **fields}


def prompt_digest(row: Row, *, spaced: bool = True) -> bytes:
  """A digest of the prompt's text, 16 bytes. Rows with the same text are the same prompt.

  Args:
    spaced: whether texts that differ only in white space, or in how Unicode composes a character, are different.
  """
  text = "\n".join(_said(message.get("content")) for message in prompt_messages(row))
  if not spaced:
    text = " ".join(unicodedata.normalize("NFC", text).split())
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _said(content: object) -> str:
  """The text of a message's content, which may be a list of text parts."""
  if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
    return "".join(str(part["text"]) for part in content)
  return str(content or "")


def split_of(row: Row) -> str:
  """The row's split. It depends only on the prompt's text, so it is the same for every seed."""
  return split_of_digest(prompt_digest(row))


def split_of_digest(digest: bytes) -> str:
  return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


def make_rng(*parts: object) -> np.random.Generator:
  """A generator seeded by the parts (any JSON values); the same parts give it on every machine."""
  digest = hashlib.sha256(json.dumps(parts).encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


def check_prompt(row: Row) -> None:
  """Checks that a model can be asked with the row's prompt.

  Raises:
    UserError: there are no messages, one cannot be rendered, or their roles are out of order. The message names
      the field and the place in it.
  """
  params = row.get("responses_create_params")
  prompt = params.get("input") if isinstance(params, dict) else None
  if not isinstance(prompt, str | list) or not prompt:
    raise UserError("responses_create_params.input: must be a text or a list of messages, not empty")
  if isinstance(prompt, list) and not all(isinstance(item, dict) for item in prompt):
    raise UserError("responses_create_params.input: each message must be an object")
  if not isinstance(params.get("tools") or [], list):
    raise UserError(f"responses_create_params.tools: must be a list, is {type(params['tools']).__name__}")
  messages = prompt_messages(row)
  chat.render(messages, tools=prompt_tools(row), add_generation_prompt=True)
  roles = [message["role"] for message in messages]
  for place, (role, after) in enumerate(zip(roles, [None, *roles], strict=False)):
    if role not in FOLLOWS[after] or (role == "tool" and after == "assistant" and not _calls(messages[place - 1])):
      wrong = f"{role!r} after {after!r}" if after else f"{role!r} first"
      raise UserError(f"responses_create_params.input: roles out of order: message {place} is {wrong}")
  if roles[-1] not in ("user", "tool"):
    raise UserError(f"responses_create_params.input: the last message must be of user or tool, not {roles[-1]!r}")


# Role -> the roles that may follow it; None is the beginning.
FOLLOWS = {
  None: ("system", "developer", "user"),
  "system": ("system", "developer", "user"),
  "developer": ("system", "developer", "user"),
  "user": ("user", "assistant"),
  "assistant": ("user", "tool"),
  "tool": ("tool", "assistant", "user"),
}


def _calls(message: Message) -> bool:
  return bool(message.get("tool_calls"))


def _from_items(items: Sequence[dict[str, Any]]) -> list[Message]:
  """OpenAI messages of the items of a Responses API input.

  The reasoning, text and calls of one assistant turn are separate items; they become one message.
  """
  messages: list[Message] = []
  turn: Message | None = None  # The assistant message to which items are still added; the last of `messages`.

  def open_turn() -> Message:
    nonlocal turn
    if turn is None:
      turn = {"role": "assistant", "content": ""}
      messages.append(turn)
    return turn

  for item in items:
    kind = item.get("type") or "message"
    if kind == "reasoning":
      said = _texts(item.get("content")) or _texts(item.get("summary"))
      said = "\n".join(filter(None, [open_turn().get("reasoning_content"), said]))
      if said:
        open_turn()["reasoning_content"] = said
    elif kind == "function_call":
      call = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
      calls = open_turn().setdefault("tool_calls", [])
      calls.append({"id": item.get("call_id"), "type": "function", "function": call})
    elif kind == "function_call_output":
      turn = None
      result = {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
      messages.append(result)
    elif item.get("role") == "assistant" and turn is not None and not turn["content"] and not _calls(turn):
      turn.update({key: value for key, value in item.items() if key != "type"})  # Its thoughts came before it.
    else:
      turn = {key: value for key, value in item.items() if key != "type"}
      messages.append(turn)
      if item.get("role") != "assistant":
        turn = None
  return messages


def _texts(parts: object) -> str:
  """The text of a reasoning item's `content` or `summary`, a list of {"type", "text"}."""
  return "\n".join(part.get("text") or "" for part in parts) if isinstance(parts, list) else str(parts or "")
