"""Text from ids as they are sampled, never half a character."""

from collections.abc import Sequence

from nemocascade.data.tokenizer import Tokenizer

_NO_TEXT = "\ufffd"  # What decoding shows for bytes that are no character, or not yet.


class Detokenizer:
  """Ids in, text out as soon as no later id can change it; together it is `decode` of all ids."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._window: list[int] = []  # The ids that may still matter to the text of others.
    self._given = 0  # Characters of the window's text that were given out.

  def add(self, ids: Sequence[int]) -> str:
    """What these ids make certain."""
    self._window += map(int, ids)
    sure = len(self._window)
    while sure and self._window[sure - 1] in self._tokenizer.byte_ids:
      sure -= 1
    text = self._tokenizer.decode(self._window[:sure])
    certain = text.rstrip(_NO_TEXT)  # The end may be a character of which bytes are to come.
    new, self._given = certain[self._given :], max(self._given, len(certain))
    if sure == len(self._window) and certain == text:
      self._forget()
    return new

  def finish(self) -> str:
    """What is left once no more ids come: bytes that never became a character are U+FFFD."""
    rest = self._tokenizer.decode(self._window)[self._given :]
    self._window, self._given = [], 0
    return rest

  def _forget(self) -> None:
    """Keeps only the last id that is text by itself: some tokenizers join by what stands before."""
    whole = lambda i: _NO_TEXT not in self._tokenizer.decode([i])
    last = next((k for k in reversed(range(len(self._window))) if whole(self._window[k])), 0)
    self._window = self._window[last:]
    self._given = len(self._tokenizer.decode(self._window))
