"""Results of an ablation whose arms ran on paired seeds: ablation.json, CSV tables and figures."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from nemocascade.evaluate import statistics
from nemocascade.state_files import whole, write_json

# One evaluation: {"steps", "tokens", "flops", "score", "domains": {name: score}}.
Line = dict[str, Any]
AXES = {"steps": "step", "tokens": "sampled tokens", "flops": "FLOPs"}
COLOURS = ("#1f5fa8", "#c0672b", "#2e8b57", "#8e4b9e", "#b8a12f", "#4a4a4a", "#c8507a", "#3aa6a6")


def aligned(lines_of_seeds: Sequence[Sequence[Line]]) -> list[list[Line]]:
  """Gives every seed the same number of evaluations; the last evaluation of each seed is always kept.

  Args:
    lines_of_seeds: the evaluations of each seed, in order.
  """
  n = min(map(len, lines_of_seeds))
  return [[*lines[: n - 1], lines[-1]] for lines in lines_of_seeds]


def column(lines_of_seeds: Sequence[Sequence[Line]], name: str) -> np.ndarray:
  """The field `name` of aligned evaluations; fp64 [seeds, evaluations]."""
  return np.array([[line[name] for line in lines] for lines in lines_of_seeds], np.float64)


def compare(
  seeds: Sequence[int],
  students: Sequence[float],
  teachers: Sequence[float],
  arms: dict[str, Sequence[Sequence[Line]]],
  *,
  pairs: Sequence[tuple[str, str]],
  steps: Sequence[int],
  reach: float,
  ends: Sequence[tuple[str, str]] = (),
) -> dict:
  """The content of ablation.json.

  Args:
    students, teachers: the score of each seed's student and of its teacher.
    arms: name -> the evaluations of each seed, in order.
    pairs: (a, b): the difference a - b is computed at each of `steps`.
    steps: steps at which the shares of the gap and the differences are computed.
    ends: (a, b): the difference a - b is computed with each arm at its own last step; its "step" is None.
    reach: share of the gap from student to teacher at which an arm counts as having reached its teacher.
  """
  out: dict[str, Any] = {
    "student_score": {"mean": float(np.mean(students))},
    "teacher_score": {"mean": float(np.mean(teachers))},
    "seeds": list(seeds),
    "arms": {},
    "summary": {},
    "paired": [],
  }
  for name, lines in arms.items():
    lines = aligned(lines)
    average = lambda axis, lines=lines: np.mean(column(lines, axis), axis=0).tolist()
    scores = column(lines, "score")
    out["arms"][name] = {axis: average(axis) for axis in AXES} | {"scores": scores.tolist()}
    levels = [s + reach * (t - s) for s, t in zip(students, teachers, strict=True)]
    reached = [
      statistics.first_at([line["steps"] for line in of_seed], [line["score"] for line in of_seed], level)
      for of_seed, level in zip(lines, levels, strict=True)
    ]
    out["summary"][name] = {
      "steps_to_teacher": statistics.median(reached),
      "final": statistics.mean(scores[:, -1]),
      "gap_closed": {
        str(step): _known(statistics.gap_closed(scores_at(lines, step), students, teachers))
        for step in steps
        if step <= max(line["steps"] for line in lines[0])
      },
    }
  for a, b, step in [(*pair, step) for pair in pairs for step in steps] + [(*pair, None) for pair in ends]:
    d = differences(arms, a, b, step)
    if d is not None:
      out["paired"].append({"a": a, "b": b, "step": step, "difference": statistics.mean(d)})
  return out


def scores_at(lines_of_seeds: Sequence[Sequence[Line]], step: float) -> np.ndarray:
  """Each seed's score at a step."""
  return np.array(
    [statistics.at([x["steps"] for x in lines], [x["score"] for x in lines], step) for lines in lines_of_seeds]
  )


def differences(arms: dict, a: str, b: str, step: int | None) -> np.ndarray | None:
  """The score of a minus that of b at a step, for each seed; None if one of them ended before that step.

  If `step` is None, each arm's last score is used.
  """
  if step is None:
    last_a, last_b = (np.array([lines[-1]["score"] for lines in arms[name]]) for name in (a, b))
    return last_a - last_b
  if any(max(line["steps"] for line in arms[name][0]) < step for name in (a, b)):
    return None
  return scores_at(arms[a], step) - scores_at(arms[b], step)


def _known(values_N: np.ndarray) -> dict:
  """`statistics.mean` of the finite values (the seeds with a gap); its fields are None if there are none."""
  values_N = values_N[np.isfinite(values_N)]
  return statistics.mean(values_N) if len(values_N) else {"mean": None, "ci95": [None, None]}


