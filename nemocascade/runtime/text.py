"""How a run turns text into tokens: its tokenizer, and rows of prompts with answers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from nemocascade.data import chat
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from nemocascade.domains.domain import Domain
from nemocascade.domains.row_files import FileRows
from nemocascade.domains.rows import prompt_messages, prompt_tools
from nemocascade.errors import UserError
from nemocascade.generated.generator import demonstrations
from nemocascade.runtime import conversations, loading
from nemocascade.runtime.domains import generators
from nemocascade.runtime.hosts import exchange, first_alone
from nemocascade.state_files import place
from nemocascade.store import hf


@dataclasses.dataclass(frozen=True)
class Text:
  """The tokenizer of a run.

  Attributes:
    tokenizer: None if the input of the model is tokens.
    unwritten: the file to write the tokenizer to, if it was trained in this process; else None.
  """

  tokenizer: Tokenizer | None
  unwritten: Path | None = None

  def write(self) -> "Text":
    """Writes a tokenizer that is not on disk yet. The result is read from the file, in every process."""
    if self.unwritten is None:
      return self
    first_alone(lambda: self.unwritten.exists() or self.tokenizer.save(self.unwritten), "tokenizer")
    return Text(load_tokenizer(self.unwritten))


def text_of(c: ConfigDict, workdir: Path, domains: Mapping[str, Domain]) -> Text:
  """The config's tokenizer; else the work directory's; else a new one, not yet written to disk.

  Without domains and sources there is no tokenizer.

  Args:
    domains: those that the run has built; a new tokenizer is trained on the prompts of their files too.
  """
  if not c.domains and not _with_sources(c):
    return Text(None)
  if c.tokenizer.path:
    return Text(load_tokenizer(c.tokenizer.path))
  path = place(workdir) / "tokenizer" / "tokenizer.model"
  there = exchange(path.exists(), "whether there is a tokenizer")[0]
  return Text(load_tokenizer(path)) if there else Text(_train(c, domains), path)


def _train(c: ConfigDict, domains: Mapping[str, Domain]) -> Tokenizer:
  texts, phrases = [], list(chat.PHRASES)
  for generator in generators(c).values():
    phrases += [phrase for phrase in generator.phrases if phrase not in phrases]
    for example in demonstrations(generator, c.seed, 0, c.tokenizer.conversations):
      pieces = chat.render(example["messages"], tools=example["tools"] or None, enable_thinking=example["thinking"])
      texts += [piece.text for piece in pieces if not piece.special]
  for section in _with_sources(c):
    texts += conversations.texts(section, c.tokenizer.conversations)
  for domain in domains.values():
    if isinstance(domain.rows, FileRows):
      for i in range(min(len(domain.rows.training), c.tokenizer.conversations)):
        row = domain.rows.in_file_order(i)
        pieces = chat.render(prompt_messages(row), tools=prompt_tools(row) or None)
        texts += [piece.text for piece in pieces if not piece.special]
  return train_sentencepiece(texts, vocab_size=c.tokenizer.vocab_size, phrases=tuple(phrases))


def _with_sources(c: ConfigDict) -> list[ConfigDict]:
  """The SFT stages of a config: itself, or those of its stages that have sources."""
  return [section for section in [c, *c.get("stages", {}).values()] if section.get("sources")]


def own_tokenizer(c: ConfigDict, stage_dir: Path, init_from: str) -> Tokenizer | None:
  """The tokenizer of a stage that runs outside a cascade: the config's, else that of `init_from`.

  None if a checkpoint of ours has none, or there is no `init_from`: the run then trains one.

  Raises:
    UserError: the config's tokenizer differs from that of `init_from`, or neither an hf:DIR nor the config has one.
  """
  if c.tokenizer.path:
    tokenizer = load_tokenizer(c.tokenizer.path)
    if init_from:
      loading.same_tokenizer("init_from", init_from, tokenizer)
    return tokenizer
  if not init_from:
    return None
  begun = stage_dir / "model"  # A resumed stage keeps its tokenizer, even if init_from has moved.
  if loading.has_tokenizer(begun):
    return load_tokenizer(begun)
  tokenizer = loading.tokenizer_beside(init_from, "init_from")
  if tokenizer is None and init_from.startswith(hf.PREFIX):
    raise UserError(f"init_from={init_from!r}: has no tokenizer; give --config.tokenizer.path=FOLDER")
  return tokenizer


def answer_rows(tokenizer: Tokenizer, prompts: list, answers: list[str], B: int, T: int):
  """(tokens_BT, segment_ids_BT), int32, of prompts with final answers; cut at T, unused rows padded.

  The judge reads the answer without its thoughts (Nemotron-Cascade 1, arXiv 2512.13607, section 4).
  """
  tokens_BT, segment_ids_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  segment_ids_BT[:, 0] = 1  # The reward is read at a row's last token, so an empty row needs one.
  for b, (messages, answer) in enumerate(zip(prompts, answers, strict=True)):
    pieces = chat.render([*messages, {"role": "assistant", "content": answer}], enable_thinking=False)
    tokens = chat.tokenize(pieces, tokenizer)[0][:T]
    tokens_BT[b, : len(tokens)], segment_ids_BT[b, : len(tokens)] = tokens, 1
  return tokens_BT, segment_ids_BT
