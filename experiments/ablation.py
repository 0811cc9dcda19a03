"""Compares training arms that share the student, prompts, evaluation, seeds and budget.

  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py --workdir=runs/ablation

Every seed trains its own student and teachers by a cascade, then every arm from that student. A
learning-rate search, if the config asks for one, runs first and uses other seeds. Run the same command again
to resume. Several processes may run it at once and divide the seeds between them. That speeds up tiny models
when each process has its own core (`taskset -c 0` and `-c 1`). All arms of a seed run in one process, so that
arms of equal shapes share compiled programs.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import cascade, rl
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.fields import shown
from nemocascade.model.size import matmul_params
from nemocascade.report import comparison, pages
from nemocascade.report.metrics import read_lines
from nemocascade.runtime import course, loading, objective, parts
from nemocascade.runtime.checks import check_evaluation
from nemocascade.runtime.heldout import Heldout, draw_heldout
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.sharing import each, held
from nemocascade.runtime.teachers import find, gather
from nemocascade.runtime.workdir import check_owner, claim, keep_compilations
from nemocascade.state_files import named, read_state, refused, write_json
from nemocascade.store.record import NUMBERS, Record

TURN = "turn"  # Name of the lock held while one process writes files that all share.
OWN = ("arms", "student", "teachers_of", "search", "seeds", "budget", "compared", "rate_of")
EVALUATION = {  # JSON schema of a comparison.Line.
  "type": "object",
  "required": ["steps", "tokens", "flops", "score", "domains"],
  "properties": {
    **{name: {"type": "integer", "minimum": 0} for name in ("steps", "tokens", "flops")},
    "score": {"type": "number"},
    "domains": NUMBERS,
  },
}
START = {
  "type": "object",
  "required": ["student", "teachers"],
  "properties": {"student": EVALUATION, "teachers": NUMBERS},
}
DONE = {
  "type": "object",
  "required": ["steps", "wall_s"],
  "properties": {"steps": {"type": "integer", "minimum": 1}, "wall_s": {"type": "number"}},
}


@dataclasses.dataclass(frozen=True)
class OfSeed:
  """The evaluations of one seed: its student, teachers and arms."""

  student: comparison.Line
  teachers: dict[str, float]  # Domain -> score.
  arms: dict[str, list[comparison.Line]]


def check(c: ConfigDict) -> None:
  """Raises UserError if the comparison cannot run to its end. Nothing is computed or written."""
  check_fields(c, "ablation")
  cascade.check(preparation(c, seed=0))
  if c.student not in c.order:
    raise unknown("student", c.student, c.order)
  if shared := set(c.seeds) & set(c.search.seeds):
    raise UserError(
      f"search.seeds={tuple(c.search.seeds)}: {sorted(shared)} are compared on too; must be none of seeds"
    )
  if c.compared.prompts > c.evaluation.prompts:
    raise UserError(f"compared.prompts={c.compared.prompts}: must be at most evaluation.prompts={c.evaluation.prompts}")
  check_evaluation(c, "compared.full_completions", c.compared.full_completions)
  for name in c.compared.domains:
    if name not in c.domains:
      raise unknown("domain in compared.domains", name, c.domains)
  if long := sorted(set(c.compared.domains) & set(c.evaluation.long_domains)):
    raise UserError(f"compared.domains: {long} are in evaluation.long_domains, whose prompts have no room here")
  for name in c.search.arms:
    if name not in c.arms:
      raise unknown("arm in search.arms", name, c.arms)
  for name, other in c.rate_of.items():
    for what, value in (("arm", name), (f"rate_of.{name}", other)):
      if value not in c.arms:
        raise unknown(what, value, c.arms)
    if other in c.rate_of or name in c.search.arms:
      raise UserError(
        f"rate_of.{name}={other!r}: must be an arm without a rate_of, and {name!r} must not be one of search.arms"
      )
  check_steps(c)
  for domain, name in c.teachers_of.items():
    if name not in c.order:
      raise unknown(f"teachers_of.{domain}", name, c.order)
  for name in c.arms:
    arm = arm_config(c, name, seed=0)
    with course.inside(f"arms.{name}"):
      rl.check(arm)
      course.check_judge(c, arm, c.order)
      if arm.get("validation"):
        raise UserError("validation: must be empty in a comparison, which scores its arms at `compared`'s steps")
    for domain, teacher in arm.teachers.items():
      if teacher not in c.order:
        raise unknown(f"arms.{name}.teachers.{domain}", teacher, c.order)
    for domain in c.arms[name].mixture:
      if domain not in c.compared.domains:
        raise UserError(f"compared.domains={tuple(c.compared.domains)}: arm {name!r} learns {domain!r}, unscored")


def check_steps(c: ConfigDict) -> None:
  """Raises UserError if no arm can spend the budget or reach a scored step, or if an arm is compared with itself."""
  longest = max(arm.steps for arm in c.arms.values())
  unit, amount, most = c.budget.unit, c.budget.amount, max(most_spent(c, name) for name in c.arms)
  kind = "a whole number" if unit == "steps" else "a number"
  if not 1 <= amount <= most or (unit == "steps" and amount % 1):
    raise UserError(
      f"budget.amount={shown(amount)}: must be {kind} of at least 1 and at most {most:g}, the most {unit} of an arm"
    )
  for field in ("at", "full_at"):
    if (last := max(c.compared[field], default=0)) > longest:
      raise UserError(f"compared.{field}: has step {last}; must be at most {longest}, the steps of the longest arm")
  for field in ("pairs", "ends"):
    for a, b in c.compared[field]:
      for name in (a, b):
        if name not in c.arms:
          raise unknown(f"arm in compared.{field}", name, c.arms)
      if a == b:
        raise UserError(f"compared.{field}: compares {a!r} with itself; must be two arms")


def most_spent(c: ConfigDict, name: str) -> int:
  """An upper bound of what an arm spends, in the budget's unit: every completion has the greatest length."""
  arm, r = c.arms[name], c.arms[name].rollout
  tokens = arm.steps * arm.refill_rounds * r.prompts * r.completions * r.total_tokens
  if c.budget.unit != "flops":
    return tokens if c.budget.unit == "tokens" else arm.steps
  # Teachers, a reference and the proximal policy score a token at most once each.
  spent = Spent(sampled=tokens, prefilled=tokens, scored=3 * tokens, trained=tokens * arm.updates)
  return spent.flops(matmul_params(ModelConfig.from_fields(c.model.to_dict())))


