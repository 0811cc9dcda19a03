"""The loss of SFT on held-out conversations, by source: `sources.NAME.heldout` names their files."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from nemocascade.data.documents import fitted, to_documents
from nemocascade.data.packing import fill, pack
from nemocascade.data.row_files import first_rows
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError
from nemocascade.runtime.programs import Programs
from nemocascade.types import Batch, Params

MOST = 256  # Conversations that are read of a source.


def heldout(c: ConfigDict, tokenizer: Tokenizer) -> dict[str, Batch]:
  """Source -> its first held-out conversations, packed into rows whose number is a multiple of rows / pieces.

  Raises:
    UserError: a file cannot be read, one of these conversations is bad, or none fits into a row.
  """
  return {name: _rows(c, name, tokenizer) for name, source in c.sources.items() if source.get("heldout")}


def _rows(c: ConfigDict, name: str, tokenizer: Tokenizer) -> Batch:
  field = f"sources.{name}.heldout={c.sources[name].heldout}"
  documents = []
  try:
    found = first_rows(c.sources[name].heldout, MOST)
  except UserError as error:
    raise UserError(f"{field}: {error}") from error
  for place, row in found:
    try:
      if isinstance(row, UserError):
        raise row
      documents += fitted(to_documents(row, tokenizer), c.row_tokens, c.long_documents)[0]
    except UserError as error:
      raise UserError(f"{field}: {place}: {error}") from error
  if not documents:
    raise UserError(f"{field}: no conversation fits into row_tokens={c.row_tokens}")
  rows = pack([len(document.tokens_T) for document in documents], capacity=c.row_tokens)
  rows += [[]] * (-len(rows) % (c.rows // c.pieces))
  return fill([[documents[i] for i in row] for row in rows], T=c.row_tokens)


def losses(c: ConfigDict, programs: Programs, params: Params, held: Mapping[str, Batch]) -> dict[str, float]:
  """{"heldout_loss/SOURCE": mean -log p of the learned tokens of its held-out conversations, in nats}."""
  found, B = {}, c.rows // c.pieces
  for name, batch in held.items():
    total = 0.0
    for start in range(0, len(batch.tokens_BT), B):
      rows = (a[start : start + B] for a in (batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT))
      total -= float(np.sum(programs.score(params, *programs.put(tuple(rows))).logprobs_BT))
    found[f"heldout_loss/{name}"] = total / int(batch.loss_mask_BT.sum())
  return found
