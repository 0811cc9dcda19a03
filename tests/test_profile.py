"""Difficulty profiling: what is sampled, what is kept, and that an interrupted profile goes on."""

import json

import numpy as np
import pytest
import tiny_checkpoint

from configs.tiny import if_rl
from experiments import profile
from nemocascade.errors import UserError
from nemocascade.evaluate import difficulty
from nemocascade.evaluate.difficulty import Difficulty
from nemocascade.runtime import domains
from nemocascade.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("compiled_fast")
REWARD = """
import zlib
def score(row, completion):
  kind = row["kind"]
  return {"easy": 1.0, "hard": 0.0}.get(kind, zlib.crc32(completion.text.encode("utf-8", "replace")) % 2)
"""
KINDS = ("easy", "hard", "mixed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.make(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def c(tmp_path):
  rows = [{"prompt": f"the cat {i}" + " and" * (400 * (i == 5)), "kind": KINDS[i % 3], "id": i} for i in range(36)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "held.jsonl").write_text('{"prompt": "the mat", "kind": "easy"}\n')
  (tmp_path / "reward.py").write_text(REWARD)
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.domains = {
      "mine": dict(
        rows=f"{tmp_path}/rows.jsonl",
        heldout=f"{tmp_path}/held.jsonl",
        verify=f"{tmp_path}/reward.py:score",
        thinking=False,
      ),
      "math": dict(rows="generated:math"),
    }
    c.mixture = {"mine": 1.0, "math": 1.0}
    c.rollout.update(prompts=8, completions=2, prompt_tokens=64, total_tokens=76)
  return c


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_that_all_or_none_solve_are_dropped_and_the_rest_trained_on(c, checkpoint, tmp_path, capsys):
  counts = profile.run(c, tmp_path / "out", checkpoint, completions=16)
  assert list(counts) == ["mine"]  # Generated rows are not profiled.
  kept, dropped = (read(tmp_path / "out" / f"mine{end}.jsonl") for end in ("", ".dropped"))
  assert sorted(row["id"] for row in kept + dropped) == list(range(36))
  assert {row["kind"] for row in dropped if row["id"] != 5} == {"easy", "hard"}
  assert "mixed" in {row["kind"] for row in kept} and "easy" not in {row["kind"] for row in kept}
  for row in kept + dropped:
    rate = {"easy": 1.0, "hard": 0.0}.get(row["kind"])
    if row["id"] == 5:
      assert "pass_rate" not in row
    else:
      assert row["pass_rate_total"] == 16 and row["pass_rate"] == row["pass_rate_passed"] / 16
      assert row["pass_rate"] == rate if rate is not None else 0 < row["pass_rate"] < 1
  assert counts["mine"] == {
    "kept": len(kept), "solved": 12, "unsolved": sum(r["kind"] == "hard" for r in dropped), "unjudged": 0, "too long": 1
  }  # fmt: skip
  said = capsys.readouterr().out.splitlines()
  assert said[-1].split()[:3] == ["mine", str(len(kept)), "12"]
  assert read(tmp_path / "out" / "mine.heldout.jsonl") == [{"prompt": "the mat", "kind": "easy"}]
  # What is kept can be trained on, also with bounds.
  entry = c.domains.mine
  with c.unlocked():
    entry.rows, entry.max_pass_rate = f"{tmp_path}/out/mine.jsonl", 0.9
  assert len(domains.build(c)["mine"].rows.training) == sum(row["pass_rate"] <= 0.9 for row in kept)


def test_an_interrupted_profile_goes_on_and_is_that_of_the_whole(c, checkpoint, tmp_path, monkeypatch):
  profile.run(c, tmp_path / "whole", checkpoint, completions=4)
  add, added = profile._Progress.add, []

  def stop(self, found):
    add(self, found)
    added.append(len(found))
    if len(added) == 2:
      with self.path.open("a") as file:
        file.write("[4, ")  # A line that was being written.
      raise KeyboardInterrupt

  monkeypatch.setattr(profile._Progress, "add", stop)
  with pytest.raises(KeyboardInterrupt):
    profile.run(c, tmp_path / "part", checkpoint, completions=4)
  profile.run(c, tmp_path / "part", checkpoint, completions=4)
  assert sum(added) == 35
  for name in ("mine.jsonl", "mine.dropped.jsonl"):
    assert (tmp_path / "part" / name).read_text() == (tmp_path / "whole" / name).read_text()
  with pytest.raises(UserError, match="mine.measured.jsonl: was measured with other settings"):
    profile.run(c, tmp_path / "part", checkpoint, completions=8)


def test_a_mixture_of_generated_rows_alone_is_refused(c, checkpoint, tmp_path):
  c.mixture = {"math": 1.0, "mine": 0.0}
  with pytest.raises(UserError, match="no domain of it has its rows in files"):
    profile.run(c, tmp_path / "out", checkpoint)
  assert not (tmp_path / "out").exists()


def test_fates_by_hand():
  how = dict(keep_solved=0.0, keep_unsolved=0.1)
  fate = lambda judged, passed, draw=0.5: difficulty.fate(Difficulty(judged, passed), draw, **how)  # noqa: E731
  assert [fate(4, 4), fate(4, 4, 0.0), fate(4, 0), fate(4, 0, 0.05), fate(4, 1), fate(0, 0)] == [
    "solved", "solved", "unsolved", "kept", "kept", "unjudged",
  ]  # fmt: skip
  draws = np.random.default_rng(0).random(10_000)
  assert np.mean([fate(16, 0, draw) == "kept" for draw in draws]) == pytest.approx(0.1, abs=0.01)


def test_masked_verdicts_are_in_no_rate():
  verdicts = [Verdict(1.0, ""), Verdict(0.4, ""), Verdict(0.0, "", masked=True)]
  assert difficulty.of_verdicts(verdicts, 1.0) == Difficulty(2, 1)
  assert difficulty.of_verdicts(verdicts, 0.4).fields == {"pass_rate": 1.0, "pass_rate_total": 2, "pass_rate_passed": 2}
