"""The whole cascade: every stage after the other, all domains scored before and after each.

  python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/tiny

Run again to resume: finished stages are skipped, an interrupted one goes on from its checkpoint.
"""

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import loading, reward_model, rl, sft
from experiments.assembly import Assembly, check_completions, claim
from experiments.launch import launch
from experiments.teaching import BEST, find, gather, probe
from nemocascade import report
from nemocascade.cascade import Record, columns
from nemocascade.config import ModelConfig
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.domains import registry
from nemocascade.errors import unknown
from nemocascade.metrics import CompileCounter

KINDS = {"sft": sft.run, "rl": rl.run, "reward_model": reward_model.run}


def check(c: ConfigDict) -> None:
  """Refuses a cascade that cannot run to its end, before anything is computed or written."""
  ModelConfig.from_fields(c.model.to_dict())
  registry.build(c.domains, tasks=c.tasks)
  for name in c.order:
    if name not in c.stages:
      raise unknown("stage in order", name, c.stages)
  check_completions(c, "evaluation.completions", c.evaluation.completions)
  for name in c.evaluation.greedy:
    if name not in c.order:
      raise unknown("stage in evaluation.greedy", name, c.order)
  for i, name in enumerate(c.order):
    stage = c.stages[name]
    if stage.kind not in KINDS:
      raise unknown(f"stages.{name}.kind", stage.kind, KINDS)
    begin = stage.init_from
    other = stage.kind == "sft" and loading.is_checkpoint(begin)  # Such as a base model's hf:DIR.
    if begin not in ("", "previous") and begin not in c.order[:i] and not other:
      raise unknown(f"stages.{name}.init_from", begin, ["previous", *c.order[:i]])
    if stage.kind == "reward_model":
      reward_model.check(flat(c, name))
    if stage.kind == "sft":
      for domain in stage.conversations:
        if domain not in c.domains:
          raise unknown(f"domain in stages.{name}.conversations", domain, c.domains)
      sft.check(flat(c, name))
    if stage.kind == "rl":
      rl.check(flat(c, name))
      for domain, teacher in stage.teachers.items():
        if teacher not in (BEST, *c.order[:i]) and not loading.is_checkpoint(teacher):
          raise unknown(f"stages.{name}.teachers.{domain}", teacher, [BEST, *c.order[:i]])


def check_outside(c: ConfigDict, workdir: Path) -> None:
  """Refuses checkpoints from outside the cascade whose tokenizer is not that which all its stages share."""
  named = {f"stages.{name}.init_from": c.stages[name].init_from for name in c.order}
  for name in c.order:
    named |= {f"stages.{name}.teachers.{d}": t for d, t in c.stages[name].get("teachers", {}).items()}
  outside = {name: value for name, value in named.items() if value not in ("", "previous", BEST, *c.order)}
  place = c.tokenizer.path or workdir / "tokenizer" / "tokenizer.model"
  tokenizer = load_tokenizer(place) if outside and (c.tokenizer.path or place.exists()) else None
  for name, value in outside.items():
    loading.same_tokenizer(name, value, tokenizer)


def flat(c: ConfigDict, name: str) -> ConfigDict:
  """A stage's config as its own file would give it: the shared fields and its own."""
  shared = {k: v for k, v in c.items() if k not in ("stages", "order", "side_line")}
  stage = ConfigDict(shared)
  stage.update(c.stages[name])
  return stage


def scores(a: Assembly, c: ConfigDict, params, name: str) -> tuple[dict, dict]:
  """All domains held out after the named stage, as fields of its entry; and how long it took."""
  began = time.time()
  sampled = a.evaluate(params, temperature=1.0, completions=c.evaluation.completions)
  fields = columns(sampled, "after")
  if name in c.evaluation.greedy:
    greedy = a.evaluate(params, temperature=0.0)
    fields |= columns(greedy, "after", prefix="greedy")
  fields["n_eval"] = {name: score.prompts for name, score in sampled.items()}
  return fields, {"eval_s_after": time.time() - began}


def run(c: ConfigDict, workdir: Path) -> Record:
  """Runs what is left of the cascade; returns its record."""
  check(c)
  check_outside(c, workdir)
  claim(c, workdir)
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compilations"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  record, began = Record.open(workdir), time.time()
  a = Assembly(c, workdir)
  if any((record.stage(name) or {}).get("status") != "done" for name in c.order):
    _ = a.heldout  # Prompts that evaluation has no room for are said before the first step.
  main_line = [name for name in c.order if name not in c.side_line]

  for name in c.order:
    entry = record.stage(name)
    if entry is None or entry["status"] != "done":
      run_stage(c, workdir, a, record, name, main_line)
    if c.stages[name].kind == "reward_model":
      a.use_judge_from(record.checkpoint(name))
    report.write(workdir)
  tqdm.write(f"cascade finished in {time.time() - began:.0f} s: {workdir / 'report' / 'index.html'}")
  return record


def run_stage(c, workdir: Path, a: Assembly, record: Record, name: str, main_line: list[str]) -> None:
  """Trains one stage, scores it, and writes its entry."""
  stage, began = flat(c, name), time.time()
  init = record.start_of(name, stage.init_from, main_line)
  previous = record.stage(name) or {}
  entry = {
    "name": name,
    "kind": stage.kind,
    "status": "running",
    "start": init,
    "domains": list(stage.get("mixture", {})),
    "wall_s": previous.get("wall_s", 0.0),
  }
  if stage.kind == "rl":  # Scores before: those of where it starts.
    source = next(e for e in record.stages if e.get("checkpoint") == init)
    for key in ("scores", "scores_intervals", "greedy", "greedy_intervals"):
      if f"{key}_after" in source:
        entry[f"{key}_before"] = source[f"{key}_after"]
  record.put(entry)

  extra = {}
  if stage.kind == "rl" and rl.taught(stage):
    found = find(stage, record)
    extra["teachers"] = gather(a, found, stage.teachers_in_memory)
    record.teachers = {t.domain: {"checkpoint": t.checkpoint, "score": t.score, "stage": t.stage} for t in found}
  with CompileCounter() as compiled:
    outcome = KINDS[stage.kind](stage, workdir / name, a, init, **extra)
  entry |= {
    "steps": outcome.steps,
    "checkpoint": outcome.checkpoint,
    "tokens": outcome.tokens,
    "train_s": outcome.wall_s,
    "compilations": compiled.count,
  }
  if stage.kind != "reward_model":
    fields, seconds = scores(a, c, outcome.params, name)
    entry |= fields | seconds | {"probe": probe(a, outcome.params)}
  entry |= {"status": "done", "wall_s": entry["wall_s"] + time.time() - began}
  record.put(entry)
  tqdm.write(summary(entry))


def summary(entry: dict) -> str:
  """The log line of a finished stage: its own domains' scores, time, compilations."""
  moved = ", ".join(
    f"{d} {entry['scores_before'][d]:.2f} -> {entry['scores_after'][d]:.2f}"
    for d in entry["domains"]
    if "scores_before" in entry and "scores_after" in entry
  )
  return (
    f"{entry['name']}: {entry['steps']} steps, {entry['wall_s']:.0f} s"
    f" ({entry['train_s']:.0f} s training), {entry['tokens']} tokens,"
    f" {entry['compilations']} compilations{': ' + moved if moved else ''}"
  )


if __name__ == "__main__":
  launch(run)
