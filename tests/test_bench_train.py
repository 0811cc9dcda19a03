"""bench train: our SFT step beside transformers' on equal weights and rows, by length and by part, at a tiny size."""

import json
import os

import numpy as np
import pytest
from test_bench import SMALL

from experiments.bench import __main__ as bench
from experiments.bench import rl, train

pytestmark = pytest.mark.usefixtures("compiled_fast")
SIZES = train.Sizes(
  rows=2, row_tokens=16, lengths=(16, 32), tokens=64, document=16, square=16, copied=1 << 12, repeats=1
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(rl, "MODEL", rl.MODEL | SMALL | dict(vocab_size=256, hybrid_override_pattern="*E"))
  monkeypatch.setattr(train, "SIZES", SIZES)
  monkeypatch.setattr(train, "DTYPES", {"float32": 1e-3})


def test_a_step_is_measured_beside_transformers_whose_first_loss_is_equal(tmp_path, monkeypatch, capsys):
  pytest.importorskip("transformers")
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # One thread of torch is faster here.
  bench.run("train", table=str(tmp_path / "table.md"))
  lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
  parts = [f"part_{part}_float32" for part in ("attention", "experts", "head", "update")]
  assert set(lines) == {"sft_step_float32", "step_float32", "rows_of_32_tokens", *parts}
  assert all(line["ours"] > 0 and np.isfinite(line["ratio"]) for line in lines.values())
  assert lines["sft_step_float32"]["peer_name"].startswith("transformers")
  assert (tmp_path / "table.png").stat().st_size > 0


def test_documents_of_the_rows_have_equal_lengths_and_learn_all_but_their_first_token():
  config = rl.make_parts(rl.config()).programs.config
  batch = train.rows_of(config, 2, 32, 8)
  assert batch.segment_ids_BT[0].tolist() == sum(([i] * 8 for i in (1, 2, 3, 4)), [])
  assert not batch.loss_mask_BT[:, ::8].any() and batch.loss_mask_BT.sum() == 2 * 4 * 7
