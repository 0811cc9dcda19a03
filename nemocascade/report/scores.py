"""Tables of a run's held-out scores: stage x domain, the change over the run, teachers, gates, and the cost."""

from collections.abc import Sequence
from pathlib import Path

from nemocascade.report.markup import csv_link, note, table, text, write_csv
from nemocascade.report.run import Run, Stage, change, duration, percent_points, words

WHITE, DARK = (247, 251, 255), (8, 48, 107)  # Colours of the scores 0 and 1.


def scores_csv(run: Run, path: Path) -> None:
  rows = [
    [s["name"], d, kind, s[f"{kind}_after"][d], *s[f"{kind}_intervals_after"][d], s["n_eval"][d]]
    for s in run.scored for kind in ("scores", "greedy") for d in s.get(f"{kind}_after", ())
  ]  # fmt: skip
  write_csv(path, ["stage", "domain", "kind", "mean", "low", "high", "prompts"], rows)


def heat_map(run: Run, kind: str) -> str:
  """The scores after each stage, in percent, as a table whose cells are coloured; side lines stand apart.

  Args:
    kind: "scores" (temperature 1) or "greedy".
  """
  heads = "".join(f"<th class=domain>{text(words(d))}</th>" for d in run.domains)
  parts = [f"<tr><th>after stage</th>{heads}</tr>"]
  parts += [_heat_row(s, run.domains, kind) for s in run.main if f"{kind}_after" in s]
  if side := [s for s in run.side if f"{kind}_after" in s]:
    label = "Side lines: they teach or judge other stages, and the final model does not contain them."
    parts.append(f"<tr class=part><th colspan={len(run.domains) + 1}>{label}</th></tr>")
    parts += [_heat_row(s, run.domains, kind) for s in side]
  caption = (
    "Percent of held-out prompts solved; below it, the change against the checkpoint that the stage started from."
    " Framed: the domains that the stage trains on."
  )
  return f"<div class=scroll><table class=heat><caption>{caption}</caption>{''.join(parts)}</table></div>"


def _heat_row(stage: Stage, domains: Sequence[str], kind: str) -> str:
  return f"<tr><th>{text(words(stage['name']))}</th>{''.join(_heat_cell(stage, d, kind) for d in domains)}</tr>"


def _heat_cell(stage: Stage, domain: str, kind: str) -> str:
  score, before = stage[f"{kind}_after"][domain], stage.get(f"{kind}_before", {}).get(domain)
  moved = "" if before is None else f"<small>{signed(percent_points(before, score))}</small>"
  own = " class=own" if domain in stage["domains"] else ""
  return f"<td{own} style='{colours(score)}'>{100 * score:.0f}{moved}</td>"


def signed(points: int) -> str:
  """Percent points with their sign."""
  return f"+{points}" if points > 0 else f"−{-points}" if points < 0 else "0"


def colours(score: float) -> str:
  """CSS of a cell: the background of a score, and black or white text, whichever has the higher contrast."""
  score = min(max(score, 0.0), 1.0)
  rgb = [round(a + (b - a) * score) for a, b in zip(WHITE, DARK, strict=True)]
  ink = "#fff" if contrast(rgb, (255, 255, 255)) > contrast(rgb, (0, 0, 0)) else "#000"
  return f"background:rgb({','.join(map(str, rgb))});color:{ink}"


def contrast(a: Sequence[int], b: Sequence[int]) -> float:
  """The contrast of two sRGB colours, 1 to 21, as the Web Content Accessibility Guidelines define it."""
  linear = lambda c: c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4
  light = lambda rgb: sum(w * linear(c) for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))
  low, high = sorted((light(a), light(b)))
  return (high + 0.05) / (low + 0.05)


def first_and_last(run: Run, path: Path) -> str:
  """The scores of the first and of the last stage of the main line, with intervals."""
  first, last = run.main[0], run.main[-1]
  rows, shown = [], []
  for kind, label in (("scores", "T=1"), ("greedy", "greedy")):
    if f"{kind}_after" not in first or f"{kind}_after" not in last:
      continue
    for d in run.domains:
      a, b = first[f"{kind}_after"][d], last[f"{kind}_after"][d]
      of_a, of_b = (s[f"{kind}_intervals_after"][d] for s in (first, last))
      rows.append([d, label, first["n_eval"][d], a, *of_a, b, *of_b, b - a])
      name = words(d) + (", greedy" if kind == "greedy" else "")
      shown.append([name, percent(a, *of_a), percent(b, *of_b), signed(percent_points(a, b))])
  header = ["domain", "sampling", "prompts", first["name"], "low", "high", last["name"], "low", "high", "change"]
  heads = ["domain", f"{words(first['name'])}, % [95%]", f"{words(last['name'])}, % [95%]", "change"]
  return table(path, header, rows, shown=(heads, shown))


