"""What the stages of a cascade were made from: their entries, those left behind by more steps, and what may run.

runtime/origin.py has the lineage of a single checkpoint.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nemocascade.errors import UserError, listed
from nemocascade.runtime import course
from nemocascade.runtime.course import Choice
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.origin import commit, config_hash, relative
from nemocascade.store.record import Record


def begun(c: ConfigDict, record: Record, name: str, start: str) -> dict[str, Any]:
  """The entry of cascade.json of a stage that begins.

  Args:
    c: the result of course.decided.
    start: the checkpoint that it starts from.
  """
  stage, parent, judge = course.flat(c, name), course.parent(c, name), course.judge_of(c, name)
  entry = {
    "name": name, "kind": stage.kind, "status": "running", "start": start, "domains": list(stage.get("mixture", {})),
    "asked_steps": stage.steps, "config": config_hash(stage), "commit": commit(),
    "parent": parent if parent in c.stages else "",
  }  # fmt: skip
  if judge:
    entry |= {"judge": record.checkpoint(judge), "judge_stage": judge}
  return entry | ({"teaches": list(stage.teaches)} if "teaches" in stage else {})


def is_grown(c: ConfigDict, record: Record, name: str) -> bool:
  """Whether the stage has finished, and the config gives it more steps since."""
  entry = record.stage(name)
  if entry is None or entry["status"] != "done":
    return False
  return c.stages[name].steps > entry.get("asked_steps", entry["steps"])


def stale(c: ConfigDict, record: Record, growing: Iterable[str]) -> dict[str, str]:
  """The begun stages that a stage has left behind which they were made from: name -> that stage.

  A stage is stale if its start, one of its teachers or its judge is another checkpoint now than when it began, if that
  is of a stage in `growing`, or of a stale stage.

  Args:
    c: the result of course.decided.
    growing: stages that are about to be given more steps.
  """
  found: dict[str, str] = {}
  growing = set(growing)
  for name in c.order:
    if (entry := record.stage(name)) is None:
      continue
    used = {course.parent(c, name): entry["start"], entry.get("judge_stage", ""): entry.get("judge", "")}
    used |= {t["stage"]: t["checkpoint"] for t in entry.get("teachers", {}).values()}
    for stage, checkpoint in used.items():
      if stage not in c.stages:  # A checkpoint from outside, or none.
        continue
      of_stage = record.stage(stage) or {}
      if (
        stage in growing
        or stage in found
        or (of_stage.get("status") == "done" and of_stage["checkpoint"] != checkpoint)
      ):
        found.setdefault(name, stage)
  return found


def check_choice(c: ConfigDict, record: Record, choice: Choice) -> list[str]:
  """Checks that the chosen stages can run. Returns those that --from trains anew.

  Raises:
    UserError: a chosen stage was made from what has changed since, and --from isn't given; or it needs a stage that
      has not finished; or a stage is not known.
  """
  now = course.decided(c, record)
  chosen = choice.of(now)
  # A stage that runs, and that others began from, was given more steps by an earlier call.
  growing = [n for n in chosen if is_grown(now, record, n) or (record.stage(n) or {}).get("status") == "running"]
  anew = {name: cause for name, cause in stale(now, record, growing).items() if name in chosen}
  if anew and not choice.first:
    _refuse(anew, growing)
  check_ready(now, record, chosen)
  return list(anew)


def _refuse(anew: Mapping[str, str], growing: Sequence[str]) -> None:
  first, cause = next(iter(anew.items()))
  if cause in growing:
    why = f"gets more steps: --until={cause} trains it alone; --from={cause} then trains them anew"
  else:
    why = f"is another now: --from={first} trains them anew; their old folders stay"
  raise UserError(f"stages {listed(anew, 60)} were made from {cause}, which {why}")


def check_ready(c: ConfigDict, record: Record, chosen: Sequence[str]) -> None:
  """Raises UserError if a chosen stage needs one that has not finished and is not chosen before it.

  Args:
    c: the result of course.decided.
  """
  for i, name in enumerate(chosen):
    stage = c.stages[name]
    needed = {"init_from": course.parent(c, name), "judge": course.judge_of(c, name)}
    needed |= {f"teachers.{domain}": teacher for domain, teacher in stage.get("teachers", {}).items()}
    for field, other in needed.items():
      if other not in c.stages or other in chosen[:i]:
        continue
      if not record.is_done(other):
        raise UserError(f"stages.{name}.{field}: stage {other!r} is not trained yet; --from={other} begins with it")
      if is_grown(c, record, other):
        raise UserError(f"stages.{name}.{field}: stage {other!r} gets more steps; --from={other} begins with it")


def set_aside(record: Record, names: Iterable[str]) -> None:
  """Renames the folders of stages that are trained anew to NAME.was1 (or 2, ...), and moves their entries aside.

  What a killed call left half done, the next one finishes.
  """
  workdir = record.path.parent
  renamed: dict[str, str] = {}
  for name in names:
    entry = record.stage(name)
    assert entry is not None
    number = 1 + sum(e["name"].rpartition(".was")[0] == name for e in record.set_aside)
    there, target = workdir / name, workdir / f"{name}.was{number}"
    first_alone(
      lambda there=there, target=target: there.exists() and not target.exists() and there.rename(target),
      "stages that are set aside",
    )
    renamed |= {name: target.name}
    moved = entry | {"name": target.name, "parent": renamed.get(entry.get("parent", ""), entry.get("parent", ""))}
    for field in ("checkpoint", "start"):
      stage, slash, rest = relative(entry.get(field, ""), workdir).partition("/")
      if slash and stage in renamed:
        moved[field] = f"{workdir}/{renamed[stage]}/{rest}"
    record.set_aside = [*record.set_aside, moved]
    record.stages = [e for e in record.stages if e is not entry]
    record.save()
