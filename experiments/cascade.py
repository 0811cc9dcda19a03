"""Runs the whole cascade: the stages in order, with a score of every domain before and after each.

  python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/tiny

Run the same command again to resume: finished stages are skipped, and an interrupted one continues from its
last checkpoint.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import reward_model, rl, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.report import pages
from nemocascade.report.metrics import CompileCounter
from nemocascade.runtime import domains, loading, objective, parts, termination
from nemocascade.runtime.checks import check_evaluation, judged
from nemocascade.runtime.heldout import Heldout, draw_heldout
from nemocascade.runtime.hosts import exchange, first_alone
from nemocascade.runtime.launch import launch
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.start import check_start
from nemocascade.runtime.teachers import BEST, find, gather, probe_tokens, take_probe
from nemocascade.runtime.watching import FLAGS, Watching
from nemocascade.runtime.workdir import check_owner, claim, keep_compilations
from nemocascade.store.record import Record, columns

KINDS = {"sft": sft, "rl": rl, "reward_model": reward_model}


def check(c: ConfigDict) -> None:
  """Raises UserError if the cascade cannot run to its end. Nothing is computed or written."""
  check_fields(c, "cascade")
  ModelConfig.from_fields(c.model.to_dict())
  domains.check(c)
  for field, names, known in (
    ("order", c.order, c.stages), ("side_line", c.side_line, c.stages), ("evaluation.greedy", c.evaluation.greedy, c.order),
  ):  # fmt: skip
    for name in names:
      if name not in known:
        raise unknown(f"stage in {field}", name, known)
  check_evaluation(c, "evaluation.completions", c.evaluation.completions)
  for name in c.order:
    with inside(f"stages.{name}"):
      KINDS[c.stages[name].kind].check(flat(c, name))
      _check_place(c, name)


def _check_place(c: ConfigDict, name: str) -> None:
  """Raises UserError if no earlier stage gives the stage its start, a teacher or the judge."""
  stage, before = c.stages[name], c.order[: c.order.index(name)]
  models = [n for n in before if c.stages[n].kind != "reward_model"]  # They save language models.
  begin = stage.init_from
  if stage.kind == "rl" and begin == "":
    raise UserError("init_from='': an RL stage starts from a stage before it; give 'previous', or its name")
  if stage.kind == "rl" and begin == "previous" and not set(main_line(c, name)) & set(models):
    raise UserError(f"init_from='previous': no stage of the main line is before it; there are {sorted(models)}")
  other = stage.kind == "sft" and loading.is_checkpoint(begin)  # For example a base model, hf:DIR.
  if begin not in ("", "previous", *models) and not other:
    raise unknown("init_from", begin, ["previous", *models])
  if stage.kind == "rl":
    for domain, teacher in stage.teachers.items():
      if teacher not in (BEST, *models) and not loading.is_checkpoint(teacher):
        raise unknown(f"teachers.{domain}", teacher, [BEST, *models])
    check_judge(c, stage, before)


def check_judge(c: ConfigDict, stage: ConfigDict, before: Sequence[str]) -> None:
  """Raises UserError if an RL stage needs a judge, and no stage of `before` is a reward model."""
  if stage.judge:
    raise UserError(
      f"judge={stage.judge!r}: must be empty in a cascade, where the stage of kind 'reward_model' is the judge"
    )
  if (why := judged(stage, c)) and not any(c.stages[n].kind == "reward_model" for n in before):
    raise UserError(f"{why}: needs a judge, and no stage before it has kind='reward_model'; add one to `order`")


@contextlib.contextmanager
def inside(section: str):
  """Prefixes the message of a UserError with the config section."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{section}: {error}") from error


def main_line(c: ConfigDict, name: str) -> list[str]:
  """The stages before this one without c.side_line. The last of them is "previous"."""
  return [n for n in c.order[: c.order.index(name)] if n not in c.side_line]


def check_programs(c: ConfigDict, p: Parts) -> None:
  """Checks that need the parts of the run: rows over the mesh, parameter names, checkpoints, prompts.

  Raises:
    UserError: a stage cannot run.
  """
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


def flat(c: ConfigDict, name: str) -> ConfigDict:
  """A stage's config as its own file gives it: the shared fields, updated with its own."""
  shared = {k: v for k, v in c.items() if k not in ("stages", "order", "side_line")}
  stage = ConfigDict(shared)
  stage.update(c.stages[name])
  return stage


