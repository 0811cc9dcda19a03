"""Lossless tokenizers. Plain text never encodes to a special token, even if it spells one."""

import abc
import collections
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers

from nemocascade.errors import UserError
from nemocascade.state_files import place, whole

PAD, EOS = 0, 2
IM_START, IM_END = 10, 11
THINK, THINK_END = 12, 13
TOOL_CALL, TOOL_CALL_END = 14, 15
TOOL_RESPONSE, TOOL_RESPONSE_END = 16, 17

# Ids 0 to 17 of the Nemotron 3 tokenizers, in order.
SPECIAL_NAMES = (
  "<unk>", "<s>", "</s>",
  "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]",
  "<|im_start|>", "<|im_end|>", "<think>", "</think>",
  "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip

# The special tokens that the chat template and its parser use -> ids.
FAMILY = {name: i for i, name in enumerate(SPECIAL_NAMES) if i >= IM_START}

_SPACE = "\u2581"  # SentencePiece writes a space as this character; the character itself is encoded as bytes.


class Tokenizer(abc.ABC):
  """The interface of all tokenizers.

  Attributes:
    special: name -> id of each special token; it includes all of FAMILY.
    special_names: the same, id -> name.
    vocab_size: one more than the largest id.
    fingerprint: SHA-256 of the tokenizer's file.
    byte_ids: ids of single bytes; their text depends on the adjacent bytes.
    file_name: the name of the tokenizer's file in a folder.
  """

  file_name: str
  byte_ids: frozenset[int] = frozenset()

  def __init__(self, data: bytes, special: Mapping[str, int], vocab_size: int):
    self._data = data
    self.special, self.vocab_size = dict(special), vocab_size
    self.special_names = {i: name for name, i in self.special.items()}
    self.fingerprint = hashlib.sha256(data).hexdigest()

  def __reduce__(self):
    return type(self), (self._data,)

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """The ids of plain text. No id is special, whatever the text spells."""

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str:
    """The text of adjacent ids, none of which is special."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of any ids. A special id gives its name, an id outside the vocabulary gives U+FFFD."""
    parts, run = [], []
    for i in map(int, ids):
      if 0 <= i < self.vocab_size and i not in self.special_names:
        run.append(i)
        continue
      parts.append(self._decode(run) if run else "")
      parts.append(self.special_names.get(i, "\ufffd"))
      run = []
    parts.append(self._decode(run) if run else "")
    return "".join(parts)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the tokenizer's file to `path`, or to `path`/file_name if that is a folder; atomic."""
    path = place(path)
    path = path / self.file_name if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
      partial.write_bytes(self._data)


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model whose ids 0 to 17 are SPECIAL_NAMES.

  Raises:
    UserError: the model is damaged, or one of these ids is another token.
  """

  file_name = "tokenizer.model"

  def __init__(self, model: bytes, *, origin: str = "tokenizer"):
    self._pieces = sentencepiece.SentencePieceProcessor()
    try:
      self._pieces.LoadFromSerializedProto(model)
      names = [self._pieces.IdToPiece(i) for i in range(len(SPECIAL_NAMES))]
    except (RuntimeError, IndexError) as error:
      raise UserError(f"{origin}: not a whole SentencePiece model") from error
    for i, (found, name) in enumerate(zip(names, SPECIAL_NAMES, strict=True)):
      if found != name:
        raise UserError(f"{origin}: id {i} is {found!r}, must be {name!r}")
    special = {name: i for i, name in enumerate(SPECIAL_NAMES)}
    super().__init__(model, special, self._pieces.GetPieceSize())
    self._space_bytes = [self._pieces.PieceToId(f"<0x{b:02X}>") for b in _SPACE.encode()]

  def encode(self, text: str) -> list[int]:
    first, *others = _whole(text).split(_SPACE)
    ids = self._pieces.EncodeAsIds(first)
    for other in others:
      ids += self._space_bytes + self._pieces.EncodeAsIds(other)
    return ids

  def _decode(self, ids: list[int]) -> str:
    return self._pieces.DecodeIds(ids)


class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json` in which ids 10 to 17 are those of FAMILY.

  Raises:
    UserError: the file is damaged, or one of these ids is another token.
  """

  file_name = "tokenizer.json"

  def __init__(self, data: bytes, *, origin: str = "tokenizer"):
    try:
      fields = json.loads(data)
      added = fields.get("added_tokens") or []
      for token in added:  # Otherwise text that spells a token of FAMILY would be encoded as that token.
        token["special"] = token["special"] or token["content"] in FAMILY
      self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
    except Exception as error:  # The Rust binding raises plain Exceptions.
      why = " ".join(str(error).split())[:200]
      raise UserError(f"{origin}: not a whole tokenizer.json ({why})") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True  # Encodes names of special tokens as plain text.

    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    _check_family(vocabulary, origin)
    special = {token["content"]: vocabulary[token["content"]] for token in added if token["special"]}
    super().__init__(data, {**FAMILY, **special}, max(vocabulary.values()) + 1)
    decoder = json.dumps(fields.get("decoder"))
    if "ByteFallback" in decoder:
      spelt = (vocabulary.get(f"<0x{byte:02X}>") for byte in range(256))
      self.byte_ids = frozenset(i for i in spelt if i is not None)
    # Matches the names of special tokens; `encode` splits text inside them.
    longest_first = sorted(self.special, key=len, reverse=True)
    self._named = re.compile("|".join(map(re.escape, longest_first)))

  def encode(self, text: str) -> list[int]:
    """The ids of plain text. The only special id may be `<unk>`, for a character that the vocabulary lacks."""
    text = _whole(text)
    ids = self._encode(text)
    if self.special_names.keys().isdisjoint(ids):
      return ids
    # The vocabulary holds a special token's name as a word: split each name after its first character.
    ends = [match.start() + 1 for match in self._named.finditer(text)]
    parts = zip([0, *ends], [*ends, len(text)], strict=True)
    return [i for start, end in parts for i in self._encode(text[start:end])]

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)


