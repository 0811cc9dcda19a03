"""Tests of `tokenizer.json` files: the tests of any tokenizer, and agreement with the `tokenizers` library."""

import json

import pytest
import tokenizer_json
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data import chat
from nemocascade.data.tokenizer import (
  FAMILY,
  SPECIAL_NAMES,
  HuggingFaceTokenizer,
  load_tokenizer,
  train_sentencepiece,
)
from nemocascade.errors import UserError

TOKENIZER = HuggingFaceTokenizer(tokenizer_json.make())
PEER = tokenizers.Tokenizer.from_str(tokenizer_json.make().decode())


def test_special_ids_are_those_of_the_file():
  assert {name: TOKENIZER.special[name] for name in FAMILY} == FAMILY
  assert TOKENIZER.special["<SPECIAL_19>"] == 19 and len(TOKENIZER.special) == 20
  assert TOKENIZER.vocab_size == PEER.get_vocab_size()


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: not any(name in text for name in TOKENIZER.special)))
def test_plain_text_is_encoded_as_tokenizers_does_and_survives(text):
  ids = TOKENIZER.encode(text)
  assert ids == PEER.encode(text, add_special_tokens=False).ids
  assert TOKENIZER.decode(ids) == text == PEER.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_NAMES, "<SPECIAL_18>", "the cat", " ", "<", "é"])))
def test_text_spells_no_special_token(parts):
  text = "".join(parts)
  ids = TOKENIZER.encode(text)
  assert TOKENIZER.special_names.keys().isdisjoint(ids)
  assert TOKENIZER.decode(ids) == text


def test_not_even_where_the_file_does_not_call_the_token_special():
  def loosen(fields):
    for token in fields["added_tokens"]:
      token["special"] = token["special"] and token["content"] not in FAMILY

  loose = HuggingFaceTokenizer(tokenizer_json.changed(loosen))
  assert loose.encode("<think>") == TOKENIZER.encode("<think>")
  assert {name: loose.special[name] for name in FAMILY} == FAMILY


def test_not_even_where_its_name_is_a_word_of_the_vocabulary():
  def whole_words(fields):
    fields["model"]["ignore_merges"] = True
    fields["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "the"}, "behavior": "Isolated", "invert": False}

  words = HuggingFaceTokenizer(tokenizer_json.changed(whole_words))
  ids = words.encode("<think>")
  assert words.special["<think>"] not in ids and words.decode(ids) == "<think>"


def test_special_and_foreign_ids_decode():
  cat = TOKENIZER.encode(" cat")
  assert TOKENIZER.decode([10, *cat, 11, 18]) == "<|im_start|> cat<|im_end|><SPECIAL_18>"
  assert TOKENIZER.decode([TOKENIZER.vocab_size, -1]) == "\ufffd\ufffd"


def test_half_a_surrogate_pair_is_replaced_not_fatal():
  assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


def test_truncation_and_padding_of_the_file_are_not_ours():
  def cut(fields):
    fields["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    fields["padding"] = {
      "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
      "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip

  assert HuggingFaceTokenizer(tokenizer_json.changed(cut)).encode("the cat sat") == TOKENIZER.encode("the cat sat")


def test_saved_file_is_the_same_byte_for_byte(tmp_path):
  TOKENIZER.save(tmp_path)
  assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer_json.make()
  for place in (tmp_path, tmp_path / "tokenizer.json"):
    assert load_tokenizer(place).fingerprint == TOKENIZER.fingerprint


def test_a_folder_gives_its_tokenizer_json_before_its_model(tmp_path):
  train_sentencepiece(["a b"], vocab_size=300).save(tmp_path)
  assert load_tokenizer(tmp_path).file_name == "tokenizer.model"
  TOKENIZER.save(tmp_path)
  assert load_tokenizer(tmp_path).file_name == "tokenizer.json"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
  with pytest.raises(UserError, match=f"{tmp_path}.*no tokenizer.json or tokenizer.model"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff"])
def test_damaged_file_is_named_in_one_line(tmp_path, data):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(data)
  with pytest.raises(UserError, match=r"tokenizer\.json: not a whole tokenizer") as caught:
    load_tokenizer(path)
  assert "\n" not in str(caught.value)


def rename(fields, names):
  text = json.dumps(fields)
  for old, new in names.items():
    text = text.replace(json.dumps(old), json.dumps(new))
  fields.clear()
  fields.update(json.loads(text))


def test_all_missing_tokens_of_the_family_are_named():
  data = tokenizer_json.changed(lambda f: rename(f, {"<think>": "<a>", "</tool_call>": "<b>"}))
  with pytest.raises(UserError, match="lacks the special tokens '<think>', '</tool_call>'$"):
    HuggingFaceTokenizer(data)


def test_tokens_of_the_family_with_other_ids_are_named():
  swap = {"<think>": "<c>", "</think>": "<think>", "<c>": "</think>"}
  data = tokenizer_json.changed(lambda f: rename(f, swap))
  with pytest.raises(UserError, match="'<think>' is id 13, must be 12; '</think>' is id 12, must"):
    HuggingFaceTokenizer(data)


def test_a_conversation_is_rendered_with_it():
  messages = [
    {"role": "user", "content": "the <think> cat"},
    {"role": "assistant", "content": "sat", "reasoning_content": "on the mat"},
  ]
  pieces = chat.render(messages)
  tokens, loss_mask = chat.tokenize(pieces, TOKENIZER)
  assert TOKENIZER.decode(tokens) == chat.text_of(pieces)
  said = [token for token, learned in zip(tokens, loss_mask, strict=True) if learned]
  assert chat.parse(said, TOKENIZER, thinking=True) == chat.Turn("on the mat", "sat", finished=True)