def scores(c: ConfigDict, p: Parts, heldout: Heldout, params, name: str) -> tuple[dict, dict]:
  """Scores all held-out domains after the named stage.

  Returns:
    (score fields of the stage's entry, {"eval_s_after": seconds})
  """
  began = time.time()
  sampled = heldout.evaluate(p, params, temperature=1.0, completions=c.evaluation.completions)
  fields = columns(sampled, "after")
  if name in c.evaluation.greedy:
    greedy = heldout.evaluate(p, params, temperature=0.0)
    fields |= columns(greedy, "after", prefix="greedy")
  fields["n_eval"] = {name: score.prompts for name, score in sampled.items()}
  return fields, {"eval_s_after": time.time() - began}


def run(c: ConfigDict, workdir: Path, wandb: str = "", trace: str = "") -> Record:
  """Runs what is left of the cascade; returns its record."""
  check(c)
  watching = Watching.of(wandb, trace)
  check_owner(c, workdir)
  p = parts.build(c, workdir)
  check_programs(c, p)
  heldout = draw_heldout(c, p.domains, p.text.tokenizer)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text), watching=watching)
  keep_compilations(workdir)
  record, began = Record.open(workdir), time.time()
  record.stages, record.teachers = exchange([record.stages, record.teachers], "record of the cascade")[0]
  for name in c.order:
    p = finish_stage(c, workdir, p, heldout, record, name)
    first_alone(lambda: pages.write(workdir))
    if termination.stopping():
      raise termination.terminated(record.checkpoint(name))
  say(f"cascade finished in {time.time() - began:.0f} s: {workdir / 'report' / 'index.html'}")
  return record


def finish_stage(c: ConfigDict, workdir: Path, p: Parts, heldout: Heldout, record: Record, name: str) -> Parts:
  """Runs a stage unless it is done. Returns the parts of the stages after it: a reward model becomes the judge."""
  entry = record.stage(name)
  if entry is None or entry["status"] != "done":
    run_stage(c, workdir, p, heldout, record, name)
  return parts.with_judge(c, p, record.checkpoint(name)) if c.stages[name].kind == "reward_model" else p


def run_stage(c: ConfigDict, workdir: Path, p: Parts, heldout: Heldout, record: Record, name: str) -> None:
  """Trains one stage, scores it, and writes its entry."""
  stage, began = flat(c, name), time.time()
  init = record.start_of(name, stage.init_from, main_line(c, name))
  previous = record.stage(name) or {}
  entry = {
    "name": name,
    "kind": stage.kind,
    "status": "running",
    "start": init,
    "domains": list(stage.get("mixture", {})),
    "wall_s": previous.get("wall_s", 0.0),
  }
  if stage.kind == "rl":  # Scores before the stage: those of the stage that it starts from.
    source = next(e for e in record.stages if e.get("checkpoint") == init)
    for key in ("scores", "scores_intervals", "greedy", "greedy_intervals"):
      if f"{key}_after" in source:
        entry[f"{key}_before"] = source[f"{key}_after"]
  record.put(entry)

  extra = {}
  if stage.kind == "rl" and objective.taught(stage):
    found = find(stage, record)
    extra["teachers"] = gather(p.programs, p.text.tokenizer, found, stage.teachers_in_memory, heldout.rows)
    record.teachers = {t.domain: {"checkpoint": t.checkpoint, "score": t.score, "stage": t.stage} for t in found}
  with CompileCounter() as compiled:
    outcome = KINDS[stage.kind].run(stage, workdir / name, p, init, **extra)
  entry |= {
    "steps": outcome.steps,
    "checkpoint": outcome.checkpoint,
    "tokens": outcome.tokens,
    "train_s": outcome.wall_s,
    "compilations": compiled.count,
  }
  if stage.kind != "reward_model":
    fields, seconds = scores(c, p, heldout, outcome.params, name)
    probe = take_probe(p.programs.score, outcome.params, probe_tokens(p.text.tokenizer, heldout.rows))
    entry |= fields | seconds | {"probe": dataclasses.asdict(probe)}
  entry |= {"status": "done", "wall_s": entry["wall_s"] + time.time() - began}
  record.put(entry)
  say(summary(entry))


def say(line: str) -> None:
  """Writes a line to the log; only in the first process."""
  if jax.process_index() == 0:
    tqdm.write(line)


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
    f" {entry['compilations']} compilations{': ' + moved if moved else ''}"
  )


if __name__ == "__main__":
  launch(run, several=True, **FLAGS)