def preparation(c: ConfigDict, seed: int) -> ConfigDict:
  """The config of the cascade that trains a seed's student and teachers. It has no gates."""
  out = ConfigDict({name: value for name, value in c.items() if name not in OWN}).copy_and_resolve_references()
  out.seed = seed
  for stage in out.stages.values():
    if "gates" in stage:
      stage.gates = ConfigDict()
  return out


def arm_config(c: ConfigDict, name: str, seed: int, **changes) -> ConfigDict:
  """The stage config of one arm: shared fields, the arm's own, then `changes` (dotted name -> value)."""
  out = ConfigDict({k: v for k, v in c.items() if k not in (*OWN, *course.OWN)})
  out.update(c.arms[name].copy_and_resolve_references())  # A copy: `changes` must not alter c.
  out.seed = seed
  out.update_from_flattened_dict(changes)
  return out


def prepare(c: ConfigDict, p: Parts, heldout: Heldout, workdir: Path, seed: int) -> tuple[Parts, Heldout, Record]:
  """Trains a seed's student and teachers, unless done.

  Returns:
    (the parts for the seed's arms, with the seed's judge; the held-out rows, sampled with this seed; its record)
  """
  own, record = preparation(c, seed), Record.open(workdir)
  heldout = dataclasses.replace(heldout, seed=seed)
  for name in c.order:
    p = cascade.finish_stage(own, workdir, p, heldout, record, name)
  return p, heldout, record


def scores(c: ConfigDict, p: Parts, heldout: Heldout, params, *, full: bool) -> dict[str, float]:
  """Domain -> held-out score. Every call with one seed uses the same prompts and random numbers."""
  e = c.compared
  prompts, G = (c.evaluation.prompts, e.full_completions) if full else (e.prompts, 1)
  some = {name: spread(heldout.rows[name], prompts) for name in e.domains}
  found = dataclasses.replace(heldout, rows=some).evaluate(p, params, temperature=1.0, completions=G)
  return {name: found[name].mean for name in e.domains}


