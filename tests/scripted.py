"""A model that outputs a given script of tokens, to test the code around a model."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_checkpoint import TOKENIZER

from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.voice import Kept

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


ENGINE = Engine(_prefill, _step, prompt_tokens=T - 1, total_tokens=T)


class Scripted(Conversation):
  """A conversation whose answers are set in advance in `to_say`."""

  def __init__(self, **settings):
    super().__init__(Kept(ENGINE, np.zeros(T, np.int32), Options(0.0)), TOKENIZER, **settings)
    self.to_say: list[list[int]] = []  # Tokens of the next answer and of those after it.

  def answer(self, *args):
    """Answers with the next item of `to_say`."""
    tokens, begin = self.to_say.pop(0), len(self.tokens)
    self.voice.params = self.voice.params.copy()
    self.voice.params[begin : begin + len(tokens)] = tokens
    return super().answer(*args)


def spell(*parts: str | int) -> list[int]:
  """Encodes text and special ids into tokens, as a policy would sample them."""
  return [i for part in parts for i in ([part] if isinstance(part, int) else TOKENIZER.encode(part))]
