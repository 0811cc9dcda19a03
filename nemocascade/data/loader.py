"""The input pipeline: conversations to packed batches, sharded by host and exactly resumable."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from nemocascade.data import chat, packing
from nemocascade.data.packing import Document
from nemocascade.errors import UserError
from nemocascade.types import Batch


def to_documents(example: Mapping[str, Any], tokenizer) -> list[Document]:
  """A conversation as a model is trained on it: one document, or one a question (chat.training_sequences).

  Messages and tools may be lists or their JSON.
  """
  messages, tools = (_decoded(example.get(key)) for key in ("messages", "tools"))
  if not messages:
    raise UserError("has no messages")
  for key, value in (("messages", messages), ("tools", tools or [])):
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
      raise UserError(f"{key} must be a list of objects")
  documents = []
  for pieces, context in chat.training_sequences(messages, tools=tools):
    before, _ = chat.tokenize(pieces[:context], tokenizer)
    tokens, loss_mask = chat.tokenize(pieces[context:], tokenizer)
    documents.append(Document(np.array(before + tokens, np.int32), np.array([False] * len(before) + loss_mask)))
  if not documents:
    raise UserError("has nothing to learn: no assistant turn")
  return documents


def tokenize_all(source: Sequence[Mapping[str, Any]], tokenizer) -> list[Document]:
  """The documents of every example of a source, in its order."""
  documents = []
  for i in range(len(source)):
    try:
      documents += to_documents(source[i], tokenizer)
    except UserError as error:
      raise UserError(f"example {i}: {error}") from error
  return documents


class Loader:
  """An endless (or `epochs` long) iterator over batches of B packed rows of T tokens.

  An epoch is every row once, in an order drawn from (seed, epoch); documents are packed
  once. Each of `shard_count` hosts gets B / shard_count rows of every batch, so that
  all together get what one would get alone. `get_state` is plain JSON, may be taken
  between any two batches, and is the same on every host.
  """

  def __init__(
    self,
    documents: Sequence[Document],
    *,
    T: int,
    B: int,
    seed: int,
    epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    overlong: str = "error",
  ):
    if not 0 <= shard_index < shard_count:
      raise UserError(f"shard_index={shard_index}: must be from 0 to {shard_count - 1}")
    if B < 1 or B % shard_count:
      raise UserError(f"B={B} rows a batch: must be a multiple of shard_count={shard_count}")
    lengths = [len(document.tokens_T) for document in documents]
    self.rows = packing.pack(lengths, capacity=T, overlong=overlong)
    self.dropped = sum(length > T for length in lengths)  # Documents too long for a row.
    if not self.rows:
      raise UserError(f"no document fits into a row: {len(lengths)} given, T={T}")
    self.fraction_filled = sum(n for n in lengths if n <= T) / (len(self.rows) * T)
    self._fingerprint = _fingerprint(documents, T=T, B=B, seed=seed, epochs=epochs)

    ordered = grain.MapDataset.source(self.rows).seed(seed).shuffle().repeat(epochs)
    if epochs is not None:
      whole = len(ordered) // B * B  # Hosts must run out together.
      if not whole:
        raise UserError(f"B={B} rows a batch, but {epochs} epochs have {len(ordered)} rows")
      ordered = ordered[:whole]
    share = ordered[shard_index::shard_count]
    batches = share.batch(
      B // shard_count,
      drop_remainder=True,
      batch_fn=lambda rows: packing.fill(documents, rows, T=T),
    )
    # Filling a batch takes microseconds; threads would only compete with the step.
    self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """What to save so that the next batch can be made again."""
    return {"iterator": self._iterator.get_state(), "fingerprint": self._fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to where `get_state` was taken, on the same data with the same settings."""
    if state.get("fingerprint") != self._fingerprint:
      raise UserError(
        "state of the input pipeline: was saved with other data, T, B, seed or epochs; "
        "start the stage anew or restore them"
      )
    self._iterator.set_state(state["iterator"])


def _decoded(value: Any) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value) if value else None
  except ValueError as error:
    raise UserError(f"has messages or tools that are not JSON ({error})") from error


def _fingerprint(documents: Sequence[Document], **settings: Any) -> str:
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for document in documents:
    digest.update(document.tokens_T.tobytes())
    digest.update(document.loss_mask_T.tobytes())
  return digest.hexdigest()
