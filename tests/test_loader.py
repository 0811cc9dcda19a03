"""Tests of the data loader: whole epochs, exact resumption, and shards that partition the data."""

import itertools
import json

import numpy as np
import pytest

from nemocascade.data import chat
from nemocascade.data.loader import Loader, to_documents, tokenize_all
from nemocascade.data.tokenizer import train_sentencepiece
from nemocascade.errors import UserError

TOKENIZER = train_sentencepiece(["sum of 1 2 is 3"] * 9, vocab_size=500, phrases=(*chat.PHRASES, "step "))


def example(i):
  thoughts = " ".join(["step 1"] * (i % 7 + 1))
  return {
    "messages": [
      {"role": "user", "content": f"sum of {i}"},
      {"role": "assistant", "reasoning_content": thoughts, "content": str(i)},
    ],
    "tools": [],
  }


EXAMPLES = [example(i) for i in range(60)]
DOCUMENTS = tokenize_all(EXAMPLES, TOKENIZER)
T = 96


def loader(**settings):
  return Loader(DOCUMENTS, **{"T": T, "B": 4, "seed": 0, **settings})


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for ours, theirs in zip(batches, others, strict=True):
    np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)
    np.testing.assert_array_equal(ours.segment_ids_BT, theirs.segment_ids_BT)
    np.testing.assert_array_equal(ours.loss_mask_BT, theirs.loss_mask_BT)


def rows_of(batches):
  return [row.tobytes() for batch in batches for row in batch.tokens_BT]


def test_messages_may_be_json():
  as_json = {key: json.dumps(value) for key, value in EXAMPLES[5].items()}
  (document,) = to_documents(as_json, TOKENIZER)
  np.testing.assert_array_equal(document.tokens_T, DOCUMENTS[5].tokens_T)


def test_a_document_learns_its_assistant_only():
  tokens, loss_mask = DOCUMENTS[8].tokens_T, DOCUMENTS[8].loss_mask_T
  assert TOKENIZER.decode(tokens[loss_mask]) == "step 1 step 1\n</think>\n8<|im_end|>"
  assert TOKENIZER.decode(tokens[~loss_mask]).endswith("<|im_start|>assistant\n<think>\n\n")


def test_batches_hold_the_documents_as_they_are():
  """Every document of an epoch appears once, unsplit, with its own mask and segment id."""
  found = []
  for batch in loader(B=1, epochs=1):
    for tokens_T, segment_ids_T, loss_mask_T in zip(
      batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT, strict=True
    ):
      assert segment_ids_T.max() == len(set(segment_ids_T) - {0})
      assert not tokens_T[segment_ids_T == 0].any() and not loss_mask_T[segment_ids_T == 0].any()
      for segment in range(1, segment_ids_T.max() + 1):
        place = segment_ids_T == segment
        found.append((tokens_T[place].tobytes(), loss_mask_T[place].tobytes()))
  expected = [(d.tokens_T.tobytes(), d.loss_mask_T.tobytes()) for d in DOCUMENTS]
  assert sorted(found) == sorted(expected)


def test_shapes_and_dtypes():
  batch = next(loader())
  for array, dtype in zip(
    (batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT),
    (np.int32, np.int32, np.bool_),
    strict=True,
  ):
    assert (array.shape, array.dtype) == ((4, T), dtype)


def test_an_epoch_is_every_row_once_and_epochs_differ_in_order():
  batches = loader(B=1)
  count = len(batches.rows)
  assert count > 10
  epochs = [rows_of(take(batches, count)) for _ in range(3)]
  assert len(set(epochs[0])) == count
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_are_a_function_of_the_seed():
  assert_same(take(loader(), 9), take(loader(), 9))
  assert rows_of(take(loader(seed=1), 9)) != rows_of(take(loader(), 9))


