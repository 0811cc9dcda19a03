"""Pairs of a reward model: generated ones by number, and those of files with one prompt in eight held out."""

import json

import pytest

from nemocascade.errors import UserError
from nemocascade.generated.preference import preference_pairs
from nemocascade.runtime.pairs import GENERATED, open_pairs


def write(folder, rows) -> str:
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def row(i: int, **fields) -> dict:
  messages = [{"role": "user", "content": f"question {i}"}]
  return {"messages": messages, "chosen": f"good {i}", "rejected": f"bad {i}"} | fields


def test_generated_pairs_are_the_same_by_number():
  pairs = open_pairs(3, 4, rows=GENERATED)
  assert pairs.train(0, 2) + pairs.train(2, 3) == preference_pairs(3, 5, "train")
  assert pairs.heldout(2) == preference_pairs(3, 2, "heldout")


def test_pairs_of_files_are_each_given_once_an_epoch_and_held_out_ones_never(tmp_path):
  pairs = open_pairs(0, 1, rows=write(tmp_path, [row(i) for i in range(64)]))
  held = pairs.heldout(64)
  trained = 64 - len(held)
  epochs = [pairs.train(start, trained) for start in (0, trained)]
  for epoch in epochs:
    assert {chosen for _, chosen, _ in epoch + held} == {f"good {i}" for i in range(64)}
    assert len(epoch) == trained
  assert epochs[0] != epochs[1]
  for messages, chosen, rejected in epochs[0] + held:
    number = messages[0]["content"].split()[1]
    assert (chosen, rejected) == (f"good {number}", f"bad {number}")


def test_a_pair_without_a_better_answer_is_left_out_and_counted(tmp_path, capsys):
  rows = [row(i) for i in range(40)] + [row(50 + i, rejected=f"good {50 + i}") for i in range(3)]
  pairs = open_pairs(0, 1, rows=write(tmp_path, rows))
  assert len({chosen for _, chosen, _ in pairs.train(0, 80) + pairs.heldout(40)}) == 40
  assert "left out 3 with two equal answers (first: " in capsys.readouterr().err


@pytest.mark.parametrize(
  "rows, least, said",
  [
    ([row(0) | {"chosen": 1}], 1, "line 1: chosen: must be a text, is 1"),
    ([{"messages": [{"role": "user", "content": "x"}], "chosen": "a"}], 1, "line 1: rejected: must be a text, is None"),
    ([row(i) for i in range(40)], 32, "source.heldout='': . pairs are held out, and pairs=32 are scored together"),
  ],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path, rows, least, said):
  with pytest.raises(UserError, match=said):
    open_pairs(0, least, rows=write(tmp_path, rows))


def test_a_missing_file_is_named():
  with pytest.raises(UserError, match="source.rows='none.jsonl': no such file"):
    open_pairs(0, 1, rows="none.jsonl")
