"""What continues the tokens of a conversation: an engine that keeps their state, or a service that many share."""

from collections.abc import Generator, Sequence
from typing import Protocol

import jax
import numpy as np

from nemocascade.rollout.decoding import Decoding
from nemocascade.rollout.engine import Engine, width_of
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.scheduler import Request
from nemocascade.rollout.service import Service
from nemocascade.types import Params

STRIDE = 4  # Tokens that a call of the decoding loop samples before they are given.


class Voice(Protocol):
  """Continues tokens.

  Attributes:
    room: the most tokens, old and new ones together.
  """

  room: int

  def stream(self, tokens: Sequence[int], most: int) -> Generator[list[int], None, None]:
    """Yields new tokens as they come: at most `most`, up to a stop token. A piece may be empty. Closing it ends it."""
    ...


class Kept:
  """A voice for one conversation. It keeps the decode state, so that only what is new in the tokens is computed.

  Attributes:
    prefills: how often tokens were taken in from their beginning, because they did not continue those before.
  """

  def __init__(self, engine: Engine, params: Params, options: Options, *, seed: int = 0):
    self.engine, self.params, self.options, self.room = engine, params, options, engine.T
    self._key, self.prefills = jax.random.key(seed), 0
    self._known: list[int] = []  # The tokens of the state.
    self._d: Decoding | None = None

  def stream(self, tokens: Sequence[int], most: int) -> Generator[list[int], None, None]:
    self._take_in(list(tokens))
    limit = min(len(tokens) + most, self.room)
    while len(self._known) < limit:
      new = self._sample(min(len(self._known) + STRIDE, limit))
      yield new
      if not new or new[-1] in self.engine.stop_ids:
        return

  def _take_in(self, tokens: list[int]) -> None:
    known, d = len(self._known), self._d
    if d is not None and tokens[:known] == self._known and len(tokens) > known:
      d = d.replace(limit_B=np.array([self.room], np.int32))
      self._d = self.engine.extend(self.params, d, {0: tokens[known:]})
    else:
      width = width_of(len(tokens))
      self._d = self.engine.start(self.params, [tokens], 1, width=width, options=self.options, held=True)
      self.prefills += 1
    self._known = tokens

  def _sample(self, limit: int) -> list[int]:
    """Decodes up to a stop token or `limit` tokens in total; returns the new ones, none if logits are not finite."""
    assert self._d is not None
    d = self._d.replace(limit_B=np.array([limit], np.int32), done_B=np.array([False]))
    self._d = self.engine.decode(self.params, d, self._key)
    new = np.asarray(self._d.tokens_BT)[0, len(self._known) : int(self._d.known_B[0])].tolist()
    self._known = self._known + new
    if not new:
      self._d = None  # The engine has dropped the state.
    return new


class Served:
  """A voice of one of many conversations that a service answers. No state is kept between its answers."""

  def __init__(self, service: Service, options: Options, *, seed: int = 0):
    self.service, self.options, self.seed, self.room = service, options, seed, service.room

  def stream(self, tokens: Sequence[int], most: int) -> Generator[list[int], None, None]:
    return self.service.stream(Request(tokens, most, self.seed, self.options))
