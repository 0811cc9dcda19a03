"""Runs the whole cascade: the stages in order, with a score of every domain before and after each.

  python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/tiny
  python -m experiments.cascade --config=configs/tiny/cascade.py --dry_run        # Prints what the run will cost.
  python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/tiny --show       # Prints what it has done.

Run the same command again to resume: finished stages are skipped, and an interrupted one continues from its last
checkpoint. A finished stage whose `steps` the config raises continues to them; --from=STAGE trains those anew that were
made from its old checkpoint. docs/start.md describes gates, and how to run some of the stages.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TextIO

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import reward_model, rl, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, listed, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.fields import flag, text
from nemocascade.model.expert_parallel import check_experts
from nemocascade.report import pages
from nemocascade.report.metrics import CompileCounter
from nemocascade.report.tree import tree
from nemocascade.runtime import (
  course,
  domains,
  finished,
  gates,
  hosts,
  lineage,
  loading,
  objective,
  parts,
  plan,
  termination,
)
from nemocascade.runtime.checks import check_evaluation
from nemocascade.runtime.course import Choice, flat, inside
from nemocascade.runtime.heldout import Heldout, draw_heldout, write_answers
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Outcome
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.start import check_start
from nemocascade.runtime.teachers import find, gather, probe_tokens, take_probe
from nemocascade.runtime.validation import Validation
from nemocascade.runtime.watching import FLAGS, Watching
from nemocascade.runtime.workdir import check_owner, claim, keep_compilations
from nemocascade.store.kept import keep_step
from nemocascade.store.record import Record, columns

ALL = Choice()
KINDS = {"sft": sft, "rl": rl, "reward_model": reward_model}


def check(c: ConfigDict) -> None:
  """Raises UserError if the cascade cannot run to its end. Nothing is computed or written."""
  check_fields(c, "cascade")
  model = ModelConfig.from_fields(c.model.to_dict())
  if "E" in model.hybrid_override_pattern and c.mesh.expert > 0:  # -1 depends on the devices.
    check_experts(model.n_routed_experts, c.mesh.expert)
  domains.check(c)
  for field, names, known in (
    ("order", c.order, c.stages), ("side_line", c.side_line, c.stages), ("evaluation.greedy", c.evaluation.greedy, c.order),
  ):  # fmt: skip
    for name in names:
      if name not in known:
        raise unknown(f"stage in {field}", name, known)
  check_evaluation(c, "evaluation.completions", c.evaluation.completions)
  course.check_no_circle(c)
  gates.check(c)
  c = gates.with_all_insertions(c)
  for name in c.order:
    with inside(f"stages.{name}"):
      KINDS[c.stages[name].kind].check(flat(c, name))
      course.check_place(c, name)


def check_programs(c: ConfigDict, p: Parts) -> None:
  """Checks that need the parts of the run: rows over the mesh, parameter names, checkpoints, prompts.

  Raises:
    UserError: a stage cannot run.
  """
  c = gates.with_all_insertions(c)
  for name in c.order:
    stage = flat(c, name)
    with inside(f"stages.{name}"):
      KINDS[stage.kind].program(stage, p.programs)
      if stage.kind == "sft":
        sft.check_documents(stage, p)
      if stage.kind == "reward_model":
        reward_model.check_pairs(stage)
      given = {"init_from": stage.init_from}
      given |= {f"teachers.{domain}": teacher for domain, teacher in stage.get("teachers", {}).items()}
      for field, checkpoint in given.items():
        if loading.is_checkpoint(checkpoint):
          check_start(field, checkpoint, p.text.tokenizer, p.programs.template)
  # After the checkpoints, because their tokenizer may be the reason why prompts are too long.
  for name in c.order:
    if c.stages[name].kind == "rl":
      with inside(f"stages.{name}"):
        rl.check_prompts(flat(c, name), p)


def scores(c: ConfigDict, p: Parts, heldout: Heldout, params, name: str) -> tuple[dict, dict, dict]:
  """Scores all held-out domains after the named stage.

  Returns:
    (score fields of the stage's entry, {"eval_s_after": seconds}, domain -> DomainScore at temperature 1)
  """
  began = time.time()
  sampled = heldout.evaluate(p, params, temperature=1.0, completions=c.evaluation.completions)
  fields = columns(sampled, "after")
  if name in c.evaluation.greedy:
    greedy = heldout.evaluate(p, params, temperature=0.0)
    fields |= columns(greedy, "after", prefix="greedy")
  fields["n_eval"] = {name: score.prompts for name, score in sampled.items()}
  hosts.decided(fields, "held-out scores")
  return fields, {"eval_s_after": time.time() - began}, sampled


def run(c: ConfigDict, workdir: Path, choice: Choice = ALL, *, wandb: str = "", trace: str = "") -> Record:
  """Runs what is left of the chosen stages; returns the record of the cascade.

  Raises:
    StageStopped: a guard or a gate ended the cascade.
  """
  check(c)
  watching = Watching.of(wandb, trace)
  check_owner(c, workdir, may_grow=True)
  record = course.open_record(workdir)
  anew = lineage.check_choice(c, record, choice)
  if finished.cascade(c, record, choice, anew):
    say(f"all stages were done before: {workdir / 'report' / 'index.html'}")
    return record
  p = parts.build(c, workdir)
  check_programs(c, p)
  heldout = draw_heldout(c, p.domains, p.text.tokenizer)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text, may_grow=True), watching=watching)
  keep_compilations(workdir)
  record, began, passed = course.open_record(workdir), time.time(), []
  lineage.set_aside(record, anew)
  if done := [entry["name"] for entry in record.stages if entry["status"] == "done"]:
    say(f"done before: {', '.join(done)}")
  say(f"the report follows the run: {workdir / 'report' / 'index.html'}")
  with pages.live(workdir):
    # Looked up after each stage, because a gate's decision may change those that follow.
    while left := course.left(c, record, choice, passed):
      now, name = course.decided(c, record), left[0]
      hosts.decided(left, "stages that are left")
      if name in choice.of(now):
        p = finish_stage(now, workdir, p, heldout, record, name)
        gates.obey(record.stage(name), left[1:])
        if termination.stopping():
          raise termination.terminated(record.checkpoint(name))
      elif now.stages[name].kind == "reward_model" and record.is_done(name):
        p = parts.with_judge(now, p, record.checkpoint(name))
      passed.append(name)
  hosts.first_alone(lambda: pages.write(workdir), "report")
  say(f"cascade finished in {time.time() - began:.0f} s: {workdir / 'report' / 'index.html'}")
  return record


def finish_stage(c: ConfigDict, workdir: Path, p: Parts, heldout: Heldout, record: Record, name: str) -> Parts:
  """Runs a stage unless it is done. Returns the parts of the stages after it: a reward model becomes the judge."""
  if not record.is_done(name) or lineage.is_grown(c, record, name):
    run_stage(c, workdir, p, heldout, record, name)
  return parts.with_judge(c, p, record.checkpoint(name)) if c.stages[name].kind == "reward_model" else p


def run_stage(c: ConfigDict, workdir: Path, p: Parts, heldout: Heldout, record: Record, name: str) -> None:
  """Trains one stage, scores it, applies its gates, and writes its entry."""
  stage, began = flat(c, name), time.time()
  before = record.stage(name) or {}
  init = record.start_of(name, stage.init_from, course.main_line(c, name))
  source = record.stage(record.made(init))
  entry = lineage.begun(c, record, name, init) | {"wall_s": before.get("wall_s", 0.0)}
  for key in ("scores", "scores_intervals", "greedy", "greedy_intervals"):
    if source and f"{key}_after" in source:  # Scores before the stage: those of the stage that it starts from.
      entry[f"{key}_before"] = source[f"{key}_after"]
  if before.get("status") == "done":  # The stage gets more steps. Others may have started from its end so far.
    end = int(Path(before["checkpoint"]).name)
    hosts.first_alone(lambda: keep_step(workdir / name / "checkpoints", f"end_{end}", end), "kept checkpoints")
  teachers = None
  if stage.kind == "rl" and objective.taught(stage):
    found = find(stage, [e for e in map(record.stage, c.order[: c.order.index(name)]) if e is not None])
    teachers = gather(p.programs, p.text.tokenizer, found, stage.teachers_in_memory, heldout.rows)
    record.teachers = {t.domain: {"checkpoint": t.checkpoint, "score": t.score, "stage": t.stage} for t in found}
    entry["teachers"] = record.teachers
  record.put(entry)

  with CompileCounter() as compiled:
    outcome = train(stage, workdir / name, p, heldout, init, teachers)
  entry |= {
    "steps": outcome.steps,
    "checkpoint": outcome.checkpoint,
    "tokens": outcome.tokens,
    "train_s": outcome.wall_s,
    "compilations": compiled.count,
  }
  if stage.kind != "reward_model":
    fields, seconds, answers = scores(c, p, heldout, outcome.params, name)
    hosts.first_alone(lambda: write_answers(workdir / name / "answers.jsonl", outcome.steps, answers), "answers")
    p.watching.end(workdir / name, outcome.steps, stage, fields["scores_after"])
    probe = take_probe(p.programs.score, outcome.params, probe_tokens(p.text.tokenizer, heldout.rows))
    entry |= fields | seconds | {"probe": dataclasses.asdict(probe)}
    entry |= gates.judge(stage, entry, source) if source else {}
  entry |= {"status": "done", "wall_s": entry["wall_s"] + time.time() - began}
  record.put(entry)
  say(summary(entry))
  if entry.get("decision") in ("warn", "mopd", "back"):
    say(gates.line(entry), sys.stderr)


def train(stage: ConfigDict, stage_dir: Path, p: Parts, heldout: Heldout, init: str, teachers) -> Outcome:
  """Trains a stage from the checkpoint `init`. With validation the outcome is that of its best checkpoint."""
  if stage.kind == "reward_model":
    return reward_model.run(stage, stage_dir, p, init)
  validation = Validation(stage, stage_dir, p, heldout)
  more = {"teachers": teachers} if stage.kind == "rl" else {}
  return validation.handed_on(KINDS[stage.kind].run(stage, stage_dir, p, init, watch=validation, **more))


def say(line: str, file: TextIO | None = None) -> None:
  """Writes a line, by default to stdout; only in the first process."""
  if jax.process_index() == 0:
    tqdm.write(line, file=file)


def summary(entry: dict) -> str:
  """The log line of a finished stage: its time and compilations, and the scores of its own domains."""
  moved = ", ".join(
    f"{d} {entry['scores_before'][d]:.2f} -> {entry['scores_after'][d]:.2f}"
    for d in entry["domains"]
    if "scores_before" in entry and "scores_after" in entry
  )
  return (
    f"{entry['name']}: {entry['steps']} steps, {entry['wall_s']:.0f} s"
    f" ({entry['train_s']:.0f} s training), {entry['tokens']} tokens,"
    f" {entry['compilations']} compilation{'s' * (entry['compilations'] != 1)}{': ' + moved if moved else ''}"
  )


def main(c: ConfigDict, workdir: Path | None, **flags) -> None:
  """Runs the chosen stages, or prints the plan or the tree. A plan needs no work directory."""
  record = Record.open(workdir) if workdir else Record(Path(), [], {})
  choice = Choice(flags["only"], flags["from"], flags["until"])
  if flags["compiled"] and not flags["dry_run"]:
    raise UserError(f"--compiled={flags['compiled']}: is read for --dry_run; give that too")
  if flags["show"] and flags["dry_run"]:
    raise UserError("--show: must be given without --dry_run, or that without it")
  if flags["show"]:
    say(tree(record))
  elif flags["dry_run"]:
    check(c)
    compiled, chosen = plan.read_compiled(flags["compiled"]), choice.of(gates.with_all_insertions(c))
    say(plan.table(c, [line for line in plan.plan(c, record) if line.stage in chosen], compiled))
    if missing := plan.not_here(c):
      say(f"not on this machine, and needed for the run: {listed(missing)}", sys.stderr)
  else:
    assert workdir is not None
    run(c, workdir, choice, wandb=flags["wandb"], trace=flags["trace"])


if __name__ == "__main__":
  launch(
    main,
    several=True,
    buckets=True,
    without_workdir=("dry_run",),
    dry_run=(flag("Print the plan of all stages, computing and writing nothing."), False),
    compiled=(text("For --dry_run: a file of what experiments.compile printed for this config."), ""),
    show=(flag("Print the tree of the work directory's stages, with scores and gates' decisions."), False),
    only=(text("Run this stage alone."), ""),
    until=(text("Run the stages up to this one."), ""),
    **{"from": (text("Run this stage and those after it; stages made from what is no more, anew."), "")},
    **FLAGS,
  )