def gaps(stage: Stage, path: Path) -> str:
  """The scores of a stage's domains before and after it, beside those of their teachers."""
  rows, shown = [], []
  for domain, teacher in stage["teachers"].items():
    before, after = stage["scores_before"][domain], stage["scores_after"][domain]
    gap = teacher["score"] - before
    closed = f"{(after - before) / gap:.0%}" if gap > 0.02 else "none to close"
    rows.append([domain, teacher["stage"], teacher["score"], before, after, closed])
    moved = f"{100 * before:.0f} → {100 * after:.0f} of {100 * teacher['score']:.0f}"
    shown.append([words(domain), words(teacher["stage"]), moved, closed])
  header = ["domain", "teacher", "teacher's score", "before", "after", "gap closed"]
  heads = ["domain", "teacher", "score, %, and the teacher's", "gap closed"]
  return table(path, header, rows, left=(1,), shown=(heads, shown))


def moves(run: Run, path: Path) -> str:
  """What each stage did to its own domains, with the interval of the change."""
  rows, shown = [], []
  for stage in run.scored:
    start, own = run.start_of(stage), [d for d in stage["domains"] if d in run.domains]
    for d, c in ((d, change(stage, start, [d])) for d in own) if start else ():
      rows.append([stage["name"], d, c.before, c.after, c.mean, c.low, c.high])
      interval = f"[{signed(round(100 * c.low))}, {signed(round(100 * c.high))}]"
      moved = f"{signed(percent_points(c.before, c.after))} {interval}"
      sign = "▲" if c.rose else "▼" if c.fell else ""
      shown.append([words(stage["name"]), words(d), f"{100 * c.before:.0f} → {100 * c.after:.0f}", f"{sign} {moved}"])
  header = ["stage", "own domain", "before", "after", "change", "low", "high"]
  heads = ["stage", "own domain", "score, %", "change [95%]"]
  return table(path, header, rows, left=(1,), shown=(heads, shown))


def percent(score: float, low: float, high: float) -> str:
  """A score with its interval, in percent."""
  return f"{100 * score:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def gates(run: Run, path: Path) -> str:
  rows = [
    [s["name"], domain, f"{g['change']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*g["interval"]), f"-{g['tolerance']:g}",
     f"fired: {g['action']}" if g["fell"] else "passed", s["decision"]]
    for s in run.scored for domain, g in s.get("gates", {}).items()
  ]  # fmt: skip
  return table(
    path, ["stage", "domain", "change", "95%", "limit", "gate", "decision of the stage"], rows, left=(1, 5, 6)
  )


def costs(run: Run, path: Path) -> str:
  header = ["stage", "status", "steps", "tokens", "training s", "evaluation s", "all s", "compilations"]
  rows = [
    [s["name"], s["status"], s.get("steps", ""), s.get("tokens", ""), f"{s.get('train_s', 0):.0f}",
     f"{s.get('eval_s_after', 0):.0f}", f"{s.get('wall_s', 0):.0f}", s.get("compilations", "")]
    for s in run.done
  ]  # fmt: skip
  whole = sum(s.get("wall_s", 0) for s in run.done)
  rows.append(["all", "", "", sum(s.get("tokens", 0) for s in run.done), "", "", f"{whole:.0f}", ""])
  shown = [[words(row[0]), *row[2:3], f"{row[3]:,}" if row[3] != "" else "", *row[4:7]] for row in rows]
  bars = "".join(
    f"<dt>{text(words(s['name']))}</dt><dd><span class=bar style='width:{60 * s['wall_s'] / max(whole, 1e-9):.1f}%'>"
    f"</span> {duration(s['wall_s'])}</dd>"
    for s in run.done
  )
  heads = ["stage", "steps", "tokens", "training, s", "scoring, s", "all, s"]
  about = "Tokens are those that SFT trains on and that RL samples. Times are wall times, compilation included."
  return f"<dl class=facts>{bars}</dl>" + table(path, header, rows, shown=(heads, shown)) + note(about)


def downloads(paths: Sequence[Path]) -> str:
  return "".join(csv_link(path) for path in paths)
