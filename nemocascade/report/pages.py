"""The report of a work directory: one self-contained HTML page, with CSVs and pictures beside it."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from nemocascade.report import answers, curves, figures, scores, summary
from nemocascade.report.markup import link, note, page, section, text
from nemocascade.report.run import Run, words
from nemocascade.report.tree import tree
from nemocascade.state_files import place, whole

RELOAD_S = 15  # Seconds between two states of the page while the run goes on.
TERMS = {
  "Score": "the share of a domain's held-out prompts that the model answers right, as a program or a judge decides; at"
  " temperature 1 unless greedy is said.",
  "Own domains": "the domains whose prompts a stage trains on.",
  "95% interval": "where the true value lies by the number of prompts; it says nothing about another seed.",
  "Teacher": "a checkpoint of this run whose probabilities another stage learns from.",
  "Side line": "a stage that no later one continues. It makes a teacher or a judge.",
  "Entropy": "how undecided the model is about the next token; 0 is certain.",
  "Greedy": "the likeliest token is taken at each place, instead of a sampled one.",
}


def write(workdir: str | Path, *, live: bool = False) -> Path:
  """Writes report/index.html, with CSVs beside it, and returns its path. The run may be unfinished.

  Args:
    live: whether the run goes on: the page then reloads itself, and no pictures are drawn beside it.
  """
  run = Run.open(place(workdir))
  out = run.workdir / "report"
  out.mkdir(parents=True, exist_ok=True)
  sections = list(_sections(run, out))
  contents = "".join(f"<li>{link(f'#{name}', title)}</li>" for name, title, _ in sections)
  line = [words(n) for n in run.planned if n not in run.config.get("side_line", ())]
  about = [f"<p>{text(said)}</p>"] if (said := run.config.get("about")) else []
  title = f"A cascade of {len(run.planned)} stages, from {line[0]} to {line[-1]}" if line else "A cascade that begins"
  body = [
    f"<p class=note>nemocascade: report of a run</p><h1>{text(title)}</h1>", *about, *_banners(run, live),
    summary.header(run), section("five", "In short", summary.five_answers(run)),
    f"<nav><h2>Contents</h2><ol>{contents}</ol></nav>", *(section(*parts[:2], *parts[2]) for parts in sections),
  ]  # fmt: skip
  with whole(out / "index.html") as partial:
    partial.write_text(page(f"nemocascade: {title}", "\n".join(body), reload_s=RELOAD_S * live), encoding="utf-8")
  if not live:
    for kind, name in (("scores", "scores.png"), ("greedy", "greedy.png")):
      if stages := [s for s in run.scored if f"{kind}_after" in s]:
        figures.heat_map(out / name, stages, kind)
  return out / "index.html"


def _banners(run: Run, live: bool) -> Iterator[str]:
  if run.smoke:
    yield (
      "<p class='banner smoke'><b>A test of plumbing.</b> The config is a <code>:smoke</code> form: every stage has a"
      " few steps, so all scores mean nothing. The page shows that each part works, and what a report looks like.</p>"
    )
  if live:
    now, at = time.strftime("%H:%M:%S"), next((s for s in run.stages if s["status"] == "running"), None)
    lines = run.metrics(at) if at else []
    where = f" Stage {run.planned.index(at['name']) + 1} of {len(run.planned)}: {words(at['name'])}" if at else ""
    where += f", step {lines[-1]['step'] + 1} of {at.get('asked_steps', '?')}." if at and lines else "." if at else ""
    yield (
      f"<p class='banner live'><b>The run goes on.</b>{text(where)} This page was written at {now} and reloads every"
      f" {RELOAD_S} s. If the time stands still, the run was stopped; the same command resumes it.</p>"
    )


def _sections(run: Run, out: Path) -> Iterator[tuple[str, str, list[str]]]:
  """(name, title, parts) of each section that the run has something for."""
  if run.scored:
    scores.scores_csv(run, out / "scores.csv")
    parts = [scores.heat_map(run, "scores"), scores.downloads([out / "scores.csv"])]
    yield "scores", "Held-out scores after each stage, temperature 1", parts
    if any("greedy_after" in s for s in run.scored):
      yield "greedy", "Held-out scores, greedy", [scores.heat_map(run, "greedy")]
  if len(run.scored) > 1:
    about = note(
      "Percent of held-out prompts solved before and after; the change in points, with its 95% interval over the"
      " prompts. ▲ and ▼: the whole interval is above, or below, 0."
    )
    yield "own", "What each stage did to its own domains", [about, scores.moves(run, out / "moves.csv")]
  if len(run.main) > 1:
    first, last = words(run.main[0]["name"]), words(run.main[-1]["name"])
    yield "ends", f"From {first} to {last}", [scores.first_and_last(run, out / "first_and_last.csv")]
  taught = [s for s in run.scored if s.get("teachers") and "scores_before" in s]
  for stage in taught:
    name = stage["name"]
    yield f"gaps_{name}", f"{words(name)}: the gap to each teacher", [scores.gaps(stage, out / f"gaps_{name}.csv")]
  if any(s.get("gates") for s in run.scored):
    yield "gates", "Gates", [scores.gates(run, out / "gates.csv")]
  if drawn := curves.learning(run):
    yield "curves", "Learning curves", drawn
  if said := answers.before_and_after(run):
    yield "answers", "The same prompts before and after each stage", said
  if run.stages:
    yield "tree", "What started from what", [f"<pre class=wide>{text(tree(run.record))}</pre>"]
  if run.done:
    yield "cost", "Time and tokens", [scores.costs(run, out / "costs.csv")]
  if shown := answers.all_samples(run, run.stages):
    yield "samples", "Samples of the training", shown
  if said := answers.talk(run):
    yield "talk", "Talk to the model", said
  terms = "".join(f"<dt>{name}</dt><dd>{text(of)}</dd>" for name, of in TERMS.items())
  yield "terms", "Words of this page", [f"<dl class=facts>{terms}</dl>"]


@contextlib.contextmanager
def live(workdir: Path) -> Iterator[None]:
  """Writes the page at once, and every RELOAD_S seconds while the body runs; only in the first process.

  If the body raises an error, the page is written once more, as that of a run that has ended.
  """
  if jax.process_index() > 0:
    yield
    return
  stop = threading.Event()

  def follow() -> None:
    while True:
      try:
        write(workdir, live=True)
      except Exception as error:  # The run is worth more than its page.
        print(f"the report is not written while the run goes on: {error}", file=sys.stderr)
        return
      if stop.wait(RELOAD_S):
        return

  thread = threading.Thread(target=follow, name="report", daemon=True)
  thread.start()
  try:
    yield
  except BaseException:
    stop.set()
    thread.join()
    with contextlib.suppress(Exception):  # The error of the body is the one to report.
      write(workdir)
    raise
  stop.set()
  thread.join()