def write(
  out: Path, found: dict, arms: dict, *, students: Sequence[dict], teachers: Sequence[dict], rates: dict
) -> None:
  """Writes ablation.json, curves.csv, summary.csv, paired.csv, domains.csv, curves.png and differences.png.

  With several domains it also writes domains.png.

  Args:
    found: the result of `compare`.
    arms: as given to `compare`.
    students, teachers: domain -> score, for each seed.
    rates: arm -> peak learning rate.
  """
  write_json(out / "ablation.json", found)
  domains = list(students[0])
  _csv(
    out / "curves.csv",
    ["arm", "seed", *AXES, "score", *domains],
    [
      [name, seed, *(line[k] for k in (*AXES, "score")), *(line["domains"][d] for d in domains)]
      for name, of_seeds in arms.items()
      for seed, lines in zip(found["seeds"], of_seeds, strict=True)
      for line in lines
    ],
  )
  steps = sorted({s for arm in found["summary"].values() for s in arm["gap_closed"]}, key=int)
  _csv(
    out / "summary.csv",
    ["arm", "peak_lr", "steps_to_teacher", "low", "high", "final", "low", "high"]
    + [f"{what}_{step}" for step in steps for what in ("gap_closed", "low", "high")],
    [
      [name, rates[name], s["steps_to_teacher"]["median"], *s["steps_to_teacher"]["ci95"]]
      + [s["final"]["mean"], *s["final"]["ci95"]]
      + sum(([g["mean"], *g["ci95"]] if (g := s["gap_closed"].get(step)) else [None] * 3 for step in steps), [])
      for name, s in found["summary"].items()
    ],
  )
  _csv(
    out / "paired.csv",
    ["a", "b", "step", "difference", "low", "high", "p"],
    [
      [p["a"], p["b"], p["step"], p["difference"]["mean"], *p["difference"]["ci95"]] + [statistics.paired_p(d)]
      for p in found["paired"]
      if (d := differences(arms, p["a"], p["b"], p["step"])) is not None
    ],
  )
  ends = domain_ends(arms, students, teachers)
  _csv(out / "domains.csv", list(ends[0]), [list(end.values()) for end in ends])
  pictures = {"curves.png": curves(found), "differences.png": intervals(found)}
  if len(domains) > 1:
    pictures["domains.png"] = by_domain(ends)
  for name, figure in pictures.items():
    with whole(out / name) as partial:
      figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def domain_ends(arms: dict, students: Sequence[dict], teachers: Sequence[dict]) -> list[dict]:
  """Each arm's last score on each domain, its change and its share of the gap; means over seeds, 95% intervals.

  The arguments are those of `write`. "teacher" is None for a domain without a teacher. "gap_closed" is None
  if no seed has a teacher above its student.
  """
  of = lambda scores, d: float(np.mean([s[d] for s in scores]))
  ends = []
  for name, of_seeds in arms.items():
    for d in students[0]:
      last = [lines[-1]["domains"][d] for lines in of_seeds]
      final, change = statistics.mean(last), statistics.mean([x - s[d] for x, s in zip(last, students, strict=True)])
      taught = all(d in t for t in teachers)
      closed = _known(
        statistics.gap_closed(last, [s[d] for s in students], [t[d] for t in teachers]) if taught else np.array([])
      )
      ends.append(
        {
          "arm": name, "domain": d, "student": of(students, d), "teacher": of(teachers, d) if taught else None,
          "final": final["mean"], "final_low": final["ci95"][0], "final_high": final["ci95"][1],
          "change": change["mean"], "change_low": change["ci95"][0], "change_high": change["ci95"][1],
          "gap_closed": closed["mean"],
        }
      )  # fmt: skip
  return ends


def by_domain(ends: list[dict]):
  """Figure of each arm's last score on each domain, with the student's and the teacher's scores.

  Args:
    ends: the result of `domain_ends`.
  """
  domains, names = (list(dict.fromkeys(end[key] for end in ends)) for key in ("domain", "arm"))
  height = 0.14 * len(names) + 0.3
  figure, axes = plt.subplots(figsize=(9, 1.2 + height * len(domains)), layout="constrained")
  for end in ends:
    top, arm = domains.index(end["domain"]), names.index(end["arm"])
    y, colour = top + (arm + 1) / (len(names) + 1) - 0.5, COLOURS[arm % len(COLOURS)]
    if arm == 0:
      axes.axhline(top + 0.5, color="#ddd", lw=0.6)
      for level, style in ((end["student"], ":"), (end["teacher"], "--")):
        if level is not None:
          axes.plot((level, level), (top - 0.42, top + 0.42), style, color="#555", lw=1.2)
    axes.plot((end["final_low"], end["final_high"]), (y, y), color=colour, lw=2)
    axes.plot(end["final"], y, "o", color=colour, ms=5, label=end["arm"].replace("_", " ") if top == 0 else None)
  for style, label in ((":", "student"), ("--", "teacher")):
    axes.plot([], [], style, color="#555", lw=1.2, label=label)
  axes.set_yticks(range(len(domains)), domains)
  axes.set_ylim(len(domains) - 0.5, -0.5)  # The first domain is at the top.
  axes.set_xlabel("held-out score where each arm ends, with 95% intervals over seeds")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
  return figure


