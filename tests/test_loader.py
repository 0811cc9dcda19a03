"""Tests of the data loader: whole epochs, exact resumption, and hosts that partition the data."""

import itertools
import json

import numpy as np
import pytest

from nemocascade.data import chat
from nemocascade.data.blend import Blend, Source
from nemocascade.data.documents import Document, fitted, to_documents
from nemocascade.data.loader import Loader
from nemocascade.data.row_files import open_rows
from nemocascade.data.tokenizer import train_sentencepiece
from nemocascade.errors import StageStopped, UserError

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
DOCUMENTS = [document for one in EXAMPLES for document in to_documents(one, TOKENIZER)]
T, WHOLE, SMALL = 96, 100_000, 2 * 96  # look_ahead: the whole epoch, or the least.


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  return open_rows(str(write(folder / "rows.jsonl", EXAMPLES)), folder)


def blend_of(rows, seed=0):
  return Blend([Source("all", rows, len(rows))], seed)


@pytest.fixture
def loader(opened):
  made = []

  def make(rows=opened, **settings):
    settings = {"T": T, "B": 4, "seed": 0, "look_ahead": WHOLE, **settings}
    made.append(Loader(blend_of(rows, settings["seed"]), TOKENIZER, **settings))
    return made[-1]

  yield make
  for one in made:
    one.close()


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


def documents_in(batch):
  """(tokens, loss mask) of each document of a batch, as bytes."""
  found = []
  for tokens_T, ids_T, mask_T in zip(batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT, strict=True):
    assert ids_T.max() == len(set(ids_T) - {0})
    assert not tokens_T[ids_T == 0].any() and not mask_T[ids_T == 0].any()
    for segment in range(1, ids_T.max() + 1):
      found.append((tokens_T[ids_T == segment].tobytes(), mask_T[ids_T == segment].tobytes()))
  return found


EXPECTED = sorted((d.tokens_T.tobytes(), d.loss_mask_T.tobytes()) for d in DOCUMENTS)


def epoch_of(batches):
  """The documents of the first epoch of a loader with B=1 and one stream."""
  found = []
  while batches.get_state()["streams"]["0"]["start"]["epoch"] == 0:
    found += documents_in(next(batches))
  return found


def test_messages_may_be_json():
  as_json = {key: json.dumps(value) for key, value in EXAMPLES[5].items()}
  (document,) = to_documents(as_json, TOKENIZER)
  np.testing.assert_array_equal(document.tokens_T, DOCUMENTS[5].tokens_T)


def test_a_document_learns_its_assistant_only():
  tokens, loss_mask = DOCUMENTS[8].tokens_T, DOCUMENTS[8].loss_mask_T
  assert TOKENIZER.decode(tokens[loss_mask]) == "step 1 step 1\n</think>\n8<|im_end|>"
  assert TOKENIZER.decode(tokens[~loss_mask]).endswith("<|im_start|>assistant\n<think>\n\n")


@pytest.mark.parametrize("look_ahead", [SMALL, 500, WHOLE])
def test_an_epoch_holds_every_document_once_as_it_is(loader, look_ahead):
  assert sorted(epoch_of(loader(B=1, look_ahead=look_ahead))) == EXPECTED


def test_several_streams_hold_every_document_once(loader):
  batches, found = loader(B=6, streams=3, look_ahead=3 * SMALL), {str(i): [] for i in range(3)}
  for _ in range(60):
    epochs = {name: state["start"]["epoch"] for name, state in batches.get_state()["streams"].items()}
    batch = next(batches)
    for name, epoch in epochs.items():
      for row in range(2 * int(name), 2 * int(name) + 2):
        part = type(batch)(*(getattr(batch, f)[row : row + 1] for f in ("tokens_BT", "segment_ids_BT", "loss_mask_BT")))
        found[name] += [(epoch, document) for document in documents_in(part)]
  # A batch may end an epoch of a stream and begin the next, so only the streams' first documents are compared.
  shares = {name: [document for epoch, document in part][:20] for name, part in found.items()}
  assert sorted(document for part in shares.values() for document in part) == EXPECTED


