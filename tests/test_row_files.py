"""Tests of the formats that conversations are read from, and of the order in which a blend gives them."""

import collections
import json
import pickle

import numpy as np
import pytest
from array_record.python import array_record_module

from nemocascade.data import blend as blend_lib
from nemocascade.data import reading
from nemocascade.data.blend import WINDOW, Blend, Source, counts
from nemocascade.data.row_files import first_rows, open_rows
from nemocascade.data.sources import write_demonstrations
from nemocascade.errors import UserError

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
ROWS = [
  {
    "messages": [
      {"role": "user", "content": f"é {i}"},
      {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [CALL]},
      {"role": "tool", "content": "1"},
      {"role": "assistant", "content": f"it is {i}"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"properties": {f"p{i}": {"type": "string"}}}}}],
  }
  for i in range(25)
]  # fmt: skip


def jsonl(folder, rows=ROWS):
  for part, start in enumerate(range(0, len(rows), 10)):
    lines = [json.dumps(row) for row in rows[start : start + 10]]
    (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n" * (part % 2))
  return str(folder / "*.jsonl")


def parquet(folder, rows=ROWS):
  import pyarrow
  import pyarrow.parquet

  for part, start in enumerate(range(0, len(rows), 10)):
    table = pyarrow.Table.from_pylist([row | {"uuid": str(start)} for row in rows[start : start + 10]])
    pyarrow.parquet.write_table(table, folder / f"part-{part}.parquet", row_group_size=4)
  return str(folder)


def array_record(folder, rows=ROWS):
  writer = array_record_module.ArrayRecordWriter(str(folder / "rows.array_record-00000-of-00001"), "group_size:1")
  for row in rows:
    writer.write(json.dumps(row).encode())
  writer.close()
  return str(folder)


def without_nulls(value):
  if isinstance(value, dict):
    return {key: without_nulls(part) for key, part in value.items() if part is not None}
  return [without_nulls(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("make", [jsonl, parquet, array_record])
def test_rows_are_read_by_number_also_by_a_pickled_copy(make, tmp_path):
  (tmp_path / "data").mkdir()
  path = make(tmp_path / "data")
  rows = open_rows(path, tmp_path / "index")
  assert len(rows) == 25
  read = [rows[i] for i in (3, 24, 0, 11, 11)]
  assert without_nulls(read) == without_nulls([ROWS[i] for i in (3, 24, 0, 11, 11)])
  copy = pickle.loads(pickle.dumps(rows))
  assert copy[17] == rows[17] and copy.identity() == rows.identity()
  shown = [row for _, row in first_rows(path, 12)]
  assert without_nulls(shown) == without_nulls(ROWS[:12])


def test_fields_that_parquet_adds_to_an_object_are_left_out(tmp_path):
  """The schema of a file has the parameters of all its tools."""
  rows = open_rows(parquet(tmp_path), tmp_path / "index")
  assert list(rows[7]["tools"][0]["function"]["parameters"]["properties"]) == ["p7"]


@pytest.mark.parametrize("make", [jsonl, parquet, array_record])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_cut_short_is_a_failure_of_the_run_and_no_bad_row(tmp_path, make, workers):
  (tmp_path / "rows").mkdir()
  rows = open_rows(make(tmp_path / "rows"), tmp_path)
  file = rows.files[-1]
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  reader = reading.start(reading.Reader((rows,), None, 64, "drop"), workers)
  try:
    with pytest.raises(OSError, match="the file was changed while the run reads it") as error:  # Exit code 1.
      list(reader.read([(0, len(rows) - 1)]))
  finally:
    reader.close()
  assert error.value.filename == str(file)


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_lines_are_found_wherever_blocks_end(tmp_path, monkeypatch, block):
  monkeypatch.setattr("nemocascade.data.row_files._BLOCK", block)
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'\n{"a": 1}\r\n\r\n{"a": "\xe2\x80\xa8"}\n\n\nnot json\n[1]\n{"a": 5}')
  rows = open_rows(str(path), tmp_path)
  assert [rows[i] for i in (0, 1, 4)] == [{"a": 1}, {"a": "\u2028"}, {"a": 5}]
  assert [rows.place(i) for i in range(5)] == [f"{path}, line {line}" for line in (2, 4, 7, 8, 9)]
  for place, complaint in ((2, "not JSON"), (3, "must be an object, is list")):
    with pytest.raises(UserError, match=complaint):
      rows[place]
  assert [place for place, _ in first_rows(str(path), 9)] == [rows.place(i) for i in range(5)]


def test_a_file_that_has_changed_is_indexed_again(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"a": 1}\n')
  assert len(open_rows(str(path), tmp_path)) == 1
  path.write_text('{"a": 1}\n{"a": 2}\n')
  assert open_rows(str(path), tmp_path)[1] == {"a": 2}


def test_places_name_the_file_and_the_row_in_it(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  assert open_rows(jsonl(tmp_path / "a"), tmp_path).place(12).endswith("part-1.jsonl, line 3")
  assert open_rows(parquet(tmp_path / "b"), tmp_path).place(12).endswith("part-1.parquet, row 2")
  assert open_rows(parquet(tmp_path / "b"), tmp_path).place(9).endswith("part-0.parquet, row 9")


def tfds_dataset(data_dir):
  """Written by TFDS alone: messages are a sequence of dicts."""
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {"messages": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})}
  )
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="chats", version=tfds.core.Version("1.0.0"), data_dir=str(data_dir / "chats" / "1.0.0"), module_name=""
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  (data_dir / "chats" / "1.0.0").mkdir(parents=True)
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4, file_format="array_record")
  writer.initialize_splits(["train"])
  said = lambda i: [{"role": "user", "content": f"é {i}"}, {"role": "assistant", "content": "y"}]  # noqa: E731
  writer.add_examples({"train": [{"messages": said(i)} for i in range(9)]})
  writer.close_all()
  return said


