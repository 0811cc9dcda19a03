"""Tests of incremental detokenisation: text comes neither early nor late, and none is lost."""

import json

import pytest
import tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from nemocascade.data import detokenizer
from nemocascade.data.detokenizer import Detokenizer
from nemocascade.data.tokenizer import HuggingFaceTokenizer, train_sentencepiece


def byte_fallback() -> bytes:
  """A SentencePiece-style tokenizer.json: U+2581 for spaces, and single-byte tokens as fallback."""
  names = list(json.loads(tokenizer_json.make())["model"]["vocab"])[:20]
  names += [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abc")
  model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
  tokenizer = Tokenizer(model)
  tokenizer.normalizer = normalizers.Replace(" ", "▁")
  tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  return tokenizer.to_str().encode()


TOKENIZERS = {
  "SentencePiece": train_sentencepiece(["the cat sat on the mat"] * 9, vocab_size=330),
  "byte-level BPE": HuggingFaceTokenizer(tokenizer_json.make()),
  "byte fallback": HuggingFaceTokenizer(byte_fallback()),
}
each = pytest.mark.parametrize("kind", TOKENIZERS)


@pytest.fixture(autouse=True, scope="module", params=[1, detokenizer.LONGEST])
def longest(request):
  """Windows are shortened at once, or when they are as long as usual."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(detokenizer, "LONGEST", request.param)
    yield


def streamed(tokenizer, ids, sizes=()):
  text, parts, start = Detokenizer(tokenizer), [], 0
  for size in [*sizes, *[1] * len(ids)]:
    parts.append(text.add(ids[start : start + size]))
    start += size
  return parts, text.finish()


@each
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_joined_it_is_the_decoding_of_all_ids(kind, data):
  tokenizer = TOKENIZERS[kind]
  ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size)))
  parts, rest = streamed(tokenizer, ids, data.draw(st.lists(st.integers(0, 4))))
  assert "".join(parts) + rest == tokenizer.decode(ids)


@each
@settings(max_examples=150, deadline=None)
@given(
  st.text(alphabet=st.sampled_from("ab é日😀\n\u0301") | st.characters(codec="utf-8", exclude_characters="\ufffd"))
)
def test_no_part_shows_half_a_character(kind, text):
  tokenizer = TOKENIZERS[kind]
  parts, rest = streamed(tokenizer, tokenizer.encode(text))
  assert "".join(parts) + rest == text
  assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["SentencePiece", "byte-level BPE"])
def test_a_character_comes_with_its_last_byte(kind):
  tokenizer = TOKENIZERS[kind]
  ids = tokenizer.encode("a😀b")
  assert len(ids) == 6
  parts, rest = streamed(tokenizer, ids)
  assert parts == ["a", "", "", "", "😀", "b"] and rest == ""


def test_bytes_that_a_later_one_may_spoil_wait_for_their_end():
  """This decoder replaces a whole run of bytes by U+FFFD if any part of it is invalid, so the run must end first."""
  tokenizer = TOKENIZERS["byte fallback"]
  c3, a9, e2, a = (tokenizer._tokenizer.token_to_id(name) for name in ("<0xC3>", "<0xA9>", "<0xE2>", "a"))
  assert tokenizer.decode([c3, a9, a]) == "éa" and tokenizer.decode([c3, a9, e2, a]) == "���a"
  assert streamed(tokenizer, [c3, a9, a]) == (["", "", "éa"], "")
  assert streamed(tokenizer, [c3, a9, e2, a]) == (["", "", "", "���a"], "")


@each
def test_what_never_becomes_a_character_comes_at_the_end(kind):
  tokenizer = TOKENIZERS[kind]
  ids = tokenizer.encode("a日")[:-1]
  parts, rest = streamed(tokenizer, ids)
  assert "".join(parts) == "a" and set(rest) == {"\ufffd"}


class Counting:
  """Notes how many ids each call of a tokenizer decodes."""

  def __init__(self, tokenizer):
    self._tokenizer, self.seen = tokenizer, []
    self.byte_ids, self.special_names = tokenizer.byte_ids, tokenizer.special_names

  def decode(self, ids):
    self.seen.append(len(ids))
    return self._tokenizer.decode(ids)


@each
def test_the_work_of_an_id_does_not_grow_with_the_text(kind):
  """Only a bounded tail is decoded again: for 2000 ids, each `add` decodes at most 11 more than a window holds."""
  counting = Counting(TOKENIZERS[kind])
  streamed(counting, (TOKENIZERS[kind].encode("abc aé日") * 300)[:2000])
  assert max(counting.seen) <= detokenizer.LONGEST + 11


@each
def test_a_special_id_is_decoded_once(kind):
  counting = Counting(TOKENIZERS[kind])
  streamed(counting, [*counting.special_names] * 20)
  assert max(counting.seen) == 1
