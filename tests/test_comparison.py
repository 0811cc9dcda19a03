"""Statistics of a comparison, computed by hand: shares of the gap, steps to the teacher, paired differences."""

import csv
import json

import matplotlib.pyplot as plt
import pytest

from nemocascade.report import comparison


def lines(steps, scores):
  return [
    {"steps": step, "tokens": 100 * step, "flops": 10**6 * step, "score": score, "domains": {"math": score}}
    for step, score in zip(steps, scores, strict=True)
  ]


STUDENTS, TEACHERS = [0.2, 0.4], [0.6, 0.8]
ARMS = {
  "slow": [lines([0, 10, 20, 40], s) for s in ([0.2, 0.3, 0.4, 0.6], [0.4, 0.4, 0.5, 0.7])],
  "fast": [lines([0, 10, 20], s) for s in ([0.2, 0.6, 0.6], [0.4, 0.7, 0.8])],
}
OF = dict(pairs=[("fast", "slow")], steps=(20, 40), reach=1.0)


@pytest.fixture
def found():
  return comparison.compare([7, 8], STUDENTS, TEACHERS, ARMS, **OF)


def test_levels_are_means_over_seeds_and_curves_are_kept_by_seed(found):
  assert found["student_score"]["mean"] == pytest.approx(0.3)
  assert found["teacher_score"]["mean"] == pytest.approx(0.7)
  assert found["seeds"] == [7, 8]
  assert found["arms"]["fast"] == {
    "steps": [0, 10, 20], "tokens": [0, 1000, 2000], "flops": [0, 10**7, 2 * 10**7],
    "scores": [[0.2, 0.6, 0.6], [0.4, 0.7, 0.8]],
  }  # fmt: skip


def test_the_share_of_the_gap_is_by_seed_and_only_at_steps_that_the_arm_has_seen(found):
  # Arm "slow" closes 0.2 of 0.4 and 0.1 of 0.4 at step 20, and 1 and 0.75 of the gap at step 40.
  closed = found["summary"]["slow"]["gap_closed"]
  assert closed["20"]["mean"] == pytest.approx(0.375)
  assert closed["20"]["ci95"] == pytest.approx([0.25, 0.5])
  assert closed["40"]["mean"] == pytest.approx(0.875)
  assert set(found["summary"]["fast"]["gap_closed"]) == {"20"}


def test_steps_to_the_teacher_are_those_of_the_middle_seed_and_none_if_it_never_came(found):
  assert found["summary"]["fast"]["steps_to_teacher"] == {"median": 10, "ci95": [10, 20]}
  assert found["summary"]["slow"]["steps_to_teacher"] == {"median": 40, "ci95": [40, None]}


def test_paired_differences_are_of_the_same_seeds_at_the_same_step(found):
  (pair,) = found["paired"]  # Arm "fast" has no step 40.
  assert (pair["a"], pair["b"], pair["step"]) == ("fast", "slow", 20)
  assert pair["difference"]["mean"] == pytest.approx((0.2 + 0.3) / 2)
  assert pair["difference"]["ci95"] == pytest.approx([0.2, 0.3])


def test_arms_of_unlike_length_are_compared_where_each_ends(found):
  *before, pair = comparison.compare([7, 8], STUDENTS, TEACHERS, ARMS, ends=[("slow", "fast")], **OF)["paired"]
  assert before == found["paired"]
  assert (pair["a"], pair["b"], pair["step"]) == ("slow", "fast", None)
  assert pair["difference"]["ci95"] == pytest.approx([-0.1, 0.0])
  assert pair["difference"]["mean"] == pytest.approx(-0.05)


def test_seeds_that_ended_at_different_steps_are_aligned_at_their_ends():
  ended_sooner = lines([0, 10, 17], [0.1, 0.2, 0.3])
  a, b = comparison.aligned([ended_sooner, lines([0, 10, 20, 25], [0.1, 0.2, 0.3, 0.4])])
  assert a == ended_sooner and [line["steps"] for line in b] == [0, 10, 25]


def test_a_teacher_that_is_no_better_than_its_student_has_no_gap_to_close():
  found = comparison.compare([0], [0.5], [0.5], {"x": [lines([0, 20], [0.5, 0.6])]}, pairs=[], steps=(20,), reach=1.0)
  assert found["summary"]["x"]["gap_closed"]["20"]["mean"] is None
  assert "NaN" not in json.dumps(found)
  assert "x" in comparison.table(found)


def test_everything_is_written_and_the_tables_hold_the_numbers(tmp_path, found):
  by_domain = lambda values: [{"math": value} for value in values]
  comparison.write(
    tmp_path,
    found,
    ARMS,
    students=by_domain(STUDENTS),
    teachers=by_domain(TEACHERS),
    rates={"slow": 1e-3, "fast": 2e-3},
  )
  assert json.loads((tmp_path / "ablation.json").read_text()) == found
  read = lambda name: list(csv.DictReader((tmp_path / name).open()))
  assert len(read("curves.csv")) == 2 * 4 + 2 * 3
  assert read("paired.csv")[0]["p"] == "0.5"  # Two pairs with the same sign: 2 of 4 flips are as extreme.
  assert [row["peak_lr"] for row in read("summary.csv")] == ["0.001", "0.002"]
  (slow, fast) = read("domains.csv")
  assert float(slow["gap_closed"]) == pytest.approx((1 + 0.75) / 2)
  assert float(fast["change"]) == pytest.approx(0.4)
  for picture in ("curves.png", "differences.png"):
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
  assert not (tmp_path / "domains.png").exists()  # With one domain, curves.png shows the same.


def test_each_arm_is_drawn_on_each_domain_also_where_nobody_teaches():
  of = lambda math, code: [{"steps": 9, "domains": {"math": math, "code": code}}]
  arms = {"a": [of(0.4, 0.2), of(0.6, 0.4)], "b": [of(0.1, 0.3), of(0.3, 0.3)]}
  ends = comparison.domain_ends(arms, [{"math": 0.2, "code": 0.3}] * 2, [{"math": 0.6}] * 2)
  assert [(end["arm"], end["domain"]) for end in ends] == [("a", "math"), ("a", "code"), ("b", "math"), ("b", "code")]
  assert ends[0]["gap_closed"] == pytest.approx(0.75) and ends[1]["gap_closed"] is None
  assert [ends[2][f"change{end}"] for end in ("_low", "", "_high")] == pytest.approx([-0.1, 0.0, 0.1])
  assert [ends[2][f"final{end}"] for end in ("_low", "", "_high")] == pytest.approx([0.1, 0.2, 0.3])
  figure = comparison.by_domain(ends)
  (axes,) = figure.axes
  assert [label.get_text() for label in axes.get_yticklabels()] == ["math", "code"]
  drawn = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o")
  assert drawn == pytest.approx([0.2, 0.3, 0.3, 0.5])
  plt.close(figure)


def test_a_picture_that_cannot_be_drawn_leaves_the_last_one_whole(tmp_path, found, monkeypatch):
  write = lambda: comparison.write(
    tmp_path, found, ARMS, students=[{"math": x} for x in STUDENTS], teachers=[{"math": x} for x in TEACHERS],
    rates={"slow": 1e-3, "fast": 2e-3},
  )  # fmt: skip
  write()
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(figure, path, **how):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
  with pytest.raises(OSError, match="curves.png"):
    write()
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
