"""The top of the report: what the run is, and the five questions that a reader asks first."""

import functools
from collections.abc import Iterator

from nemocascade.config import ModelConfig
from nemocascade.model.size import active_params, count_params
from nemocascade.report.markup import command, link, text
from nemocascade.report.run import Change, Run, Stage, change, count, duration, percent_points, words

MOST = 8  # Falls that are listed.
KINDS = {"sft": "supervised fine-tuning (SFT)", "reward_model": "the judge of preferences, trained on pairs of answers"}
BLOCKS = {"M": "Mamba-2", "*": "attention", "E": "mixture-of-experts", "-": "MLP"}


def header(run: Run) -> str:
  """The facts of the run as a list of terms."""
  begun, versions = run.made.get("begun", {}), run.made.get("versions", {})
  facts = {
    "Command": f"<code class=command>{command(run.command or 'not recorded')}</code>",
    "Config": link("../config.json", "config.json"),
    "Seed": text(run.config.get("seed", "not recorded")),
    "Commit": text(versions.get("nemocascade", "not recorded")),
    "Model": text(model(run)),
    "Data": text(data(run)),
    "Machine": text(begun.get("machine", "not recorded")),
    "Begun": text(begun.get("date", "not recorded")),
    "Time": text(f"{duration(sum(s['wall_s'] for s in run.done))} in {len(run.done)} finished stages"),
    "Versions": text(", ".join(f"{name} {v}" for name, v in versions.items() if name != "nemocascade")),
  }
  items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
  return f"<dl class=facts>{items}</dl>"


def model(run: Run) -> str:
  """The model's size in words; "not recorded" if the config has none."""
  if "model" not in run.config:
    return "not recorded"
  return _size(ModelConfig.from_fields({k: _tuple(v) for k, v in run.config["model"].items()}))


@functools.cache
def _size(config: ModelConfig) -> str:
  pattern = config.hybrid_override_pattern
  blocks = ", ".join(f"{pattern.count(c)} {name}" for c, name in BLOCKS.items() if c in pattern)
  return (
    f"{count(count_params(config))} parameters, {count(active_params(config))} of them active for a token;"
    f" blocks {pattern} ({blocks}), width {config.hidden_size}, vocabulary {config.vocab_size}"
  )


def _tuple(value):
  return tuple(value) if isinstance(value, list) else value


def data(run: Run) -> str:
  """Where conversations and prompts come from, in words."""
  sources = [s for stage in run.config.get("stages", {}).values() for s in stage.get("sources", {}).values()]
  counts = [s.get("count") for s in sources]
  conversations = f"{sum(counts):,} conversations" if counts and all(counts) else f"{len(sources)} sources"
  made = [str(d.get("rows", "")).startswith("generated:") for d in run.config.get("domains", {}).values()]
  kind = "made by programs" if made and all(made) else "of files" if not any(made) else "of files and of programs"
  return f"{conversations} for SFT; prompts of {len(made)} domains, {kind}, each with a verifier"


def five_answers(run: Run) -> str:
  """What was trained, on what, did it work, what got worse, what did it cost."""
  answers = {
    "What was trained?": trained(run),
    "On what?": trained_on(run),
    "Did it work?": worked(run),
    "What got worse?": worse(run),
    "What did it cost?": cost(run),
  }
  return "<div class=five>" + "".join(f"<h3>{q}</h3>{a}" for q, a in answers.items()) + "</div>"


def trained(run: Run) -> str:
  line = [s for s in run.stages if not run.is_side(s)]
  said = f"<p>A language model from random parameters: {text(model(run))}. Its stages, one after another: "
  if any(s["start"] and not run.start_of(s) for s in line):
    said = f"<p>A language model from a given checkpoint: {text(model(run))}. Its stages, one after another: "
  said += " → ".join(f"<b>{text(words(s['name']))}</b>" for s in line) + ".</p>"
  items = "".join(f"<li><b>{text(words(s['name']))}</b>: {text(what(run, s))}</li>" for s in run.stages)
  return said + f"<ul>{items}</ul>"


def what(run: Run, stage: Stage) -> str:
  """What a stage does, in words."""
  if stage["kind"] in KINDS:
    said = KINDS[stage["kind"]]
  elif stage.get("teachers"):
    teachers = sorted({words(t["stage"] or "a given checkpoint") for t in stage["teachers"].values()})
    who = "as its teacher" if len(teachers) == 1 else "as its teachers"
    said = f"distillation ({run.settings(stage).get('advantage', 'MOPD')}) with {', '.join(teachers)} {who}"
  else:
    said = f"reinforcement learning ({run.settings(stage).get('advantage', 'RL')})"
  if stage["domains"]:
    said += f", on {', '.join(map(words, stage['domains']))}"
  if run.is_side(stage):
    start = run.start_of(stage)
    said += f"; a side line{' from ' + words(start['name']) if start else ''}, not part of the final model"
  return said + ("" if stage["status"] == "done" else " (not finished)")


