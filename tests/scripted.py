"""A model that says what a script says at each place, to test what goes on around a model."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_checkpoint import TOKENIZER

from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.engine import Engine

T = 1024
V = TOKENIZER.vocab_size


def _logits(script_T, place_B):
  return 50 * jax.nn.one_hot(script_T[jnp.minimum(place_B, T - 1)], V)


def _prefill(script_T, tokens_BP, length_B, capacity):
  del tokens_BP, capacity
  return _logits(script_T, length_B), length_B


def _step(script_T, length_B, tokens_B, active_B):
  del tokens_B
  length_B = length_B + active_B
  return length_B, _logits(script_T, length_B)


ENGINE = Engine(_prefill, _step, jnp.repeat, prompt_tokens=T - 1, total_tokens=T)


class Scripted(Conversation):
  """A conversation whose next answer is given with the question."""

  def __init__(self, **settings):
    super().__init__(ENGINE, np.zeros(T, np.int32), TOKENIZER, **{"temperature": 0.0, **settings})
    self.to_say: list[list[int]] = []  # Of this answer and those after it.

  def answer(self, *args):
    """What `to_say` has next; its ids of text, and special tokens."""
    tokens, begin = self.to_say.pop(0), len(self.tokens)
    self.params = self.params.copy()
    self.params[begin : begin + len(tokens)] = tokens
    # A history that was just taken in has decided on the first token already.
    first_BV = 50 * np.eye(V, dtype=np.float32)[tokens[:1]]
    self._d = self._d.replace(logits_BV=first_BV)
    return super().answer(*args)


def spell(*parts: str | int) -> list[int]:
  """Text and special ids, as a policy would sample them."""
  return [i for part in parts for i in ([part] if isinstance(part, int) else TOKENIZER.encode(part))]
