"""SFT on one's own files: from the command line to the metrics, and bad requests before anything is written."""

import json

import pytest
import two_processes
from in_process import run_command
from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import sft as nano
from configs.tiny import sft as tiny
from experiments import sft
from nemocascade.data.row_files import open_rows
from nemocascade.errors import UserError
from nemocascade.runtime import conversations, parts

pytestmark = pytest.mark.usefixtures("compiled_fast")

BAD = {"messages": [{"role": "user", "content": "x"}]}


def chat(i):
  said = {"role": "assistant", "reasoning_content": "so", "content": f"it is {i}"}
  return {"messages": [{"role": "user", "content": f"what is {i}?"}, said], "tools": None}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def config(**sources):
  c = tiny.get_config("smoke")
  with c.unlocked():
    c.sources, c.domains = ConfigDict(sources), recipe.generated("math")
  return c


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
  c = config(math=dict(path="generated:math", count=60))
  return parts.build(c, tmp_path_factory.mktemp("conversations"))


def test_a_file_of_chats_is_learned_and_a_bad_row_is_skipped_named_and_counted(tmp_path):
  path = write(tmp_path / "chats.jsonl", [*map(chat, range(150)), BAD])
  flags = [
    f"--config.sources={{'mine': {{'path': '{tmp_path}/*.jsonl'}}}}", "--config.domains={'math': {'rows': 'generated:math'}}",
    "--config.row_tokens=64", "--config.look_ahead=16384",
  ]  # fmt: skip
  done = run_command("sft", "--config=configs/tiny/sft.py:smoke", f"--workdir={tmp_path}/run", *flags)
  assert done.returncode == 0, done.stderr
  named = f"{path}, line 151: has nothing to learn: no assistant turn"
  assert f"skipped: {named}" in done.stderr
  assert json.loads((tmp_path / "run" / "sft" / "bad_rows.jsonl").read_text()) == {"row": named}
  lines = [json.loads(line) for line in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()]
  assert [(line["data/conversations"], line["data/bad"], line["data/long_documents"]) for line in lines] == [
    (151, 1, 0)
  ] * 6
  assert all(0.5 < line["data/fill"] <= 1 for line in lines)
  # What is learned is shown: the source, the first documents, the checkpoint.
  assert "an epoch has 151 conversations: mine 151\n" in done.stderr
  samples = [json.loads(line) for line in (tmp_path / "run" / "sft" / "samples.jsonl").read_text().splitlines()]
  assert len(samples) == conversations.SAMPLES and all(sample["step"] == 0 for sample in samples)
  for sample in samples:
    before, learned, after = sample["pieces"]
    number = before["text"].split("what is ")[1].split("?")[0]
    assert [before["learned"], learned["learned"], after["learned"]] == [False, True, False]
    assert "so" in learned["text"] and f"it is {number}<|im_end|>" in learned["text"]
  assert done.stderr.endswith(f"6 steps done; checkpoint: {tmp_path}/run/sft/checkpoints/6\n")


def test_an_interrupted_run_sees_what_an_uninterrupted_one_sees(assembled, tmp_path):
  path = write(tmp_path / "chats.jsonl", [*map(chat, range(150)), BAD])
  c = config(mine=dict(path=path, count=90), math=dict(path="generated:math", count=60))
  with c.unlocked():
    c.row_tokens, c.look_ahead, c.max_bad_share, c.save_every, c.steps = 128, 512, 0.1, 2, 4
  losses = lambda run: [  # noqa: E731
    json.loads(line)["loss/sft"] for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()
  ]
  sft.run(c, tmp_path / "whole" / "sft", assembled)
  short = c.copy_and_resolve_references()
  short.steps = 2
  sft.run(short, tmp_path / "parts" / "sft", assembled)
  sft.run(c, tmp_path / "parts" / "sft", assembled)
  assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
  "source, complaint",
  [
    (dict(path="nowhere/*.jsonl"), r"sources.mine.path=nowhere/\*.jsonl: no file matches"),
    (dict(count=3), "sources.mine.path is missing"),
    (dict(path="generated:math"), "sources.mine.count is missing"),
    (dict(path="generated:maths", count=3), "unknown generator in sources.mine.path 'maths'"),
    (dict(path="chats.jsonl", weight=-1.0), r"sources.mine.weight=-1.0: must be a finite number above 0"),
    (dict(path="chats.jsonl", weight=1.0, count=3), "sources.mine has a weight and a count"),
    (dict(path="chats.jsonl", wieght=1.0), "sources.mine.wieght: no such field"),
  ],
)
def test_bad_sources_are_refused(assembled, source, complaint):
  c = config(mine=source)
  with pytest.raises(UserError, match=complaint):
    sft.check(c)
    sft.check_documents(c, assembled)


user, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
  "rows, complaint",
  [
    ([{"messages": [user, said, said]}], "bad.jsonl, line 1: roles out of order: message 2 is of the assistant"),
    ([BAD] * 3, "bad.jsonl, line 1: has nothing to learn: no assistant turn"),
    ([{"text": "x", "id": 3}], "bad.jsonl, line 1: has no messages, only text, id"),
    ([{"messages": [user, {"role": "assistant", "content": None}]}], "line 1: message 1: an assistant message without"),
    ([{"messages": [user, {"role": "assistant", "text": "y"}]}], "line 1: message 1: an assistant message without"),
    ([{"messages": [user, said | {"reasoning": "z"}]}], "'reasoning'; they must be in 'reasoning_content'"),
    (
      [{"messages": [user, said | {"content": "y " * 300}]}],
      "row_tokens=256: conversations have .* long_documents=split",
    ),
    ([], "bad.jsonl holds no rows"),
  ],
)
def test_files_without_a_good_conversation_at_their_beginning_are_refused(assembled, tmp_path, rows, complaint):
  c = config(mine=dict(path=write(tmp_path / "bad.jsonl", rows)))
  with pytest.raises(UserError, match=complaint):
    sft.check_documents(c, assembled)
  assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_row_that_is_good_among_the_first_is_enough(assembled, tmp_path):
  sft.check_documents(config(mine=dict(path=write(tmp_path / "some.jsonl", [BAD, chat(1)]))), assembled)


