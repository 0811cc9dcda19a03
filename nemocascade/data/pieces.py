"""Pieces of a rendered conversation (text or a special token), and their tokenization with a loss mask."""

import dataclasses
import itertools
from collections.abc import Sequence

from nemocascade.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a rendered conversation: either text or one special token."""

  text: str  # The name of the token if `special`.
  special: bool = False
  learned: bool = False  # Whether its tokens are trained on.


def mark(name: str, learned: bool = False) -> Piece:
  """The piece of a special token."""
  return Piece(name, special=True, learned=learned)


def text_of(pieces: Sequence[Piece]) -> str:
  """The rendered conversation as text, special tokens included by name."""
  return "".join(piece.text for piece in pieces)


def tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
  """Returns (tokens, loss_mask). Adjacent text pieces with equal `learned` are encoded as one string."""
  tokens, loss_mask = [], []
  for (is_special, learned), run in itertools.groupby(pieces, lambda p: (p.special, p.learned)):
    if is_special:
      ids = [tokenizer.special[piece.text] for piece in run]
    else:
      ids = tokenizer.encode("".join(piece.text for piece in run))
    tokens += ids
    loss_mask += [learned] * len(ids)
  return tokens, loss_mask
