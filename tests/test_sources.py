"""Tests of data on disk: written examples are read back, and damage is reported with the file's name."""

import json

import pytest

from nemocascade.data.sources import read_demonstrations, read_jsonl, write_demonstrations
from nemocascade.errors import UserError

EXAMPLES = [
  {
    "messages": json.dumps([{"role": "user", "content": f"é {i}"}], ensure_ascii=False),
    "tools": "[]",
    "thinking": i % 3 == 0,
    "number": -i,
    "score": i / 4,
  }
  for i in range(50)
]
SHARD = "toy-train.array_record-00001"


@pytest.fixture
def directory(tmp_path):
  return write_demonstrations(EXAMPLES, tmp_path / "toy", name="toy", examples_per_shard=20)


def test_what_is_written_is_read_in_order_and_by_number(directory):
  source = read_demonstrations(directory)
  assert len(source) == 50
  assert list(source) == EXAMPLES
  assert source[33] == EXAMPLES[33]


def test_a_number_out_of_range_is_no_example(directory):
  source = read_demonstrations(directory)
  for place in (50, -1):
    with pytest.raises(IndexError):
      source[place]


def test_tfds_itself_reads_it(directory):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(directory)
  assert (builder.name, str(builder.version)) == ("toy", "1.0.0")
  source = builder.as_data_source(split="train")
  assert [int(example["number"]) for example in source] == [-i for i in range(50)]
  assert json.loads(source[7]["messages"]) == json.loads(EXAMPLES[7]["messages"])


def test_lists_become_json(tmp_path):
  messages = [{"role": "user", "content": "é"}]
  directory = write_demonstrations([{"messages": messages, "tools": []}], tmp_path / "d", name="d")
  (example,) = read_demonstrations(directory)
  assert json.loads(example["messages"]) == messages
  assert example["tools"] == "[]"


def test_examples_may_be_a_stream(tmp_path):
  directory = write_demonstrations(iter(EXAMPLES), tmp_path / "toy", name="toy")
  assert len(read_demonstrations(directory)) == 50


def test_a_dataset_is_replaced_whole_and_nothing_is_left_behind(directory):
  write_demonstrations(EXAMPLES[:3], directory, name="toy")
  assert list(read_demonstrations(directory)) == EXAMPLES[:3]
  assert [path.name for path in directory.parent.iterdir()] == ["toy"]


def test_a_write_that_fails_leaves_the_old_dataset(directory):
  def failing():
    yield from EXAMPLES[:5]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_demonstrations(failing(), directory, name="toy")
  assert len(read_demonstrations(directory)) == 50
  assert [path.name for path in directory.parent.iterdir()] == ["toy"]


def test_a_full_disk_is_one_line_with_the_place_and_leaves_nothing(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def full(*_):
    raise RuntimeError("write() failed: No space left on device; writing shard 0")

  monkeypatch.setattr(tfds.core.SequentialWriter, "add_examples", full)
  with pytest.raises(OSError, match=r"No space left on device: .* MB are free; make room") as error:
    write_demonstrations([{"messages": "x"}], tmp_path / "new", name="a")
  assert error.value.filename == str(tmp_path / "new") and not list(tmp_path.iterdir())


def test_a_place_with_other_files_is_not_overwritten(tmp_path):
  (tmp_path / "precious.txt").write_text("mine")
  with pytest.raises(UserError, match="exists and is no dataset"):
    write_demonstrations(EXAMPLES, tmp_path, name="toy")
  assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
  "example, complaint",
  [
    ({"a": 1, "b": "x"}, "field 'b' of example 1: is str, in the first absent"),
    ({}, "field 'a' of example 1: is absent, in the first int"),
    ({"a": True}, "field 'a' of example 1: is bool, in the first int"),
  ],
)
def test_examples_that_differ_in_kind_are_named(tmp_path, example, complaint):
  with pytest.raises(UserError, match=complaint):
    write_demonstrations([{"a": 1}, example], tmp_path / "d", name="d")
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_stored_is_named(tmp_path):
  with pytest.raises(UserError, match="field 'a' of an example: cannot store a NoneType"):
    write_demonstrations([{"a": None}], tmp_path / "d", name="d")
  with pytest.raises(UserError, match="no examples"):
    write_demonstrations([], tmp_path / "d", name="d")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.7, 0.9999])
def test_a_shard_cut_short_is_named(directory, kept):
  shard = directory / SHARD
  content = shard.read_bytes()
  shard.write_bytes(content[: int(len(content) * kept)])
  with pytest.raises(UserError, match=SHARD):
    read_demonstrations(directory)


def test_a_missing_shard_is_named(directory):
  (directory / SHARD).unlink()
  with pytest.raises(UserError, match=f"{SHARD}: shard is missing"):
    read_demonstrations(directory)


def test_a_shard_that_is_not_the_right_one_is_named(directory):
  (directory / SHARD).write_bytes((directory / "toy-train.array_record-00002").read_bytes())
  with pytest.raises(UserError, match=f"{SHARD}: holds 10 examples, dataset_info.json says 20"):
    read_demonstrations(directory)


def test_flipped_bits_are_noticed_and_named(directory):
  """Wherever a bit flips, either the examples read are correct or the shard is named."""
  shard = directory / SHARD
  content = shard.read_bytes()
  named = 0
  for place in (*range(0, 4000, 37), *range(4000, len(content), 7919)):
    shard.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
    try:
      assert list(read_demonstrations(directory)) == EXAMPLES
    except UserError as error:
      assert SHARD in str(error)
      named += 1
  assert named > 20


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [None, "", '{"splits": [', "{}", "[]", '{"splits": 3}'])
def test_damaged_metadata_are_named(directory, file, content):
  path = directory / file
  path.unlink() if content is None else path.write_text(content)
  with pytest.raises(UserError, match=file):
    read_demonstrations(directory)


def test_a_missing_dataset_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere: no such dataset"):
    read_demonstrations(tmp_path / "nowhere")


def test_json_lines_are_objects_and_blank_lines_are_none(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"a": 1}\n\n{"a": "\\u2028 é\u2028"}\r\n{"a": [2]}')
  assert read_jsonl(path) == [{"a": 1}, {"a": "\u2028 é\u2028"}, {"a": [2]}]


@pytest.mark.parametrize(
  "content, complaint",
  [
    (b'{"a": 1}\n\n{"a": 2', r"rows\.jsonl, line 3: not JSON"),
    (b'{"a": 1}\n[1]\n', r"rows\.jsonl, line 2: must be an object, is list"),
    (b'{"a": "\xff"}', r"rows\.jsonl, line 1: not JSON"),
    (None, r"rows\.jsonl: No such file"),
  ],
)
def test_bad_json_lines_are_named_by_line(tmp_path, content, complaint):
  path = tmp_path / "rows.jsonl"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=complaint):
    read_jsonl(path)