def test_a_dataset_that_tfds_wrote_is_read(tmp_path):
  said = tfds_dataset(tmp_path)
  rows = open_rows(str(tmp_path), tmp_path / "index")
  assert len(rows) == 9 and rows[7]["messages"] == said(7)
  assert pickle.loads(pickle.dumps(rows))[3]["messages"] == said(3)


def test_a_dataset_in_tfrecord_is_refused(tmp_path):
  """TFDS writes tfrecord with TensorFlow only, so the dataset's description is changed here."""
  tfds_dataset(tmp_path)
  info = tmp_path / "chats" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(UserError, match="is written as tfrecord; write it with file_format='array_record'"):
    open_rows(str(tmp_path), tmp_path / "index")


def no_messages(folder):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "id": [1]}), folder / "a.parquet")
  return "a.parquet"


@pytest.mark.parametrize(
  "make, complaint",
  [
    (lambda folder: "chats/*.jsonl", r"no file matches \(from .*\); give a path or a pattern"),
    (lambda folder: "", "the folder holds no file that ends in .jsonl"),
    (lambda folder: (folder / "a.csv").write_text("x") and "a.csv", "a.csv: must end in .jsonl"),
    (lambda folder: (folder / "a.jsonl.gz").write_text("x") and "a.jsonl.gz", "a.jsonl.gz: must end in .jsonl"),
    (lambda folder: (folder / "a.jsonl").write_text("\n\n") and "a.jsonl", "holds no rows"),
    (lambda folder: (folder / "a.parquet").write_text("x") and "a.parquet", "not a Parquet file"),
    (lambda folder: (folder / "a.array_record").write_text("x") and "a.array_record", "is no array_record file"),
    (no_messages, "a.parquet: has no column 'messages', only text, id"),
    (lambda folder: jsonl(folder) and parquet(folder) and "", "files of several kinds, .jsonl, .parquet"),
  ],
)
def test_paths_that_cannot_be_read_are_refused(tmp_path, make, complaint):
  with pytest.raises(UserError, match=complaint):
    open_rows(str(tmp_path / make(tmp_path)), tmp_path / "index")


class Numbers(collections.UserList):
  """Stands for rows of files: `count` rows, in groups of `group` if given."""

  def __init__(self, count, group=0):
    super().__init__(range(count))
    self.groups = np.minimum(np.arange(group, count + group, group), count) if group else None


def blend(*parts, seed=0):
  return Blend([Source(f"s{i}", rows, count) for i, (rows, count) in enumerate(parts)], seed)