def trained_on(run: Run) -> str:
  n = sum(run.scored[0]["n_eval"].values()) if run.scored else 0
  seen = sum(s["tokens"] for s in run.done)
  held = f" Scores are measured on {n:,} held-out prompts that no stage trains on." if n else ""
  names = ", ".join(map(words, run.domains))
  where = f" {link('#answers', 'Examples of prompts and answers')}." if run.scored else ""
  return f"<p>{text(data(run))}. Domains: {text(names)}. Tokens trained on or sampled{'' if seen else ' so far'}: {count(seen)}.{text(held)}{where}</p>"


def worked(run: Run) -> str:
  """Whether each RL stage raised its own domains, and how far the end is from the first stage."""
  if not run.main:
    return "<p>No stage has been scored yet.</p>"
  if run.smoke:
    return "<p>This run can't tell: its stages have a few steps each. It shows that the program runs to its end.</p>"
  judged = [(s, c) for s in run.scored if (c := own_change(run, s))]
  first, parts = run.main[0], []
  if first["kind"] == "sft" and not first["start"]:
    own = sum(first["scores_after"].values()) / len(first["scores_after"])
    parts.append(
      f"<li><b>{text(words(first['name']))}</b> learned from random parameters: {own:.0%} of all held-out prompts</li>"
    )
  parts += [f"<li><b>{text(words(s['name']))}</b>: {_said(c)}</li>" for s, c in judged]
  rose = sum(c.rose for _, c in judged)
  summary = f"{rose} of {len(judged)} later stages raised the score of their own domains clearly." if judged else ""
  if len(run.main) > 1:
    whole = change(run.main[-1], first, run.domains)
    summary = (
      f"From {words(first['name'])} to {words(run.main[-1]['name'])}, the mean of all domains went from"
      f" {whole.before:.0%} to {whole.after:.0%}. {summary}"
    )
  return f"<p>{text(summary)}</p><ul>{''.join(parts)}</ul>"


def own_change(run: Run, stage: Stage) -> Change | None:
  """The change of a stage's own domains; None without a scored start or own domains."""
  start, own = run.start_of(stage), [d for d in stage["domains"] if d in run.domains]
  return change(stage, start, own) if start and own else None


def _said(c: Change) -> str:
  tone, verdict = ("good", "better") if c.rose else ("bad", "worse") if c.fell else ("quiet", "no clear change")
  return (
    f"{c.before:.0%} → {c.after:.0%} on its own domains"
    f" ({percent_points(c.before, c.after):+d} points, 95% interval {100 * c.low:+.0f} to {100 * c.high:+.0f}): <span class={tone}>{verdict}</span>"
  )


def falls(run: Run) -> Iterator[tuple[Stage, str, Change]]:
  """(stage, domain, change) of all clear falls against the checkpoint that the stage started from."""
  for stage in run.scored:
    if start := run.start_of(stage):
      for d in run.domains:
        if (c := change(stage, start, [d])).fell:
          yield stage, d, c


def worse(run: Run) -> str:
  if len(run.scored) < 2:
    return "<p>Nothing to compare yet: fewer than two stages have been scored.</p>"
  found = sorted(falls(run), key=lambda fall: fall[2].mean)
  compared = sum(len(run.domains) for s in run.scored if run.start_of(s))
  chance = (
    f"Of {compared} comparisons of a domain before and after a stage, {len(found)} fell clearly (95% interval below 0)."
    f" By chance alone one in forty would."
  )
  items = [
    f"<li><b>{text(words(s['name']))}</b>{' (side line)' if run.is_side(s) else ''}: {text(words(d))}"
    f" {c.before:.0%} → <span class=bad>{c.after:.0%}</span></li>"
    for s, d, c in found[:MOST]
  ]
  more = f"<p>And {len(found) - MOST} smaller ones.</p>" if len(found) > MOST else ""
  end = ""
  if len(run.main) > 1:
    down = [d for d in run.domains if change(run.main[-1], run.main[0], [d]).fell]
    said = ", ".join(map(words, down)) if down else "no domain"
    end = f"<p>At the end, below the first stage: {text(said)}.</p>"
  return f"<p>{chance}</p><ul>{''.join(items)}</ul>{more}{end}"


def cost(run: Run) -> str:
  if not run.done:
    return "<p>No stage has finished yet.</p>"
  wall = sum(s["wall_s"] for s in run.done)
  machine = run.made.get("begun", {}).get("machine", "a machine that is not recorded")
  parts = sorted(run.done, key=lambda s: -s["wall_s"])[:2]
  most = ", ".join(f"{words(s['name'])} {s['wall_s'] / max(wall, 1e-9):.0%}" for s in parts)
  scoring = sum(s.get("eval_s_after", 0) for s in run.done)
  return (
    f"<p>{duration(wall)} on {text(machine)}; {count(sum(s.get('tokens', 0) for s in run.done))} tokens. Most of it:"
    f" {text(most)}. Scoring took {duration(scoring)} of it. {link('#cost', 'All stages')}.</p>"
  )