def curves(found: dict):
  """Figure of the score against steps, tokens and FLOPs: 95% bands over seeds, student and teacher levels."""
  figure, panels = plt.subplots(1, len(AXES), figsize=(14, 4.4), layout="constrained", sharey=True)
  for axes, (name, label) in zip(panels, AXES.items(), strict=True):
    for kind, x, side in (("student", 1, "right"), ("teacher", 0.01, "left")):  # No curve is at these places.
      level = found[f"{kind}_score"]["mean"]
      axes.axhline(level, color="#555", lw=1, ls="--" if kind == "teacher" else ":")
      axes.annotate(
        kind, (x, level), xycoords=("axes fraction", "data"), ha=side, va="bottom", fontsize=8, color="#555"
      )
    for i, (arm, values) in enumerate(found["arms"].items()):
      colour, style = COLOURS[i % len(COLOURS)], ("-", "--")[i % 2]  # Dashes leave a covered line visible.
      scores = np.array(values["scores"])
      bands = np.array([statistics.bootstrap(scores[:, i]) for i in range(scores.shape[1])])
      axes.plot(values[name], scores.mean(axis=0), style, color=colour, lw=1.8, label=arm.replace("_", " "))
      axes.fill_between(values[name], bands[:, 0], bands[:, 1], color=colour, alpha=0.15, lw=0)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
  low, high = panels[0].get_ylim()
  # The axis spans at least 0.1, so that small changes look small.
  middle, half = (low + high) / 2, max(high - low, 0.1) / 2
  panels[0].set_ylim(middle - half, middle + half)
  panels[0].set_ylabel("held-out score, temperature 1")
  figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  figure.suptitle(f"mean over {len(found['seeds'])} paired seeds, 95% bootstrap bands", fontsize=9, color="#555")
  return figure


def intervals(found: dict):
  """Figure of each arm's share of the gap and of the paired differences, with 95% intervals."""
  steps = sorted({int(s) for arm in found["summary"].values() for s in arm["gap_closed"]})
  closed = [
    (arm, int(step), g)
    for arm, s in found["summary"].items()
    for step, g in s["gap_closed"].items()
    if g["mean"] is not None
  ]
  paired = [(f"{p['a']} \N{MINUS SIGN} {p['b']}", p["step"], p["difference"]) for p in found["paired"]]
  rows = max(len(closed), len(paired), 1)
  figure, panels = plt.subplots(1, 2, figsize=(14, 1.4 + 0.27 * rows), layout="constrained")
  for axes, lines, level, label in (
    (panels[0], closed, 1.0, "share of the gap from student to teacher"),
    (panels[1], paired, 0.0, "paired difference of held-out scores"),
  ):
    axes.axvline(level, color="#555", lw=1, ls="--")
    for y, (_, step, value) in enumerate(lines):
      colour = COLOURS[steps.index(step) % len(COLOURS)] if step is not None else "#555"
      axes.plot(value["ci95"], (y, y), color=colour, lw=2.2)
      axes.plot(value["mean"], y, "o", color=colour, ms=5)
    if not lines:
      axes.text(0.5, 0.5, "nothing to show: no teacher is above its student", transform=axes.transAxes, ha="center")
    axes.set_yticks(range(len(lines)), [f"{name.replace('_', ' ')}, {place(step)}" for name, step, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)  # The first line is at the top.
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#ddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(f"mean over {len(found['seeds'])} paired seeds, 95% bootstrap intervals", fontsize=9, color="#555")
  return figure


def place(step: int | None) -> str:
  """The step at which two arms are compared, in words."""
  return "where each ends" if step is None else f"step {step}"


def table(found: dict) -> str:
  """The summary and the paired differences as text for a terminal."""
  number = lambda x, digits=3: "never" if x is None or not math.isfinite(x) else f"{x:.{digits}f}"
  span = lambda value, key="mean", digits=3: (
    f"{number(value[key], digits)} [{', '.join(number(x, digits) for x in value['ci95'])}]"
  )
  lines = [f"student {found['student_score']['mean']:.3f}, teacher {found['teacher_score']['mean']:.3f}"]
  for name, s in found["summary"].items():
    closed = "  ".join(f"gap@{step} {span(g)}" for step, g in s["gap_closed"].items() if g["mean"] is not None)
    lines.append(
      f"{name:20} final {span(s['final'])}  steps to teacher {span(s['steps_to_teacher'], 'median', 0)}  {closed}"
    )
  for p in found["paired"]:
    lines.append(f"{p['a']} - {p['b']}, {place(p['step'])}: {span(p['difference'])}")
  return "\n".join(lines)


def _csv(path: Path, header: list[str], rows: list[list]) -> None:
  with whole(path) as partial, partial.open("w", newline="") as file:
    csv.writer(file).writerows([header, *rows])
