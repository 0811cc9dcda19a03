"""The course of a cascade: its stages in order, what each needs of others, and what gates' decisions change in that."""

import contextlib
import dataclasses
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from nemocascade.errors import UserError, unknown
from nemocascade.runtime import loading
from nemocascade.runtime.checks import judged
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.teachers import BEST
from nemocascade.store.record import Record, circle, parent_of

OWN = ("about", "stages", "order", "side_line", "recovery")  # Fields of a cascade that no stage has.


def open_record(workdir: Path) -> Record:
  """The record of a work directory, as the first process reads it, so that all processes decide alike."""
  found = Record.open(workdir)
  fields = exchange([found.stages, found.teachers, found.set_aside], "record of the cascade")[0]
  return Record(found.path, *fields)


def flat(c: ConfigDict, name: str) -> ConfigDict:
  """A stage's config as its own file gives it: the shared fields, updated with its own."""
  stage = ConfigDict({k: v for k, v in c.items() if k not in OWN})
  stage.update(c.stages[name])
  return stage


def main_line(c: ConfigDict, name: str) -> list[str]:
  """The stages before this one without c.side_line. The last of them is "previous"."""
  return [n for n in c.order[: c.order.index(name)] if n not in c.side_line]


def inserted_name(name: str) -> str:
  """The name of the MOPD stage that a gate of the stage `name` inserts after it."""
  return f"mopd_after_{name}"


def with_mopd_after(c: ConfigDict, names: Iterable[str]) -> ConfigDict:
  """The config with a stage of c.recovery's config inserted after each of the named stages.

  It starts from the stage before it and has the best teacher for each domain of its mixture, and no gates.
  """
  names = set(names)
  if not names:
    return c
  out = c.copy_and_resolve_references()
  with out.unlocked(), out.ignore_type():
    for name in names:
      stage = c.stages[c.recovery].copy_and_resolve_references()
      stage.unlock()
      stage.init_from, stage.gates = name, ConfigDict()
      stage.teachers = ConfigDict(dict.fromkeys(stage.mixture, "best"))
      out.stages[inserted_name(name)] = stage
    out.order = tuple(n for name in c.order for n in ((name, inserted_name(name)) if name in names else (name,)))
  return out


def decided(c: ConfigDict, record: Record) -> ConfigDict:
  """The config as the decisions in the record change it.

  After a decision "mopd" a stage is inserted; after "back" the stage is in side_line, so "previous" passes over it.
  """
  decisions = {name: (record.stage(name) or {}).get("decision") for name in c.order}
  out = with_mopd_after(c, [name for name in c.order if decisions[name] == "mopd"])
  if gone_back := [name for name in c.order if decisions[name] == "back"]:
    out = out.copy_and_resolve_references()
    with out.unlocked(), out.ignore_type():
      out.side_line = (*c.side_line, *gone_back)
  return out


def parent(c: ConfigDict, name: str) -> str:
  """The stage or the checkpoint that a stage starts from; "" for fresh parameters."""
  return parent_of(name, c.stages[name].init_from, main_line(c, name))


def check_no_circle(c: ConfigDict) -> None:
  """Raises UserError if stages start from one another in a circle, or take their teachers so."""
  needs = {}
  for name in c.order:
    stage = c.stages[name]
    needs[name] = [stage.init_from, *stage.get("teachers", {}).values()]
  if found := circle(needs):
    raise UserError(
      f"stages.{found[0]}: stages need one another in a circle: {' <- '.join(found)}; give one another start"
    )


@contextlib.contextmanager
def inside(section: str):
  """Prefixes the message of a UserError with the config section."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{section}: {error}") from error


def check_place(c: ConfigDict, name: str) -> None:
  """Raises UserError if no earlier stage gives the stage its start, a teacher or the judge."""
  stage, before = c.stages[name], c.order[: c.order.index(name)]
  models = [n for n in before if c.stages[n].kind != "reward_model"]  # They save language models.
  later = [n for n in c.order if n not in before]
  begin = stage.init_from
  if stage.kind == "rl" and begin == "":
    raise UserError("init_from='': an RL stage starts from a stage before it; give 'previous', or its name")
  if stage.kind == "rl" and begin == "previous" and not set(main_line(c, name)) & set(models):
    raise UserError(f"init_from='previous': no stage of the main line is before it; there are {sorted(models)}")
  if begin in later:
    raise UserError(
      f"init_from={begin!r}: comes later in `order`, so it is not trained yet; there are {sorted(models)}"
    )
  other = stage.kind == "sft" and loading.is_checkpoint(begin)  # For example a base model, hf:DIR.
  if begin not in ("", "previous", *models) and not other:
    raise unknown("init_from", begin, ["previous", *models])
  for domain in stage.get("teaches", ()):
    if domain not in c.domains:
      raise unknown("domain in teaches", domain, c.domains)
  if stage.kind == "rl":
    for domain, teacher in stage.teachers.items():
      if teacher in later:
        raise UserError(
          f"teachers.{domain}={teacher!r}: comes later in `order`, so it is not trained yet; give one before"
        )
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


def left(c: ConfigDict, record: Record, choice: "Choice", passed: Container[str]) -> list[str]:
  """The stages up to the last chosen one that are not in `passed`, in their order, as decided so far."""
  now = decided(c, record)
  end = now.order.index(choice.of(now)[-1])
  return [name for name in now.order[: end + 1] if name not in passed]


def judge_of(c: ConfigDict, name: str) -> str:
  """The stage whose reward model judges in this stage; "" if it needs no judge."""
  if c.stages[name].kind != "rl" or not judged(c.stages[name], c):
    return ""
  return next(n for n in reversed(c.order[: c.order.index(name)]) if c.stages[n].kind == "reward_model")


@dataclasses.dataclass(frozen=True)
class Choice:
  """The stages that --only, or --from and --until, choose; all of them without these flags."""

  only: str = ""
  first: str = ""
  last: str = ""

  def of(self, c: ConfigDict) -> list[str]:
    """The chosen stages, in their order.

    Raises:
      UserError: a stage isn't in `order`, or the flags contradict each other.
    """
    order = list(c.order)
    for flag, name in (("--only", self.only), ("--from", self.first), ("--until", self.last)):
      if name and name not in order:
        raise unknown(f"stage in {flag}", name, order)
    if self.only and (self.first or self.last):
      raise UserError(f"--only={self.only}: must be given without --from and --until")
    begin, end = order.index(self.only or self.first or order[0]), order.index(self.only or self.last or order[-1])
    if begin > end:
      raise UserError(f"--from={self.first}: comes after --until={self.last} in `order`")
    return order[begin : end + 1]