def test_shapes_and_dtypes(loader):
  batch = next(loader())
  arrays = batch.tokens_BT, batch.segment_ids_BT, batch.loss_mask_BT
  assert [(array.shape, array.dtype) for array in arrays] == [((4, T), dtype) for dtype in (np.int32, np.int32, bool)]


def test_epochs_differ_in_their_order(loader):
  batches = loader(B=1)
  count = _rows_of_an_epoch(loader(B=1))
  epochs = [rows_of(take(batches, count)) for _ in range(3)]
  assert count > 10 and len(set(epochs[0])) == count
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def _rows_of_an_epoch(batches):
  count = 0
  while batches.get_state()["streams"]["0"]["start"]["epoch"] == 0:
    next(batches)
    count += 1
  return count


def test_rows_are_as_full_as_those_packed_all_together_but_for_the_last(loader):
  """The emptiest row of a block waits for the next one."""
  assert _rows_of_an_epoch(loader(B=1, look_ahead=4 * T)) <= _rows_of_an_epoch(loader(B=1)) + 2


def test_batches_are_a_function_of_the_seed(loader):
  assert_same(take(loader(), 9), take(loader(), 9))
  assert rows_of(take(loader(seed=1), 9)) != rows_of(take(loader(), 9))


@pytest.mark.parametrize("settings", [{}, {"look_ahead": SMALL}, {"look_ahead": 4 * SMALL, "streams": 2}], ids=str)
@pytest.mark.parametrize("before", [0, 1, 5, 13])
def test_resumed_batches_are_those_that_would_have_come(loader, settings, before):
  uninterrupted = loader(**settings)
  take(uninterrupted, before)
  saved = json.dumps(uninterrupted.get_state())
  expected = take(uninterrupted, 12)

  fresh = loader(**settings)
  fresh.set_state(json.loads(saved))
  assert_same(take(fresh, 12), expected)
  assert fresh.counts == uninterrupted.counts

  far = loader(**settings)
  take(far, 17)
  far.set_state(json.loads(saved))
  assert_same(take(far, 12), expected)


def test_processes_give_the_same_batches_and_resume(loader):
  settings = {"look_ahead": 4 * SMALL, "streams": 2}
  expected = take(loader(**settings), 9)
  batches = loader(**settings, workers=2)
  assert_same(take(batches, 4), expected[:4])
  state = batches.get_state()  # After the batches that were given, not those that were made ahead.
  assert_same(take(batches, 2), expected[4:6])
  batches.set_state(state)
  assert_same(take(batches, 5), expected[4:])


def test_taking_the_state_changes_nothing(loader):
  watched = loader(look_ahead=SMALL)
  seen = []
  for _ in range(9):
    seen += take(watched, 1)
    watched.get_state()
  assert_same(seen, take(loader(look_ahead=SMALL), 9))


def hosts(loader, own, streams):
  """Loaders of several hosts, each of which has some rows; all know the others' states."""
  made = []
  gather = lambda _: [one._state for one in made]  # noqa: E731
  made += [loader(own=rows, streams=streams, look_ahead=4 * SMALL, gather=gather) for rows in own]
  return made


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("own", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)]], ids=str)
def test_hosts_make_up_the_whole_and_do_not_overlap(loader, own, streams):
  parts = hosts(loader, own, streams)
  for whole in take(loader(streams=streams, look_ahead=4 * SMALL), 11):
    for rows, batch in zip(own, (next(part) for part in parts), strict=True):
      others = [row for row in range(4) if row not in rows]
      np.testing.assert_array_equal(batch.tokens_BT[list(rows)], whole.tokens_BT[list(rows)])
      np.testing.assert_array_equal(batch.loss_mask_BT[list(rows)], whole.loss_mask_BT[list(rows)])
      assert not batch.segment_ids_BT[others].any()


def test_a_host_runs_only_the_streams_of_its_rows(loader):
  first, second = hosts(loader, [(0, 1), (2, 3)], 2)
  assert list(first._streams) == [0] and list(second._streams) == [1]


