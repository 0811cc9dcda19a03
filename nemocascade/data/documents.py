"""Turns a row of a conversation into tokenized documents that fit into packed rows."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nemocascade.data import chat
from nemocascade.data.pieces import Piece
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.data.tool_format import without_nulls
from nemocascade.errors import UserError, listed, short

LONG = ("split", "cut", "drop")  # What happens to a document that is longer than a packed row.
DEEPEST = 100  # Lists and objects inside one another in a conversation. Python's own limit varies with its settings.


@dataclasses.dataclass(frozen=True)
class Document:
  """A tokenised conversation with its loss mask."""

  tokens_T: np.ndarray  # int32
  loss_mask_T: np.ndarray  # bool; true on the tokens that are trained on.


def to_documents(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[Document]:
  """Tokenizes a conversation into documents: one for each sequence of chat.training_sequences.

  Args:
    row: has "messages" and optionally "tools", in OpenAI form. Each is a list or its JSON text; other keys are
      ignored.

  Raises:
    UserError: the messages or tools have another form, the roles are out of order, or no token can be trained on.
  """
  with _rendering():
    documents = []
    for pieces, context in _sequences(row):
      before, _ = chat.tokenize(pieces[:context], tokenizer)
      tokens, loss_mask = chat.tokenize(pieces[context:], tokenizer)
      documents.append(Document(np.array(before + tokens, np.int32), np.array([False] * len(before) + loss_mask)))
    return documents


def texts_of(row: Mapping[str, Any]) -> list[str]:
  """The texts between the special tokens of a conversation, for training a tokenizer. Raises UserError as above."""
  with _rendering():
    return [piece.text for pieces, context in _sequences(row) for piece in pieces[context:] if not piece.special]


@contextlib.contextmanager
def _rendering() -> Iterator[None]:
  """Turns what rendering raises into a UserError."""
  try:
    yield
  except RecursionError as error:
    raise UserError("is nested too deep") from error
  except (AttributeError, LookupError, TypeError, ValueError) as error:  # A value of a type that has no text.
    raise UserError(f"cannot be rendered ({type(error).__name__}: {short(str(error))})") from error


def _sequences(row: Mapping[str, Any]) -> list[tuple[list[Piece], int]]:
  messages, tools = (_decoded(row.get(key)) for key in ("messages", "tools"))
  _check_depth([messages, tools])
  if not messages:
    raise UserError("has no messages" + (f", only {listed(row)}" if row and "messages" not in row else ""))
  for key, value in (("messages", messages), ("tools", tools or [])):
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
      raise UserError(f"{key} must be a list of objects")
  check_order(messages)
  tools = without_nulls(tools)
  sequences = chat.training_sequences(messages, tools=tools)
  if not sequences:
    raise UserError("has nothing to learn: no assistant turn")
  return sequences


def check_order(messages: Sequence[Mapping]) -> None:
  """Raises UserError if an assistant or tool message stands where no model writes one, or a message says nothing.

  An assistant message does not follow another one; a tool message follows the calls of an assistant. System messages
  may stand anywhere. A user message whose content is null was withheld from the data.
  """
  before: Mapping = {}
  for place, message in enumerate(messages):
    role, last = message.get("role"), before.get("role")
    if role == "user" and message.get("content") is None:
      raise UserError(f"message {place}: a user message without content")
    if role == "assistant":
      _check_answer(place, message)
    if role == last == "assistant":
      raise UserError(f"roles out of order: message {place} is of the assistant and must be after a user's or a tool's")
    if role == "tool" and last != "tool" and not before.get("tool_calls"):
      raise UserError(f"roles out of order: message {place} is of a tool and must be after an assistant's calls")
    if role not in ("system", "developer"):
      before = message


def _check_answer(place: int, message: Mapping) -> None:
  """Raises UserError if an assistant's message has nothing to learn, or its thoughts under a name that is not read."""
  if message.get("reasoning") and not message.get("reasoning_content"):
    raise UserError(f"message {place}: has its thoughts in 'reasoning'; they must be in 'reasoning_content'")
  if message.get("content") is None and not message.get("reasoning_content") and not message.get("tool_calls"):
    raise UserError(f"message {place}: an assistant message without content, reasoning_content and tool_calls")


def fitted(documents: Sequence[Document], T: int, long_documents: str) -> tuple[list[Document], int]:
  """(documents of at most T tokens, number of the given documents that were longer).

  Args:
    long_documents: "split" cuts a longer document into documents of T tokens and a shorter last one, "cut" keeps
      its first T tokens, "drop" leaves it out. Parts without a trained token are left out. A part begins with the
      last token of the part before as context, so that every trained token is trained on in exactly one part.
  """
  fit: list[Document] = []
  longer = 0
  for document in documents:
    length = len(document.tokens_T)
    if length <= T:
      fit.append(document)
      continue
    longer += 1
    stop = {"split": length - 1, "cut": 1, "drop": 0}[long_documents]
    for start in range(0, stop, max(1, T - 1)):
      mask_T = document.loss_mask_T[start : start + T].copy()
      mask_T[0] = False  # The first token of a document has no log-probability.
      if mask_T.any():
        fit.append(Document(document.tokens_T[start : start + T], mask_T))
  return fit, longer


def _check_depth(value: Any) -> None:
  level, depth = [value], 0
  while level := [item for item in level if isinstance(item, (dict, list, tuple))]:
    if (depth := depth + 1) > DEEPEST:
      raise UserError(f"is nested too deep: more than {DEEPEST} lists and objects inside one another")
    level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]


def _decoded(value: Any) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value) if value else None
  except ValueError as error:
    raise UserError(f"has messages or tools that are not JSON ({error})") from error
