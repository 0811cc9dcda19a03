"""Incremental decoding of sampled ids; it never returns part of a character."""

from collections.abc import Sequence

from nemocascade.data.tokenizer import Tokenizer

LONGEST = 64  # Ids of a window from which on it is shortened; shortening costs a call of the tokenizer for some ids.
_NO_TEXT = "\ufffd"  # Decoders return it for bytes that are an invalid or an incomplete character.


class Detokenizer:
  """Returns text as soon as no later id can change it; the parts together equal `decode` of all ids."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._window: list[int] = []  # The last ids, which can still affect the text of later ones.
    self._given = 0  # Characters of the window's text that were returned already.

  def add(self, ids: Sequence[int]) -> str:
    """Adds ids and returns the new text that is final."""
    self._window += map(int, ids)
    if self._window and self._window[-1] in self._tokenizer.special_names:
      return self.finish()  # The tokenizer decodes the ids after a special one without those before it.
    sure = len(self._window)
    while sure and self._window[sure - 1] in self._tokenizer.byte_ids:
      sure -= 1
    text = self._tokenizer.decode(self._window[:sure])
    certain = text.rstrip(_NO_TEXT)  # The last character may be incomplete: later ids may hold its other bytes.
    new, self._given = certain[self._given :], max(self._given, len(certain))
    if len(self._window) >= LONGEST and sure == len(self._window) and certain == text:
      self._forget()
    return new

  def finish(self) -> str:
    """Returns the rest of the text and resets; bytes that do not form a character become U+FFFD."""
    rest = self._tokenizer.decode(self._window)[self._given :]
    self._window, self._given = [], 0
    return rest

  def _forget(self) -> None:
    """Drops all ids before the last one that decodes alone; some tokenizers need it to decode the next id."""
    whole = lambda i: _NO_TEXT not in self._tokenizer.decode([i])
    last = next((k for k in reversed(range(len(self._window))) if whole(self._window[k])), 0)
    self._window = self._window[last:]
    self._given = len(self._tokenizer.decode(self._window))