TOKENIZERS = (HuggingFaceTokenizer, SentencePieceTokenizer)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer's file; in a folder that is `tokenizer.json`, or else `tokenizer.model`.

  Raises:
    UserError: there is no such file, it is damaged, or its special tokens have other ids.
  """
  path = place(path)
  if path.is_dir():
    found = [path / kind.file_name for kind in TOKENIZERS if (path / kind.file_name).exists()]
    if not found:
      names = " or ".join(kind.file_name for kind in TOKENIZERS)
      raise UserError(f"tokenizer {path}: the folder has no {names}")
    path = found[0]
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"tokenizer {path}: {error.strerror or error}") from error
  kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
  return kind(data, origin=f"tokenizer {path}")


_SETTINGS: dict[str, Any] = {  # Of SentencePiece's trainer, beside the corpus and the sizes.
  "model_type": "bpe",
  "hard_vocab_limit": False,
  "byte_fallback": True,
  "character_coverage": 1.0,
  "normalization_rule_name": "identity",
  "add_dummy_prefix": False,
  "remove_extra_whitespaces": False,
  "split_digits": True,
  "max_sentence_length": 1 << 30,  # Bytes; SentencePiece skips longer lines.
  "unk_id": 0,
  "bos_id": 1,
  "eos_id": 2,
  "pad_id": -1,
  "unk_piece": SPECIAL_NAMES[0],
  "bos_piece": SPECIAL_NAMES[1],
  "eos_piece": SPECIAL_NAMES[2],
  "control_symbols": list(SPECIAL_NAMES[3:]),
  "minloglevel": 2,
  "num_threads": 1,
}


def train_sentencepiece(
  texts: Iterable[str], *, vocab_size: int, phrases: Iterable[str] = ()
) -> SentencePieceTokenizer:
  """Trains a byte-pair SentencePiece model; "\\n" and every phrase are one token each.

  Training is deterministic: the same texts in the same order give the same bytes.

  Args:
    texts: the corpus.
    vocab_size: the most pieces; a small corpus gives fewer, so read the result's `vocab_size`.
    phrases: plain texts that become one token each.

  Raises:
    UserError: a phrase is empty or special, there is no text, or `vocab_size` is too small.
  """
  phrases = list(dict.fromkeys(["\n", *phrases]))
  for phrase in phrases:
    if not phrase or _SPACE in phrase or phrase in SPECIAL_NAMES:
      raise UserError(f"tokenizer phrase {phrase!r}: must be plain text, not empty or special")
  lines = _without_rare(_lines(texts, phrases), max(ALPHABET, (vocab_size - 256 - len(phrases)) // 2))
  if not any(" " in line for line in lines):
    phrases.append(" ")  # SentencePiece would otherwise write a space as the bytes of U+2581, and read them as U+2581.
  floor = len(SPECIAL_NAMES) + len(phrases) + 256  # Special tokens, phrases, bytes.
  if vocab_size <= floor:
    raise UserError(
      f"tokenizer vocab_size={vocab_size}: special tokens, {len(phrases)} phrases and bytes alone take {floor}"
    )

  model = io.BytesIO()
  # SentencePiece matches phrases after it has replaced spaces by U+2581.
  symbols = [phrase.replace(" ", _SPACE) for phrase in phrases]
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, user_defined_symbols=symbols,
      **_SETTINGS,
    )  # fmt: skip
  except RuntimeError as error:
    raise UserError(f"tokenizer vocab_size={vocab_size}: {str(error).splitlines()[-1]}") from error
  return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str], phrases: Iterable[str]) -> list[str]:
  """The lines to train on, without the phrases, which are tokens already. Raises UserError if there are none."""
  cut = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))))
  lines = (part for text in texts for part in cut.split(text.replace(_SPACE, "")))
  lines = [line.encode("utf-8", "replace").decode() for line in lines if line.strip()]
  if not lines:
    raise UserError("tokenizer: no text to learn from")
  return lines


ALPHABET = 128  # Characters that a vocabulary must have room for.


def _without_rare(lines: list[str], most: int) -> list[str]:
  """The lines, cut at all but their `most` commonest characters.

  SentencePiece needs a piece for every character that it sees, and real text has thousands. Rare characters are
  written in bytes.
  """
  counts = collections.Counter(character for line in lines for character in line)
  if len(counts) <= most:
    return lines
  kept = {character for character, _ in counts.most_common(most)}
  cut = re.compile("|".join(map(re.escape, sorted(counts.keys() - kept))))
  return [part for line in lines for part in cut.split(line) if part.strip()]


def _whole(text: str) -> str:
  """The text with lone surrogates replaced by "?"; UTF-8 cannot hold them."""
  return text.encode("utf-8", "replace").decode("utf-8")


def _check_family(vocabulary: Mapping[str, int], origin: str) -> None:
  """Raises UserError that names every token of FAMILY that is missing or has another id."""
  missing = [name for name in FAMILY if name not in vocabulary]
  if missing:
    raise UserError(f"{origin}: lacks the special tokens {', '.join(map(repr, missing))}")
  moved = [f"{name!r} is id {vocabulary[name]}, must be {i}" for name, i in FAMILY.items() if vocabulary[name] != i]
  if moved:
    raise UserError(f"{origin}: {'; '.join(moved)}")