def test_state_is_the_same_on_every_host_and_outlives_their_number(loader):
  one, two = loader(streams=2, look_ahead=4 * SMALL), hosts(loader, [(0, 1), (2, 3)], 2)
  for batches in (one, *two):
    take(batches, 7)
  assert one.get_state() == two[0].get_state() == two[1].get_state()
  four = hosts(loader, [(0,), (1,), (2,), (3,)], 2)
  for batches in four:
    batches.set_state(two[0].get_state())
  for expected in take(one, 9):
    for row, batch in enumerate([next(batches) for batches in four]):
      np.testing.assert_array_equal(batch.tokens_BT[row], expected.tokens_BT[row])


def test_state_of_other_data_or_settings_is_refused(loader, tmp_path):
  state = loader().get_state()
  fewer = open_rows(str(write(tmp_path / "rows.jsonl", EXAMPLES[:-1])), tmp_path)
  others = [loader(fewer)]
  others += [loader(**change) for change in ({"seed": 1}, {"B": 2}, {"T": T + 1}, {"streams": 2}, {"look_ahead": 999})]
  for other in others:
    with pytest.raises(UserError, match="sources: .* have changed since the checkpoint"):
      other.set_state(state)


def test_a_file_changed_at_one_place_is_other_data(loader, tmp_path):
  state = loader().get_state()
  changed = [json.loads(json.dumps(one)) for one in EXAMPLES]
  changed[30]["messages"][1]["content"] = "13"  # As long as before.
  with pytest.raises(UserError, match="sources: their files"):
    loader(open_rows(str(write(tmp_path / "rows.jsonl", changed)), tmp_path)).set_state(state)


def test_data_that_has_moved_goes_on(loader, tmp_path):
  expected = loader(look_ahead=SMALL)
  take(expected, 5)
  moved = loader(open_rows(str(write(tmp_path / "rows.jsonl", EXAMPLES)), tmp_path), look_ahead=SMALL)
  moved.set_state(expected.get_state())
  assert_same(take(moved, 5), take(expected, 5))


LONG = Document(np.arange(10, dtype=np.int32), np.arange(10) >= 5)


@pytest.mark.parametrize(
  "word, lengths, first_learned",
  [("split", [4, 4], [2, 1]), ("cut", [], []), ("drop", [], [])],
)
def test_long_documents_are_split_cut_or_dropped_and_counted(word, lengths, first_learned):
  """At T=4, the first part of LONG has no trained token, so it is left out."""
  short = Document(np.arange(4, dtype=np.int32), np.arange(4) >= 1)
  fit, longer = fitted([short, LONG], 4, word)
  assert longer == 1 and fit[0] is short
  assert [len(document.tokens_T) for document in fit[1:]] == lengths
  assert [int(document.loss_mask_T.argmax()) for document in fit[1:]] == first_learned


@pytest.mark.parametrize("T", [2, 3, 7, 8, 9, 10, 11])
def test_a_split_document_is_learned_once_and_whole(T):
  """Also the one token behind a row's end, as the <|im_end|> of a document of T + 1 tokens."""
  parts, _ = fitted([LONG], T, "split")
  learned = np.concatenate([part.tokens_T[part.loss_mask_T] for part in parts])
  assert learned.tolist() == LONG.tokens_T[LONG.loss_mask_T].tolist()
  assert all(len(part.tokens_T) <= T for part in parts)
  assert len(parts) == 1 or not any(part.loss_mask_T[0] for part in parts)


def test_a_cut_document_keeps_its_beginning():
  (document,), longer = fitted([LONG], 7, "cut")
  assert longer == 1 and document.tokens_T.tolist() == list(range(7)) and document.loss_mask_T.sum() == 2


def test_long_documents_are_counted_by_the_loader(loader):
  shortest = min(len(d.tokens_T) for d in DOCUMENTS)
  batches = loader(T=shortest, B=1)
  batch = next(batches)
  assert batches.counts.long == sum(len(d.tokens_T) > shortest for d in DOCUMENTS) > 0
  assert (batch.segment_ids_BT == 1).all()
  with pytest.raises(StageStopped, match="no document fits into a row of 3 tokens: 60 conversations were read"):
    next(loader(T=3))


BAD = {"messages": [{"role": "user", "content": "x"}]}