def test_an_epoch_takes_the_count_of_each_source_and_repeats_only_what_it_must():
  made = blend((Numbers(3000), 3000), (Numbers(5000), 2000), (Numbers(7), 21), seed=3)
  epochs = [collections.Counter(made.items(epoch, 0, 1)) for epoch in range(5)]
  for epoch in epochs:
    assert collections.Counter(source for source, _ in epoch.elements()) == {0: 3000, 1: 2000, 2: 21}
    assert set(epoch) >= {(0, row) for row in range(3000)}
    assert all(epoch[2, row] == 3 for row in range(7))
  # In 5 epochs of 2000, each of the 5000 rows is taken twice.
  total = sum(epochs, collections.Counter())
  assert all(total[1, row] == 2 for row in range(5000))


def test_the_order_is_a_function_of_seed_epoch_and_position():
  parts = (Numbers(3 * WINDOW), 3 * WINDOW), (Numbers(9000, group=100), 9000)
  made, order = blend(*parts), list(blend(*parts).items(0, 0, 1))
  assert list(made.items(0, 5000, 7)) == order[5000::7]
  assert [list(made.items(0, lane, 4)) for lane in range(4)] == [order[lane::4] for lane in range(4)]
  assert list(made.items(1, 0, 1)) != order != list(blend(*parts, seed=1).items(0, 0, 1))


def test_sources_are_mixed_throughout_an_epoch_and_over_streams():
  made = blend((Numbers(20_000), 20_000), (Numbers(20_000), 20_000))
  order = np.array([source for source, _ in made.items(0, 0, 1)])
  for part in (*np.split(order, 8), *(order[lane::16] for lane in range(16))):
    assert 0.45 < part.mean() < 0.55


def test_rows_of_a_group_come_close_together_and_groups_in_any_order():
  (rows,) = [[row for _, row in blend((Numbers(20_000, group=500), 20_000)).items(0, 0, 1)]]
  assert sorted(rows) == list(range(20_000))
  groups = np.array(rows) // 500
  assert all(len(set(part)) <= 11 for part in np.split(groups, 5))
  assert groups.tolist() != sorted(groups)


def test_counts_follow_weights_until_the_first_source_would_repeat():
  sizes = {"a": 1000, "b": 300, "c": 50}
  assert counts(sizes, {"a": {"weight": 3}, "b": {"weight": 2}, "c": {"weight": 0.1}}) == {"a": 450, "b": 300, "c": 15}
  assert counts(sizes, {"a": {"count": 5000}, "b": {}, "c": {"count": 1}}) == {"a": 5000, "b": 300, "c": 1}
  # As exact as they are written: one of the sources ends with its last row, whatever floats round to.
  assert counts({"a": 804_624, "b": 60_871}, {"a": {"weight": 0.3}, "b": {"weight": 0.9}}) == {"a": 20_290, "b": 60_871}
  assert counts({"a": 7, "b": 3}, {"a": {"weight": 0.7}, "b": {"weight": 0.3}}) == {"a": 7, "b": 3}
  assert counts({"a": 7, "b": 9}, {"a": {"weight": 5e-324}, "b": {"weight": 1e-323}}) == {"a": 4, "b": 9}
  assert counts({"a": 7, "b": 9}, {"a": {"weight": 1e-300}, "b": {"weight": 1e300}}) == {"a": 1, "b": 9}


@pytest.mark.parametrize(
  "fields, complaint",
  [
    ({"a": {"weight": 1, "count": 2}, "b": {}}, "sources.a has a weight and a count; give one of them"),
    ({"a": {"weight": 1}, "b": {}}, "sources.b has no weight, and a has one"),
    ({"a": {"weight": 1}, "b": {"count": 3}}, "sources.b has no weight, and a has one"),
  ],
)
def test_weights_and_counts_that_contradict_each_other_are_refused(fields, complaint):
  with pytest.raises(UserError, match=complaint):
    blend_lib.counts({"a": 1, "b": 1}, fields)


def test_a_dataset_that_is_written_again_is_the_same_and_one_with_another_value_is_not(tmp_path):
  """The bytes of a record depend on the process: its map of features has no order."""

  def identity(name, last):
    examples = [{"messages": json.dumps([i]), "thinking": i % 2 == 0} for i in [*range(40), last]]
    write_demonstrations(examples, tmp_path / name, name="demonstrations")
    return open_rows(str(tmp_path / name), tmp_path).identity()

  assert identity("one", 7) == identity("two", 7)
  assert identity("one", 7) != identity("three", 8)
