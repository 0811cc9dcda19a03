"""The input pipeline: packs conversations into batches, shards them by host and can be resumed exactly."""

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
  """Tokenizes a conversation into documents: one for each sequence of chat.training_sequences.

  Args:
    example: has "messages" and optionally "tools", each a list or its JSON text.

  Raises:
    UserError: the messages or tools have another form, or no assistant turn can be trained on.
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
  """The documents of all examples, in order. A UserError names the number of the bad example."""
  documents = []
  for i in range(len(source)):
    try:
      documents += to_documents(source[i], tokenizer)
    except UserError as error:
      raise UserError(f"example {i}: {error}") from error
  return documents


class Loader:
  """An iterator over batches of B packed rows of T tokens, endless unless `epochs` is given.

  Documents are packed once. An epoch visits every row once, in an order drawn from (seed, epoch).
  Each of `shard_count` hosts gets B / shard_count rows of every batch; together the hosts get the
  batches that a single host would get. `get_state` returns plain JSON, works between any two batches,
  and is the same on every host.

  Attributes:
    rows: the document numbers of each packed row.
    dropped: number of documents longer than T, which are in no row (overlong="drop").
    fraction_filled: share of the tokens of all rows that are not padding.

  Raises:
    UserError: B does not divide over the hosts, no document fits, or the epochs hold less than a batch.
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
    self.dropped = sum(length > T for length in lengths)
    if not self.rows:
      raise UserError(f"no document fits into a row: {len(lengths)} given, T={T}")
    self.fraction_filled = sum(n for n in lengths if n <= T) / (len(self.rows) * T)
    self._fingerprint = _fingerprint(documents, T=T, B=B, seed=seed, epochs=epochs)

    ordered = grain.MapDataset.source(self.rows).seed(seed).shuffle().repeat(epochs)
    if epochs is not None:
      whole = len(ordered) // B * B  # All hosts must end after the same number of batches.
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
    """The position in the data, as JSON; `set_state` with it continues with the same next batch."""
    return {"iterator": self._iterator.get_state(), "fingerprint": self._fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from a saved position. Raises UserError if the data or the settings have changed."""
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