def test_bad_rows_are_skipped_named_and_counted(loader, tmp_path):
  rows = open_rows(str(write(tmp_path / "some.jsonl", [*EXAMPLES[:30], BAD, *EXAMPLES[30:]])), tmp_path)
  named = []
  batches = loader(rows, B=1, max_bad_share=0.05, on_bad=named.append)
  assert sorted(epoch_of(batches)) == EXPECTED
  assert (batches.counts.rows, batches.counts.bad) == (61, 1)
  assert named == [f"{tmp_path}/some.jsonl, line 31: has nothing to learn: no assistant turn"]


@pytest.mark.parametrize("look_ahead", [SMALL, WHOLE])
def test_too_many_bad_rows_stop_the_run(loader, tmp_path, look_ahead):
  rows = open_rows(str(write(tmp_path / "bad.jsonl", [BAD, *EXAMPLES[:9]] * 6)), tmp_path)
  with pytest.raises(
    StageStopped, match=r"conversations are bad, more than max_bad_share=0.05; such as .*bad.jsonl, line"
  ):
    take(loader(rows, max_bad_share=0.05, look_ahead=look_ahead), 40)


def test_an_error_in_a_process_is_raised_where_its_batch_would_be_given(loader, tmp_path):
  rows = open_rows(str(write(tmp_path / "bad.jsonl", [BAD] * 9)), tmp_path)
  with pytest.raises(StageStopped, match="9 of 9 conversations are bad"):
    next(loader(rows, workers=1))


@pytest.mark.parametrize(
  "settings, complaint",
  [
    ({"B": 3, "streams": 2}, "streams=2: must divide rows=3"),
    ({"B": 64, "streams": 64, "look_ahead": 10**6}, "streams=64: an epoch has only 60 conversations"),
    ({"look_ahead": 191}, "look_ahead=191: must be at least 192, 2 rows of row_tokens=96"),
    ({"long_documents": "dorp"}, "did you mean 'drop'"),
  ],
)
def test_settings_that_cannot_be_are_refused(loader, settings, complaint):
  with pytest.raises(UserError, match=complaint):
    loader(**settings)


user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
calls = said | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
tool = {"role": "tool", "content": "z"}


@pytest.mark.parametrize(
  "messages, complaint",
  [
    ([], "has no messages"),
    (None, "has no messages"),
    ("[{", "has messages or tools that are not JSON"),
    ([user], "has nothing to learn"),
    ([user, {"role": "usr", "content": "x"}], "unknown role of message 1"),
    ([tool, user, said], "roles out of order: message 0 is of a tool and must be after"),
    ({"role": "user"}, "messages must be a list of objects"),
    ([user, said, said], "roles out of order: message 2 is of the assistant and must be after"),
    ([user, tool, said], "roles out of order: message 1 is of a tool and must be after"),
    ([user, said, tool], "roles out of order: message 2 is of a tool and must be after"),
    ([{"role": "user", "content": None}, said], "message 0: a user message without content"),
  ],
)
def test_a_bad_conversation_is_refused_with_its_reason(messages, complaint):
  with pytest.raises(UserError, match=complaint):
    to_documents({"messages": messages}, TOKENIZER)


def test_fields_that_are_null_and_arguments_in_both_forms_are_read():
  null = {"reasoning_content": None, "tool_calls": None, "name": None}
  as_object = said | {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
  as_text = said | {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
  rows = [
    [{"role": "system", "content": None} | null, user | null, one, tool, said | null] for one in (as_object, as_text)
  ]
  first, second = (to_documents({"messages": row, "tools": None}, TOKENIZER) for row in rows)
  np.testing.assert_array_equal(first[0].tokens_T, second[0].tokens_T)


def test_thoughts_in_the_text_are_those_of_reasoning_content():
  inline = said | {"content": "<think>\nso\n</think>\ny"}
  beside = said | {"reasoning_content": "so"}
  first, second = (to_documents({"messages": [user, one]}, TOKENIZER)[0] for one in (inline, beside))
  np.testing.assert_array_equal(first.tokens_T, second.tokens_T)
  np.testing.assert_array_equal(first.loss_mask_T, second.loss_mask_T)
