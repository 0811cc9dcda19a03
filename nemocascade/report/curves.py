"""Learning curves of a run: which metrics are drawn, of which stages, and what they are called."""

from nemocascade.evaluate.suites import mean_interval
from nemocascade.report.charts import Line, Point, panel, strip
from nemocascade.report.markup import BLUE, GREEN, ORANGE, note, text
from nemocascade.report.run import Run, Stage, words
from nemocascade.state_files import read_state
from nemocascade.store.record import prompt_scores

VALIDATIONS = {"type": "array", "items": {"type": "object", "required": ["step", "scores"]}}
# Title, metric, what it is, factor. Drawn for all RL stages on one scale.
STRIPS = (
  ("Response length, tokens", "rollout/tokens", "mean number of sampled tokens of a completion", 1.0),
  ("Entropy of the policy, nats per token", "policy/entropy", "mean entropy of the next token", 1.0),
  ("Learning rate, in 1/1000", "optimizer/learning_rate", "that of the step's update", 1e3),
)


def learning(run: Run) -> list[str]:
  """The section's parts: verdicts, losses, and strips of what the stages share. Empty if no stage has metrics."""
  logs = {s["name"]: run.metrics(s) for s in run.stages}
  stages = [s for s in run.stages if logs[s["name"]]]
  parts = []
  if rl := [s for s in stages if s["kind"] == "rl"]:
    key = (
      f"<p class=key><span><b style='color:{BLUE}'>━</b> training prompts: mean verdict of the step's samples</span>"
      f"<span><b style='color:{ORANGE}'>●</b> held-out prompts, with 95% interval</span></p>"
    )
    about = (
      "Held out: prompts that no stage trains on, of the stage's own domains, weighted as the stage mixes them."
      " Training prompts are drawn anew at every step."
    )
    panels = [_verdicts(run, s, logs[s["name"]]) for s in rl]
    parts += ["<h3>Reward of the RL stages</h3>", key, f"<div class='grid panels'>{''.join(panels)}</div>", note(about)]
  if taught := [s for s in rl if s.get("teachers") and any("advantage/mean" in line for line in logs[s["name"]])]:
    panels = [_distance(s, logs[s["name"]]) for s in taught]
    parts += [
      "<h3>Gap to the teachers on training prompts, nats per token</h3>",
      f"<div class='grid panels'>{''.join(panels)}</div>",
      note("Mean of log p(student) - log p(teacher) on the student's own samples; 0 where they agree."),
    ]
  if losses := [s for s in stages if s["kind"] != "rl"]:
    panels = [_loss(s, logs[s["name"]]) for s in losses]
    parts += [
      "<h3>Loss on training batches</h3>", f"<div class='grid panels'>{''.join(panels)}</div>",
      note("SFT: cross-entropy of the learned tokens, nats, on a logarithmic scale. Reward model: pairwise loss."),
    ]  # fmt: skip
  if rl:
    number = {s["name"]: str(i) for i, s in enumerate(rl, 1)}
    strips = [
      strip(title, f"{title} over the RL stages: {about}", [
        (number[s["name"]], Line(*_column(logs[s["name"]], metric, factor), BLUE)) for s in rl
      ])
      for title, metric, about, factor in STRIPS
    ]  # fmt: skip
    names = ", ".join(f"{number[s['name']]} {words(s['name'])}" for s in rl)
    parts += [
      "<h3>All RL stages on one scale</h3>", f"<div class='grid strips'>{''.join(strips)}</div>",
      f"<p class=note>On training prompts; the steps of stage after stage: {text(names)}.</p>",
    ]  # fmt: skip
  return parts


def _column(log: list[dict], metric: str, factor: float = 1.0) -> tuple[list[int], list[float | None]]:
  """(steps, values of the metric times `factor`); None where a step has no value."""
  values = [line.get(metric) for line in log]
  return [line["step"] for line in log], [None if v is None else factor * v for v in values]


def _verdicts(run: Run, stage: Stage, log: list[dict]) -> str:
  points = _heldout(run, stage, log[-1]["step"] + 1)
  held = f"; held out {points[0].value:.2f} before and {points[-1].value:.2f} after" if len(points) > 1 else ""
  last = log[-1].get("rollout/verdict") or 0.0
  says = f"{words(stage['name'])}: mean verdict on training prompts, {last:.2f} at the last step{held}"
  line = Line(*_column(log, "rollout/verdict"), BLUE)
  return panel(words(stage["name"]), says, [line], points, low=0.0, high=1.0)


def _heldout(run: Run, stage: Stage, steps: int) -> list[Point]:
  """The held-out score of the stage's mixture before it, after it, and at its validations."""
  mixture = {d: share for d, share in run.settings(stage).get("mixture", {}).items() if share and d in run.domains}
  mixture = mixture or dict.fromkeys((d for d in stage["domains"] if d in run.domains), 1.0)
  if not mixture:
    return []
  start, found = run.start_of(stage), []
  mean = lambda scores: sum(w * scores[d] for d, w in mixture.items()) / sum(mixture.values())
  for step, scored in ((0, start), (steps, stage if stage["status"] == "done" else None)):
    if scored:
      half = sum((w / sum(mixture.values()) * _half(scored, d)) ** 2 for d, w in mixture.items()) ** 0.5
      value = mean(scored["scores_after"])
      found.append(Point(step, value, max(0.0, value - half), min(1.0, value + half), ORANGE))
  path = run.workdir / stage["name"] / "validation.json"
  if path.exists():
    for line in read_state(path, VALIDATIONS, remedy="remove it"):
      if set(mixture) <= set(line["scores"]):
        value = mean(line["scores"])
        found.append(Point(line["step"], value, value, value, ORANGE))
  return found


def _half(stage: Stage, domain: str) -> float:
  """Half the width of the 95% interval of a domain's score."""
  scores_N = prompt_scores(stage, domain)
  low, high = mean_interval(scores_N[scores_N == scores_N])
  return (high - low) / 2


def _distance(stage: Stage, log: list[dict]) -> str:
  says = f"{words(stage['name'])}: gap to the teachers over the steps, nats per token"
  return panel(words(stage["name"]), says, [Line(*_column(log, "advantage/mean", -1.0), GREEN)], low=0.0)


def _loss(stage: Stage, log: list[dict]) -> str:
  metric = {"sft": "loss/sft", "reward_model": "loss/reward_model"}[stage["kind"]]
  known = [v for v in _column(log, metric)[1] if v is not None]
  says = f"{words(stage['name'])}: loss on training batches" + (
    f", from {known[0]:.3g} to {known[-1]:.3g}" if known else ""
  )
  line = Line(*_column(log, metric), BLUE)
  if stage["kind"] == "sft":  # Most of the loss falls in the first steps; a log scale shows the rest.
    return panel(words(stage["name"]), says, [line], log=True)
  return panel(words(stage["name"]), says, [line], low=0.0)