def test_streams_that_do_not_divide_the_rows_are_refused():
  c = config(math=dict(path="generated:math", count=60))
  c.streams = 3
  with pytest.raises(UserError, match="streams=3: must divide rows=4"):
    sft.check(c)
  c.streams, c.look_ahead = 2, 1000
  with pytest.raises(UserError, match="look_ahead=1000: must be at least 1024, 2 rows of row_tokens=256"):
    sft.check(c)


def test_the_blend_of_the_report_has_26_million_conversations():
  c = nano.get_config()
  sft.check(c)
  assert sum(source.count for source in c.sources.values()) == 26_613_000
  assert c.rows % c.streams == 0 and c.look_ahead // c.streams >= 2 * c.row_tokens
  with pytest.raises(UserError, match="sources.chat.path=Nemotron-Cascade-2-SFT-Data/chat: no file matches"):
    conversations.check_first(c, None)


TWO_HOSTS = """
import functools, pathlib
import numpy as np
import test_loader as t
from nemocascade import mesh
from nemocascade.data.loader import Loader
from nemocascade.data.row_files import open_rows
from nemocascade.runtime import hosts

folder = pathlib.Path(arguments[0])
rows = open_rows(str(folder / "rows.jsonl"), folder)
B = 16
grid = mesh.make_mesh(data=-1, expert=1)
make = lambda **more: Loader(t.blend_of(rows), t.TOKENIZER, T=t.T, B=B, seed=0, look_ahead=4 * t.SMALL, streams=4, **more)
exchange = functools.partial(hosts.exchange, what="positions")
whole, own = make(), make(own=mesh.own_rows(grid, B), gather=exchange)
assert len(own.own) == 8 and len(own._streams) == 2
for _ in range(3):
  expected = next(whole)
  placed = mesh.put_rows(next(own), grid).tokens_BT
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, expected.tokens_BT[shard.index])
assert own.get_state() == whole.get_state()
assert mesh.owners(grid, B).tolist() == [0] * 8 + [1] * 8 and mesh.owners(grid, 3).tolist() == [0] * 3
held, values = mesh.read_own(placed)
assert held.tolist() == mesh.own_rows(grid, B) == [*range(8 * int(index), 8 * int(index) + 8)]
for shard in mesh.put_own(values + 1, grid, B).addressable_shards:
  np.testing.assert_array_equal(shard.data, expected.tokens_BT[shard.index] + 1)
print("the same")
"""


def test_two_hosts_read_their_own_rows_and_save_the_state_of_all(tmp_path):
  write(tmp_path / "rows.jsonl", map(chat, range(150)))
  open_rows(str(tmp_path / "rows.jsonl"), tmp_path)  # Writes the index.
  two_processes.assert_both_say("the same", TWO_HOSTS, str(tmp_path))


def talk(text):
  return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize("place", ["source", "stage", "prompts"])
def test_a_tokenizer_is_trained_on_the_texts_of_ones_own_files(tmp_path, place):
  word = "xylophone"
  c = config(math=dict(path="generated:math", count=60))
  with c.unlocked():
    c.tokenizer.conversations = 40
    if place == "prompts":
      rows = write(tmp_path / "rows.jsonl", [{"prompt": f"{word} {i}?", "expected_answer": "1"} for i in range(40)])
      c.domains.mine = dict(rows=rows, verify="math")
    else:
      rows = write(tmp_path / "chats.jsonl", [*(talk(f"{word} {i}") for i in range(40)), BAD])
      c.sources = dict(mine=dict(path=rows), math=c.sources.math)
    if place == "stage":
      c = ConfigDict(c.to_dict() | {"stages": {"sft": {"sources": c.sources.to_dict()}}})
      del c.sources
  tokenizer = parts.build(c, tmp_path / "run").text.tokenizer
  assert len(tokenizer.encode(word)) <= 2
  assert tokenizer.decode(tokenizer.encode(f"{word} é")) == f"{word} é"


def test_a_tokenizer_is_trained_on_texts_with_more_characters_than_it_has_room_for(tmp_path):
  c = config(
    mine=dict(path=write(tmp_path / "chats.jsonl", [talk(chr(0x4E00 + i) * 2 + " river") for i in range(2000)]))
  )
  with c.unlocked():
    c.tokenizer.conversations = 2000
  tokenizer = parts.build(c, tmp_path / "run", domains=()).text.tokenizer
  assert tokenizer.vocab_size <= c.tokenizer.vocab_size and len(tokenizer.encode(" river")) == 1
  assert tokenizer.decode(tokenizer.encode("一川 river")) == "一川 river"


def test_sft_reads_no_rows_of_the_domains(tmp_path):
  """Only stages that draw prompts build domains: SFT needs neither their files nor the sandbox."""
  c = config(math=dict(path="generated:math", count=60))
  with c.unlocked():
    c.domains = ConfigDict(dict(math=dict(rows=str(tmp_path / "absent.jsonl"))))
    c.tokenizer.conversations = 0
  assert parts.build_domains(c, ()) == {}
  with pytest.raises(UserError, match="absent.jsonl"):
    parts.build_domains(c)