@pytest.mark.parametrize("before", [0, 1, 5, 13])
def test_resumed_batches_are_those_that_would_have_come(before):
  uninterrupted = loader()
  take(uninterrupted, before)
  saved = json.dumps(uninterrupted.get_state())
  expected = take(uninterrupted, 12)

  fresh = loader()
  fresh.set_state(json.loads(saved))
  assert_same(take(fresh, 12), expected)

  far = loader()
  take(far, 17)
  far.set_state(json.loads(saved))
  assert_same(take(far, 12), expected)


def test_taking_the_state_changes_nothing():
  watched = loader()
  seen = []
  for batch in take(watched, 1):
    seen.append(batch)
  for _ in range(8):
    watched.get_state()
    seen += take(watched, 1)
  assert_same(seen, take(loader(), 9))


@pytest.mark.parametrize("shard_count", [2, 4])
def test_shards_make_up_the_whole_and_do_not_overlap(shard_count):
  shards = [loader(shard_index=i, shard_count=shard_count) for i in range(shard_count)]
  for whole in take(loader(), 11):
    parts = [next(shard) for shard in shards]
    assert all(part.tokens_BT.shape == (4 // shard_count, T) for part in parts)
    assert sorted(rows_of(parts)) == sorted(rows_of([whole]))


def test_state_is_the_same_on_every_host_and_outlives_their_number():
  one = loader()
  two = [loader(shard_index=i, shard_count=2) for i in range(2)]
  for batches in (one, *two):
    take(batches, 7)
  assert one.get_state() == two[0].get_state() == two[1].get_state()
  resumed = [loader(shard_index=i, shard_count=2) for i in range(2)]
  for batches in resumed:
    batches.set_state(one.get_state())
  expected = next(one)
  assert sorted(rows_of([next(batches) for batches in resumed])) == sorted(rows_of([expected]))


def test_hosts_run_out_together():
  counts = [len(list(loader(epochs=1, shard_index=i, shard_count=2))) for i in range(2)]
  assert counts == [len(loader().rows) // 4] * 2
  assert len(list(loader(epochs=3))) == 3 * len(loader().rows) // 4


def test_state_of_other_data_or_settings_is_refused():
  state = loader().get_state()
  others = [
    Loader(DOCUMENTS[:-1], T=T, B=4, seed=0),
    *(loader(**change) for change in ({"seed": 1}, {"B": 2}, {"T": T + 1}, {"epochs": 9})),
  ]
  for other in others:
    with pytest.raises(UserError, match="state of the input pipeline"):
      other.set_state(state)


def test_overlong_documents_are_refused_or_counted():
  shortest = min(len(d.tokens_T) for d in DOCUMENTS)
  with pytest.raises(UserError, match=f"a row holds {shortest}"):
    loader(T=shortest)
  batches = loader(T=shortest, overlong="drop")
  assert batches.dropped == sum(len(d.tokens_T) > shortest for d in DOCUMENTS) > 0
  assert batches.fraction_filled == 1.0
  with pytest.raises(UserError, match="no document fits"):
    loader(T=3, overlong="drop")


@pytest.mark.parametrize(
  "settings, complaint",
  [
    ({"shard_index": 2, "shard_count": 2}, "shard_index=2: must be from 0 to 1"),
    ({"B": 3, "shard_count": 2}, "B=3 rows a batch: must be a multiple of shard_count=2"),
    ({"B": 0}, "B=0"),
    ({"B": 64, "epochs": 1}, "B=64 rows a batch, but 1 epochs have"),
    ({"overlong": "dorp"}, "did you mean 'drop'"),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, complaint):
  with pytest.raises(UserError, match=complaint):
    loader(**settings)


@pytest.mark.parametrize(
  "bad, complaint",
  [
    ({"messages": []}, "example 1: has no messages"),
    ({"messages": "[{"}, "example 1: has messages or tools that are not JSON"),
    ({"messages": [{"role": "user", "content": "x"}]}, "example 1: has nothing to learn"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "example 1: unknown role of message 0"),
    ({"messages": {"role": "user"}}, "example 1: messages must be a list of objects"),
  ],
)
def test_a_bad_example_is_named_by_its_number(bad, complaint):
  with pytest.raises(UserError, match=complaint):
    tokenize_all([EXAMPLES[0], bad], TOKENIZER)
