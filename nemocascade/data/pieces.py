"""A rendered conversation as pieces of text and special tokens, and its tokens with their mask."""

import dataclasses
import itertools
from collections.abc import Sequence

from nemocascade.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
  """A stretch of a rendered conversation; a special token stands alone."""

  text: str
  special: bool = False
  learned: bool = False


def mark(name: str, learned: bool = False) -> Piece:
  """The piece of a special token."""
  return Piece(name, special=True, learned=learned)


def text_of(pieces: Sequence[Piece]) -> str:
  """The rendered text, as a template in text would write it."""
  return "".join(piece.text for piece in pieces)


def tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
  """(tokens, loss_mask). Neighbouring text that is learned alike is encoded as one."""
  tokens, loss_mask = [], []
  for (is_special, learned), run in itertools.groupby(pieces, lambda p: (p.special, p.learned)):
    if is_special:
      ids = [tokenizer.special[piece.text] for piece in run]
    else:
      ids = tokenizer.encode("".join(piece.text for piece in run))
    tokens += ids
    loss_mask += [learned] * len(ids)
  return tokens, loss_mask
