"""Rows in the form of the released RL data: the parts of a prompt, and the split of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from nemocascade.verifiers.verdict import Message, Row

SPLITS = ("train", "heldout")


HELDOUT_SHARE = 8  # One prompt in 8, chosen by the hash of its text, is held out of training.


def prompt_messages(row: Row) -> list[Message]:
  """The messages of the prompt; a plain string is one user message."""
  prompt = row["responses_create_params"]["input"]
  return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def prompt_tools(row: Row) -> list[dict[str, Any]]:
  """The schemas of the functions offered with the prompt."""
  return list(row["responses_create_params"].get("tools") or ())


def make_prompt(name: str, text: str, *, tools: Sequence[dict[str, Any]] = (), **fields: Any) -> Row:
  """A row in the released form, with one user message and the domain's own `fields`."""
  params: dict[str, Any] = {"input": [{"role": "user", "content": text}]}
  if tools:
    params["tools"] = list(tools)
  agent_ref = {"type": "responses_api_agents", "name": name}
  return {"responses_create_params": params, "agent_ref": agent_ref, **fields}


def split_of(row: Row) -> str:
  """The row's split. It depends only on the prompt's text, so it is the same for every seed."""
  text = "\n".join(str(message.get("content") or "") for message in prompt_messages(row))
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"
