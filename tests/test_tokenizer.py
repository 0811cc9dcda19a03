"""Tests of the tokenizer: lossless, deterministic, and text never encodes to special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data.tokenizer import (
  EOS,
  IM_END,
  IM_START,
  PAD,
  SPECIAL_NAMES,
  THINK,
  THINK_END,
  TOOL_CALL,
  TOOL_CALL_END,
  TOOL_RESPONSE,
  TOOL_RESPONSE_END,
  load_tokenizer,
  train_sentencepiece,
)
from nemocascade.errors import UserError

TEXTS = ["the sum of 12 and 7 is 19 ,\nso we check it", "the cat sat on the mat"] * 20
PHRASES = (
  "user\n",
  "Answer with one word .",
  ' say "yes", or\n\tno,',
  "</x>\n",
  "x" * 700 + " end",
)


TOKENIZER = train_sentencepiece(TEXTS, vocab_size=400, phrases=PHRASES)


@pytest.fixture
def tokenizer():
  return TOKENIZER


def test_special_ids_are_those_of_the_family(tokenizer):
  names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
  names += ["<tool_response>", "</tool_response>", "</s>", "<unk>", "[INST]", "[TOOL_CALLS]"]
  ids = [IM_START, IM_END, THINK, THINK_END, TOOL_CALL, TOOL_CALL_END]
  ids += [TOOL_RESPONSE, TOOL_RESPONSE_END, EOS, PAD, 3, 9]
  assert ids == [10, 11, 12, 13, 14, 15, 16, 17, 2, 0, 3, 9]
  assert [tokenizer.special[name] for name in names] == ids
  assert len(tokenizer.special) == 18


@pytest.mark.parametrize("phrase", ["\n", *PHRASES])
def test_a_phrase_is_one_token_wherever_it_stands(tokenizer, phrase):
  (token,) = tokenizer.encode(phrase)
  assert tokenizer.decode([token]) == phrase
  assert token in tokenizer.encode(f"the cat{phrase}the mat")


def test_digits_are_tokens_of_their_own(tokenizer):
  assert [tokenizer.decode([i]) for i in tokenizer.encode("12719")] == list("12719")


def test_frequent_words_are_one_token(tokenizer):
  assert len(tokenizer.encode("the cat sat on the mat")) == 6


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "  two  spaces  ",
    "\t\0\r\n",
    "\u2581 is not a space",
    "a\u2581\u2581",
    "e\u0301 \ufb01",
  ]
  + ["\ufeff\u200b\ufffd", "\U0001f600日本", "<0x41>", *SPECIAL_NAMES],
)
def test_odd_text_survives_and_spells_no_special_token(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(i >= len(SPECIAL_NAMES) for i in ids)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_unicode_text_survives(text):
  assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_space_survives_if_the_corpus_has_none_outside_phrases():
  tokenizer = train_sentencepiece(["12+7=19"] * 20, vocab_size=400, phrases=("it is",))
  text = " it is a  b "
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_replaced_not_fatal(tokenizer):
  assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_special_and_foreign_ids_decode(tokenizer):
  cat = tokenizer.encode("cat")
  assert tokenizer.decode([10, *cat, 11, 0]) == "<|im_start|>cat<|im_end|><unk>"
  assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"


def test_training_is_deterministic(tokenizer):
  again = train_sentencepiece(iter(TEXTS), vocab_size=400, phrases=PHRASES)
  assert again.fingerprint == tokenizer.fingerprint
  other = train_sentencepiece(TEXTS + ["a dog ran"] * 9, vocab_size=400, phrases=PHRASES)
  assert other.fingerprint != tokenizer.fingerprint


def test_a_small_corpus_gives_a_smaller_vocabulary(tokenizer):
  assert train_sentencepiece(["a b"], vocab_size=4000).vocab_size < 400


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
  for place in (tmp_path / "new" / "words.model", tmp_path):
    tokenizer.save(place)
    loaded = load_tokenizer(place)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the cat") == tokenizer.encode("the cat")
  assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "tokenizer.model", "words.model"]


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_damaged_file_is_named(tokenizer, tmp_path, cut):
  path = tmp_path / "words.model"
  tokenizer.save(path)
  path.write_bytes(path.read_bytes()[:cut])
  with pytest.raises(UserError, match="words.model"):
    load_tokenizer(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"none\.model.*No such file"):
    load_tokenizer(tmp_path / "none.model")


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
  import sentencepiece

  prefix = str(tmp_path / "other")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=30, minloglevel=2
  )
  with pytest.raises(UserError, match=r"other\.model: id 3 is"):
    load_tokenizer(prefix + ".model")


@pytest.mark.parametrize("phrase", ["", "<think>", "\u2581a"])
def test_phrases_that_cannot_be_are_refused(phrase):
  with pytest.raises(UserError, match="phrase"):
    train_sentencepiece(TEXTS, vocab_size=400, phrases=[phrase])


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(UserError, match="vocab_size=100.*275"):
    train_sentencepiece(TEXTS, vocab_size=100)
  with pytest.raises(UserError, match="vocab_size=280"):
    train_sentencepiece(TEXTS, vocab_size=280)


def test_nothing_to_learn_from_is_refused():
  with pytest.raises(UserError, match="no text"):
    train_sentencepiece(["", "\n"], vocab_size=400)
