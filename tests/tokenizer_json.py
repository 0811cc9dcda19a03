"""A small `tokenizer.json` of the model family's kind: byte-level BPE with its special tokens first."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemocascade.data.tokenizer import SPECIAL_NAMES

TEXTS = ["the cat sat on the mat, and 12 + 7 is 19", "system user assistant think\n"] * 20


@functools.cache
def make(size: int = 420) -> bytes:
  """Bytes of the file; ids 18 and 19 are reserved tokens, as in the published one."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[
      AddedToken(name, special=True, normalized=False) for name in (*SPECIAL_NAMES, "<SPECIAL_18>", "<SPECIAL_19>")
    ],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  return tokenizer.to_str().encode()


def changed(change) -> bytes:
  """Bytes of the file after `change(fields)`."""
  fields = json.loads(make())
  change(fields)
  return json.dumps(fields).encode()
