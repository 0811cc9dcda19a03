"""Times SFT's input: rendering and tokenizing a core against the tokenizer alone, and packing against Grain's.

Conversations are made of the source text of Python's standard library, on which the tokenizer is trained too.
"""

import json
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from nemocascade.data.blend import Blend, Source
from nemocascade.data.documents import Document
from nemocascade.data.reading import Read, Reader
from nemocascade.data.row_files import RowFiles, open_rows
from nemocascade.data.stream import Settings, Stream
from nemocascade.data.tokenizer import SPECIAL_NAMES, HuggingFaceTokenizer

CONVERSATIONS, MEAN_TOKENS = 512, 2048
VOCABULARY = 32_768
REPEATS = 3  # Runs of each side, in turns; the best of each is compared.
# Lengths of documents in packing: lognormal, with the mean of the report's blend (arXiv 2603.19220: 33,000 steps of
# 64 rows of 256K tokens are about 1.5 epochs of 26.6M conversations).
MEAN, SIGMA = 14_000, 1.0
PACKED = ((262_144, 2**21), (16_384, 2**21))  # (tokens of a row, tokens that a stream looks ahead)
PACKED_TOKENS = 2**28


def cases() -> Iterator[dict]:
  """Yields a line for rendering and tokenizing, and for each row length one for the speed and one for the fill."""
  yield _tokenizing()
  for T, look_ahead in PACKED:
    yield from _packing(T, look_ahead)


def _line(case: str, ours: float, peer: float, peer_name: str, unit: str) -> dict:
  return dict(case=case, ours=ours, peer=peer, peer_name=peer_name, unit=unit, ratio=ours / peer)


def _tokenizing() -> dict:
  text = corpus()
  tokenizer = train(text)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "chats.jsonl"
    write_conversations(path, text, CONVERSATIONS, MEAN_TOKENS)
    rows = open_rows(str(path), Path(folder))
    reader = Reader((rows,), tokenizer, 2**20, "drop")
    items = [(0, i) for i in range(len(rows))]
    texts = [tokenizer.decode(read.documents[0].tokens_T) for read in reader(items)]
    tokens = sum(len(read.documents[0].tokens_T) for read in reader(items))
    alone = tokenizer.encode
    best = {"ours": 0.0, "peer": 0.0}
    for _ in range(REPEATS):
      best["peer"] = max(best["peer"], tokens / _seconds(lambda: [alone(one) for one in texts]))
      best["ours"] = max(best["ours"], tokens / _seconds(lambda: reader(items)))
  return _line("render_and_tokenize", best["ours"], best["peer"], "the tokenizer alone", "tokens/s a core")


def corpus(limit: int = 8_000_000) -> str:
  """The source text of Python's standard library, at most `limit` characters."""
  files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
  return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:limit]


def train(text: str, size: int = VOCABULARY) -> HuggingFaceTokenizer:
  """A byte-level BPE tokenizer of the model family's kind."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL_NAMES]
  trainer = trainers.BpeTrainer(
    vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
  return HuggingFaceTokenizer(tokenizer.to_str().encode())


def write_conversations(path: Path, text: str, count: int, tokens: int) -> None:
  """Writes conversations of about that many tokens: a question, and an answer with thoughts."""
  size = 3 * tokens  # This text has about 3 characters a token.
  rng = np.random.default_rng(0)
  with path.open("w", encoding="utf-8") as file:
    for start in rng.integers(0, len(text) - size, count):
      part = text[start : start + size]
      messages = [
        {"role": "user", "content": part[: size // 8]},
        {"role": "assistant", "reasoning_content": part[size // 8 : size // 2], "content": part[size // 2 :]},
      ]
      file.write(json.dumps({"messages": messages, "tools": None}) + "\n")


class _Numbers(RowFiles):
  """Stands for files of `count` rows."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count


def documents_of(lengths: np.ndarray, T: int) -> list[Document]:
  """Documents of these lengths; longer ones than T are split."""
  tokens_T, mask_T = np.ones(T, np.int32), np.ones(T, bool)
  cut = [min(T, length - start) for length in lengths for start in range(0, length, T)]
  return [Document(tokens_T[:length], mask_T[:length]) for length in cut]


def _packing(T: int, look_ahead: int) -> Iterator[dict]:
  mu = np.log(MEAN) - SIGMA**2 / 2
  lengths = np.random.default_rng(0).lognormal(mu, SIGMA, PACKED_TOKENS // MEAN).astype(int) + 1
  documents = documents_of(lengths, T)
  total = sum(len(document.tokens_T) for document in documents)

  def ours() -> int:
    blend = Blend([Source("all", _Numbers(len(documents)), len(documents))], seed=0)
    read = lambda items: (Read((documents[row],)) for _, row in items)
    stream = Stream(blend, read, Settings(T, look_ahead, 0, 0.0))
    rows, tokens_T = 0, np.zeros(T, np.int32)
    while stream.epoch == 0:
      start = 0
      for document in next(stream):
        tokens_T[start : start + len(document.tokens_T)] = document.tokens_T
        start += len(document.tokens_T)
      rows += 1
    return rows

  def peer() -> int:
    elements = grain.MapDataset.source([{"tokens": d.tokens_T} for d in documents]).seed(0).shuffle()
    packed = BestFitPackIterDataset(
      elements.to_iter_dataset(grain.ReadOptions(num_threads=0)),
      length_struct={"tokens": T}, num_packing_bins=look_ahead // T, shuffle_bins=True,
    )  # fmt: skip
    return sum(1 for _ in packed)

  speeds, rows = {}, {}
  for _ in range(REPEATS):
    for name, pack in (("peer", peer), ("ours", ours)):
      seconds, rows[name] = _timed(pack)
      speeds[name] = max(speeds.get(name, 0.0), total / seconds)
  fill = {name: total / (count * T) for name, count in rows.items()}
  name = f"grain BestFitPackIterDataset, {look_ahead // T} bins"
  yield _line(f"pack_{T}", speeds["ours"], speeds["peer"], name, "tokens/s")
  yield _line(f"fill_{T}", fill["ours"], fill["peer"], name, "share")


def _timed(act: Callable[[], int]) -> tuple[float, int]:
  began = time.perf_counter()
  result = act()
  return time.perf_counter() - began, result


def _seconds(act: Callable[[], Iterable]) -> float:
  return _timed(lambda: len(list(act())))[0]
