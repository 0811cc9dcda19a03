"""The report of a work directory: figures, tables and samples in one self-contained HTML page."""

import base64
import csv
import html
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from nemocascade.report.metrics import LINE, read_lines
from nemocascade.report.tree import tree
from nemocascade.state_files import whole
from nemocascade.store.record import Record

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-weight:600}h2{margin-top:2em;border-bottom:1px solid #ddd;padding-bottom:.2em}img{max-width:100%}
table{border-collapse:collapse;font-size:14px}td,th{padding:.25em .7em;border-bottom:1px solid #eee;text-align:right}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f4;padding:.7em;white-space:pre-wrap;margin:.2em 0}
.good{color:#1a7f37}.bad{color:#b42318}.quiet{color:#777}"""

# JSON schemas of a line of samples.jsonl: of an RL stage, and of SFT.
SAMPLE = LINE | {
  "required": ["step", "domain", "prompt", "completion", "verdict", "reason", "masked"],
  "properties": LINE["properties"] | {
    "domain": {"type": "string"}, "completion": {"type": "string"},
    "verdict": {"type": "number"}, "masked": {"type": "boolean"},
  },
}  # fmt: skip
PIECE = {
  "type": "object", "required": ["text", "learned"],
  "properties": {"text": {"type": "string"}, "learned": {"type": "boolean"}},
}  # fmt: skip
DOCUMENT = LINE | {
  "required": ["step", "pieces"],
  "properties": LINE["properties"] | {"pieces": {"type": "array", "items": PIECE}},
}


def write(workdir: str | Path) -> Path:
  """Writes report/index.html, with PNGs and CSVs beside it, and returns its path. The run may be unfinished."""
  workdir = Path(workdir)
  out = workdir / "report"
  out.mkdir(parents=True, exist_ok=True)
  record = Record.open(workdir)
  scored = [s for s in record.stages if s["status"] == "done" and "scores_after" in s]
  parts = ["<h1>nemocascade: what the cascade did</h1>"]
  if scored:
    parts += ["<h2>Held-out scores, temperature 1</h2>", _picture(heat_map(scored, "scores"), out / "scores.png")]
    if greedy := [s for s in scored if "greedy_after" in s]:
      parts += ["<h2>Held-out scores, greedy</h2>", _picture(heat_map(greedy, "greedy"), out / "greedy.png")]
    parts += ["<h2>From SFT to the end</h2>", _first_and_last(scored, out / "first_and_last.csv")]
    _scores_csv(scored, out / "scores.csv")
  if record.stages:
    parts += ["<h2>What started from what</h2>", f"<pre>{html.escape(tree(record))}</pre>"]
  if any(s.get("gates") for s in scored):
    parts += ["<h2>Gates</h2>", _gates(scored, out / "gates.csv")]
  for stage in scored:
    if stage.get("teachers") and "scores_before" in stage:
      title = f"{stage['name']}: the gap to each teacher"
      parts += [f"<h2>{html.escape(title)}</h2>", _gaps(stage, out / f"gaps_{stage['name']}.csv")]
  curves = learning_curves(workdir, record.stages)
  if curves is not None:
    parts += ["<h2>Learning curves</h2>", _picture(curves, out / "curves.png")]
  parts += ["<h2>Time and tokens</h2>", _costs(record.stages, out / "costs.csv")]
  parts += ["<h2>Samples</h2>", *(_samples(workdir, s["name"], s["kind"]) for s in record.stages)]
  page = f"<!doctype html><meta charset=utf-8><title>nemocascade</title><style>{_STYLE}</style>"
  with whole(out / "index.html") as partial:
    partial.write_text(page + "\n".join(parts))
  return out / "index.html"


def heat_map(stages: list[dict], kind: str):
  """Heat map of stage x domain: the score after the stage and its change since the stage's start.

  Args:
    stages: entries of cascade.json with scores.
    kind: "scores" (temperature 1) or "greedy".
  """
  domains = list(stages[0][f"{kind}_after"])
  after = np.array([[s[f"{kind}_after"][d] for d in domains] for s in stages])
  figure, axes = plt.subplots(figsize=(1.05 * len(domains) + 2.2, 0.62 * len(stages) + 1.3), layout="constrained")
  image = axes.imshow(after, cmap="viridis", vmin=0, vmax=1, aspect="auto")
  axes.set_xticks(range(len(domains)), [d.replace("_", "\n") for d in domains])
  axes.set_yticks(range(len(stages)), [s["name"].replace("_", " ") for s in stages])
  axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
  for spine in axes.spines.values():
    spine.set_visible(False)
  for i, stage in enumerate(stages):
    before = stage.get(f"{kind}_before")
    for j, domain in enumerate(domains):
      ink = "black" if after[i, j] > 0.6 else "white"
      axes.text(j, i - 0.12, f"{after[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=11)
      if before:
        change = after[i, j] - before[domain]
        axes.text(j, i + 0.26, f"{change:+.2f}", ha="center", va="center", color=ink, fontsize=7.5, alpha=0.85)
      if domain in stage["domains"]:
        box = plt.Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, ec="#ff7f0e", lw=2.2)
        axes.add_patch(box)
  figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
  figure.suptitle(
    "score, and change against the stage's start; boxes: the stage's own domains", fontsize=9, color="#555"
  )
  return figure


def learning_curves(workdir: Path, stages: list[dict]):
  """A panel for each stage that has metrics; None if there is no such stage.

  SFT and reward-model stages show the loss, RL stages the mean verdict and the entropy.
  """
  logs = [(s, read_lines(workdir / s["name"] / "metrics.jsonl")) for s in stages]
  logs = [(s, lines) for s, lines in logs if lines]
  if not logs:
    return None
  columns = 4
  rows = -(-len(logs) // columns)
  figure, grid = plt.subplots(rows, columns, figsize=(13, 2.7 * rows), layout="constrained", squeeze=False)
  for axes in grid.flat[len(logs) :]:
    axes.axis("off")
  main = {"sft": "loss/sft", "reward_model": "loss/reward_model", "rl": "rollout/verdict"}
  for axes, (stage, lines) in zip(grid.flat, logs, strict=False):
    name = main[stage["kind"]]
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line.get(name, np.nan) for line in lines], color="#1f5fa8", lw=1.6)
    axes.set_title(stage["name"].replace("_", " "), fontsize=11, loc="left")
    axes.set_ylabel({"rl": "mean verdict"}.get(stage["kind"], "loss"), color="#1f5fa8", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if stage["kind"] == "sft":  # Most of the loss falls in the first steps; a log scale shows the rest.
      axes.set_yscale("log")
    if stage["kind"] == "rl":
      axes.set_ylim(0, 1)
      twin = axes.twinx()
      twin.plot(steps, [line.get("policy/entropy", np.nan) for line in lines], color="#c0672b", lw=1, alpha=0.8)
      twin.set_ylim(bottom=0)
      twin.set_ylabel("entropy, nats", color="#c0672b", fontsize=8)
      twin.tick_params(labelsize=7)
      twin.spines[["top"]].set_visible(False)
  for axes in grid[-1]:
    axes.set_xlabel("step", fontsize=9)
  return figure


def _picture(figure, path: Path) -> str:
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=130)
  plt.close(figure)
  with whole(path) as partial:
    partial.write_bytes(data.getvalue())
  return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _table(path: Path, header: list[str], rows: list[list]) -> str:
  """Writes the rows to a CSV file and returns them as an HTML table."""
  with whole(path) as partial, partial.open("w", newline="") as file:
    csv.writer(file).writerows([header, *rows])
  cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
  line = lambda tag, row: "<tr>" + "".join(cell(tag, value) for value in row) + "</tr>"
  return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def _first_and_last(scored: list[dict], path: Path) -> str:
  first, last = scored[0], scored[-1]
  span = lambda s, d, kind: "[{:.2f}, {:.2f}]".format(*s[f"{kind}_intervals_after"][d])
  kinds = {"scores": "T=1", "greedy": "greedy"}
  kinds = {k: label for k, label in kinds.items() if f"{k}_after" in first and f"{k}_after" in last}
  rows = []
  for d in first["scores_after"]:
    row = [d, first["n_eval"][d]]
    for kind in kinds:
      a, b = first[f"{kind}_after"][d], last[f"{kind}_after"][d]
      row += [f"{a:.3f}", span(first, d, kind), f"{b:.3f}", span(last, d, kind), f"{b - a:+.3f}"]
    rows.append(row)
  header = ["domain", "prompts"]
  for label in kinds.values():
    header += [f"{first['name']} {label}", "95%", f"{last['name']} {label}", "95%", "change"]
  return _table(path, header, rows)


def _gaps(stage: dict, path: Path) -> str:
  rows = []
  for domain, teacher in stage["teachers"].items():
    before, after = stage["scores_before"][domain], stage["scores_after"][domain]
    gap = teacher["score"] - before
    closed = f"{(after - before) / gap:.0%}" if gap > 0.02 else "none to close"
    rows.append([domain, teacher["stage"], f"{teacher['score']:.3f}", f"{before:.3f}", f"{after:.3f}", closed])
  return _table(path, ["domain", "teacher", "teacher's score", "before", "after", "gap closed"], rows)


def _gates(scored: list[dict], path: Path) -> str:
  rows = [
    [s["name"], domain, f"{g['change']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*g["interval"]), f"-{g['tolerance']:g}",
     f"fired: {g['action']}" if g["fell"] else "passed", s["decision"]]
    for s in scored for domain, g in s.get("gates", {}).items()
  ]  # fmt: skip
  return _table(path, ["stage", "domain", "change", "95%", "limit", "gate", "decision of the stage"], rows)


def _scores_csv(scored: list[dict], path: Path) -> None:
  rows = [
    [s["name"], d, kind, s[f"{kind}_after"][d], *s[f"{kind}_intervals_after"][d], s["n_eval"][d]]
    for s in scored for kind in ("scores", "greedy") for d in s.get(f"{kind}_after", ())
  ]  # fmt: skip
  _table(path, ["stage", "domain", "kind", "mean", "low", "high", "prompts"], rows)


def _costs(stages: list[dict], path: Path) -> str:
  rows = [
    [s["name"], s["status"], s.get("steps", ""), s.get("tokens", ""), f"{s.get('train_s', 0):.0f}",
     f"{s.get('eval_s_after', 0):.0f}", f"{s.get('wall_s', 0):.0f}", s.get("compilations", "")]
    for s in stages
  ]  # fmt: skip
  rows.append(
    [
      "all",
      "",
      "",
      sum(s.get("tokens", 0) for s in stages),
      "",
      "",
      f"{sum(s.get('wall_s', 0) for s in stages):.0f}",
      "",
    ]
  )
  header = ["stage", "status", "steps", "tokens", "training s", "evaluation s", "all s", "compilations"]
  return _table(path, header, rows)


def _samples(workdir: Path, stage: str, kind: str, count: int = 6) -> str:
  """The stage's last samples as HTML. Completions are untrusted text, so everything is escaped."""
  lines = read_lines(workdir / stage / "samples.jsonl", DOCUMENT if kind == "sft" else SAMPLE)[-count:]
  if not lines:
    return ""
  if kind == "sft":
    documents = ("".join(map(_piece, line["pieces"])) for line in lines)
    return f"<h3>{html.escape(stage)}: what is learned is marked</h3>" + "".join(f"<pre>{d}</pre>" for d in documents)
  parts = [f"<h3>{html.escape(stage)}</h3>"]
  for line in lines:
    verdict = line["verdict"]
    tone = "quiet" if line["masked"] else "good" if verdict >= 1 else "bad"
    parts.append(
      f"<p><b>{html.escape(line['domain'])}</b>, step {line['step']}: <span class={tone}>"
      f"{verdict:g} ({html.escape(str(line['reason'])[:200])})</span></p>"
      f"<pre>{html.escape(str(line['prompt'])[:600])}</pre><pre>{html.escape(line['completion'][:600])}</pre>"
    )
  return "\n".join(parts)


def _piece(piece: dict) -> str:
  """A piece of a document that SFT trains on, as HTML."""
  text = html.escape(piece["text"][:600])
  return f"<mark>{text}</mark>" if piece["learned"] else text