def spread(rows: list, count: int) -> list:
  """`count` of the rows, or all if there are fewer, taken evenly: prompts near the start are more common and so easier."""
  count = min(count, len(rows))
  return [rows[i * len(rows) // count] for i in range(count)]


def line(c: ConfigDict, p: Parts, heldout: Heldout, params, spent: Spent, steps: int, *, full: bool) -> comparison.Line:
  found = scores(c, p, heldout, params, full=full)
  return {
    "steps": steps, "tokens": spent.sampled, "flops": spent.flops(matmul_params(p.programs.config)),
    "score": float(np.mean(list(found.values()))), "domains": found,
  }  # fmt: skip


def watcher(c: ConfigDict, p: Parts, heldout: Heldout, path: Path, last_step: int) -> Callable:
  """The `watch` of an arm: evaluates at the config's steps and at the end, and ends a spent budget.

  Evaluations go to `path`; one that is there already is not repeated.
  """
  done = {entry["steps"] for entry in read_lines(path, EVALUATION)}

  def watch(steps: int, params, spent: Spent) -> bool:
    cost = {"steps": steps, "tokens": spent.sampled, "flops": spent.flops(matmul_params(p.programs.config))}
    ended = cost[c.budget.unit] >= c.budget.amount or steps == last_step
    full = ended or steps in c.compared.full_at
    if steps not in done and (full or steps in c.compared.at):
      done.add(steps)
      append(path, line(c, p, heldout, params, spent, steps, full=full))
    return ended

  return watch


def append(path: Path, value: dict) -> None:
  """Appends one JSON line and flushes it to disk. Removes an incomplete last line first."""
  with named(path), path.open("ab+") as file:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def run_arm(
  arm: ConfigDict, c: ConfigDict, p: Parts, heldout: Heldout, record: Record, directory: Path, first: dict
) -> list:
  """Trains the arm, unless done. Returns its evaluations by step; `first`, the student's, comes first.

  Raises:
    UserError: the file of evaluations of a finished arm lacks some.
  """
  path = directory / "evaluations.jsonl"
  if not (directory / "done.json").exists():
    directory.mkdir(parents=True, exist_ok=True)
    teachers = None
    if objective.taught(arm):
      teachers = gather(p.programs, p.text.tokenizer, find(arm, record.stages), arm.teachers_in_memory, heldout.rows)
    watch = watcher(c, p, heldout, path, arm.steps)
    # All arms sample with the same random numbers: their key depends on the folder's name, here "rl".
    title = f"seed {arm.seed} {directory.name}"
    outcome = rl.run(arm, directory / "rl", p, record.checkpoint(c.student), teachers, watch, title=title)
    write_json(directory / "done.json", {"steps": outcome.steps, "wall_s": outcome.wall_s})
  steps = read_state(directory / "done.json", DONE, remedy=f"remove {directory}")["steps"]
  lines = sorted(read_lines(path, EVALUATION), key=lambda entry: entry["steps"])
  wanted = {step for step in (*c.compared.at, *c.compared.full_at, steps) if step <= steps}
  if lacking := wanted - {entry["steps"] for entry in lines}:
    raise refused(path, f"lacks the evaluations of steps {sorted(lacking)}", f"remove {directory}")
  return [first, *lines]


def start_of(c: ConfigDict, p: Parts, heldout: Heldout, record: Record, workdir: Path) -> tuple[dict, dict]:
  """(the student's evaluation at step 0, domain -> its teacher's score), evaluated as the arms are.

  Cached in start.json.
  """
  path = workdir / "start.json"
  if not path.exists():
    load = lambda name: loading.load(record.checkpoint(name), p.programs.template)
    student = line(c, p, heldout, load(c.student), Spent(), 0, full=True)
    of = {name: scores(c, p, heldout, load(name), full=True) for name in dict.fromkeys(c.teachers_of.values())}
    teachers = {domain: of[name][domain] for domain, name in c.teachers_of.items()}
    write_json(path, {"student": student, "teachers": teachers})
  value = read_state(path, START, remedy="remove it")
  return value["student"], value["teachers"]


def search(c: ConfigDict, p: Parts, heldout: Heldout, workdir: Path) -> dict[str, float]:
  """Arm -> its best peak learning rate, for the arms of c.search; {} if there are none.

  Every arm gets the same rates, seeds and number of steps. Writes search/search.json.
  """
  if not c.search.arms:
    return {}
  short = c.copy_and_resolve_references()
  short.compared.update(at=(), full_at=())  # Only the score at the end is used.

  place = lambda seed: workdir / "search" / f"seed_{seed}"

  def ends(seed: int) -> dict[str, dict[str, float]]:
    own, scored, record = prepare(c, p, heldout, place(seed), seed)
    first, _ = start_of(c, own, scored, record, place(seed))

    def end(name: str, rate: float) -> float:
      arm = arm_config(c, name, seed, **{"optimizer.peak_lr": rate, "steps": c.search.steps})
      return run_arm(arm, short, own, scored, record, place(seed) / f"{name}_{rate:g}", first)[-1]["score"]

    return {name: {str(rate): end(name, rate) for rate in c.search.rates} for name in c.search.arms}

  *_, found = each(c.search.seeds, place, ends)
  scores = {n: {str(r): [found[s][n][str(r)] for s in c.search.seeds] for r in c.search.rates} for n in c.search.arms}
  best = {name: float(max(of, key=lambda rate, of=of: np.mean(of[rate]))) for name, of in scores.items()}
  with held(workdir, wait=True, name=TURN):
    write_json(workdir / "search" / "search.json", {"scores": scores, "best": best})
  return best


def run_seed(c: ConfigDict, p: Parts, heldout: Heldout, workdir: Path, seed: int, rates: dict[str, float]) -> OfSeed:
  """Trains the unfinished stages and arms of a seed; returns all its evaluations."""
  p, heldout, record = prepare(c, p, heldout, workdir, seed)
  student, teachers = start_of(c, p, heldout, record, workdir)
  arms, equal = {}, {}
  for name in c.arms:
    arm = arm_config(c, name, seed, **{"optimizer.peak_lr": rates[name]})
    # Arms whose configs are equal are run once.
    directory = equal.setdefault(arm.to_json_best_effort(sort_keys=True), workdir / "arms" / name)
    arms[name] = run_arm(arm, c, p, heldout, record, directory, student)
  pages.write(workdir)
  return OfSeed(student, teachers, arms)


def publish(c: ConfigDict, workdir: Path, found: dict[int, OfSeed], rates: dict[str, float]) -> dict:
  """Writes and prints the comparison of the seeds that are done; returns the content of ablation.json."""
  students, teachers = [of.student for of in found.values()], [of.teachers for of in found.values()]
  arms = {name: [of.arms[name] for of in found.values()] for name in c.arms}
  out = comparison.compare(
    list(found),
    [s["score"] for s in students],
    # The teachers' mean score. A domain without a teacher counts with the student's score.
    [float(np.mean([t.get(d, s["domains"][d]) for d in c.compared.domains]))
     for t, s in zip(teachers, students, strict=True)],
    arms, pairs=c.compared.pairs, ends=c.compared.ends, steps=c.compared.full_at,
    reach=c.compared.reach,
  )  # fmt: skip
  with held(workdir, wait=True, name=TURN):
    comparison.write(workdir, out, arms, students=[s["domains"] for s in students], teachers=teachers, rates=rates)
  tqdm.write(f"{len(found)} of {len(c.seeds)} seeds done\n{comparison.table(out)}")
  return out


def run(c: ConfigDict, workdir: Path) -> dict:
  """Runs what is left of the comparison; returns the content of ablation.json."""
  check(c)
  check_owner(c, workdir)
  own = preparation(c, seed=0)
  p = parts.build(own, workdir)
  cascade.check_programs(own, p)
  for name in c.arms:
    with course.inside(f"arms.{name}"):
      arm = arm_config(c, name, seed=0)
      objective.program(arm, p.programs)
      rl.check_prompts(arm, p)
  heldout = draw_heldout(own, p.domains, p.text.tokenizer)
  keep_compilations(workdir)
  with held(workdir, wait=True, name=TURN):  # Several processes may start at once.
    p = dataclasses.replace(p, text=claim(c, workdir, p.text, shared=True))
  best = search(c, p, heldout, workdir)
  found = {name: best.get(name, arm.optimizer.peak_lr) for name, arm in c.arms.items()}
  rates = {name: found[c.rate_of.get(name, name)] for name in c.arms}
  place = lambda seed: workdir / f"seed_{seed}"
  for found in each(c.seeds, place, lambda seed: run_seed(c, p, heldout, place(seed), seed, rates)):
    out = publish(c, workdir, found, rates)
  print(f"comparison done: {workdir / 'ablation.json'}, and its tables and figures beside it", file=sys.stderr)
  return out


if __name__ == "__main__":
  launch(run)
