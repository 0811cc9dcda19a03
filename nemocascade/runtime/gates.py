"""Gates of a cascade: how much of a domain's score a stage may lose, and what follows if it loses more.

  c.stages.code_rl.gates = dict(math=dict(tolerance=0.02, action="back"))

A gate compares the held-out scores after a stage with those of the stage that it started from, prompt by prompt. It
fires if the 95% interval of the mean difference lies below -tolerance as a whole, so noise alone rarely fires it. What
was found and decided is in the stage's entry of cascade.json; a resumed cascade reads it there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nemocascade.errors import StageStopped, UserError, unknown
from nemocascade.evaluate.statistics import paired_interval
from nemocascade.runtime.course import inserted_name, main_line, with_mopd_after
from nemocascade.store.record import differences, parent_of

# What follows, from the weakest to the strongest; of several gates that fire the strongest counts.
#   warn: a line on stderr.
#   mopd: the stage `c.recovery` runs next, from this stage, with the best teacher of each of its domains.
#   back: the next stage starts where this one did; this one stays beside the main line, and may still teach.
#   stop: the cascade ends; --from=STAGE goes on after it.
ACTIONS = ("warn", "mopd", "back", "stop")
PASS = "pass"


def check(c: ConfigDict) -> None:
  """Raises UserError if a gate of a stage can't be applied. Nothing is computed or written."""
  if (recovery := c.get("recovery", "")) and recovery not in c.stages:
    raise unknown("stage in recovery", recovery, c.stages)
  for name in c.order:
    for domain, gate in of(c.stages[name]).items():
      where = f"stages.{name}.gates.{domain}"
      if domain not in c.domains:
        raise unknown(f"domain in stages.{name}.gates", domain, c.domains)
      for field in ("tolerance", "action"):
        if field not in gate:
          raise UserError(f"{where}.{field} is missing: a gate has a tolerance and an action ({', '.join(ACTIONS)})")
      if c.stages[name].kind == "reward_model":
        raise UserError(f"{where}: a reward model has no held-out scores of domains; remove the gate")
      if parent_of(name, c.stages[name].init_from, main_line(c, name)) not in c.stages:
        raise UserError(
          f"{where}: the stage starts from no stage, so there is no score to compare with; remove the gate"
        )
      if name in c.side_line and gate.action in ("back", "mopd"):
        raise UserError(
          f"{where}.action={gate.action!r}: {name!r} is in side_line, so no stage goes on from it; give warn or stop"
        )
      if gate.action == "mopd":
        _check_recovery(c, name, domain)


def _check_recovery(c: ConfigDict, name: str, domain: str) -> None:
  where, recovery = f"stages.{name}.gates.{domain}.action='mopd'", c.get("recovery", "")
  if not recovery:
    raise UserError(f"{where}: needs `recovery`, the stage whose config the inserted MOPD stage has")
  if c.stages[recovery].kind != "rl":
    raise UserError(f"recovery={recovery!r}: is of kind {c.stages[recovery].kind!r}; must be an RL stage with teachers")
  if domain not in c.stages[recovery].mixture:
    raise UserError(f"{where}: recovery={recovery!r} has no {domain!r} in its mixture, so it could not recover it")
  if inserted_name(name) in c.stages:
    raise UserError(f"stages.{inserted_name(name)}: is the name of the stage that the gate inserts; rename yours")


def of(stage: Mapping[str, Any]) -> Mapping[str, Any]:
  """The gates of a stage's config: domain -> its tolerance and action."""
  return stage.get("gates", {})


def with_all_insertions(c: ConfigDict) -> ConfigDict:
  """The config with every stage that a gate may insert, to check them before a run."""
  may = [name for name in c.order if any(gate.action == "mopd" for gate in of(c.stages[name]).values())]
  return with_mopd_after(c, may)


def judge(stage: Mapping[str, Any], after: dict, before: dict) -> dict[str, Any]:
  """What the gates of a stage find, as fields of its entry: `gates` and `decision`; {} if it has no gate.

  Args:
    stage: its config.
    after, before: its entry of cascade.json with the scores after it, and the entry of the stage it started from.
  """
  found = {}
  for domain, gate in sorted(of(stage).items()):
    d_N = differences(after, before, domain)
    low, high = paired_interval(d_N)
    found[domain] = {
      "tolerance": float(gate["tolerance"]),
      "action": gate["action"],
      "change": float(d_N.mean()) if len(d_N) else 0.0,
      "interval": [low, high],
      "fell": high < -gate["tolerance"],
    }
  if not found:
    return {}
  fired = [gate["action"] for gate in found.values() if gate["fell"]]
  return {"gates": found, "decision": max(fired, key=ACTIONS.index) if fired else PASS}


def obey(entry: dict | None, following: Sequence[str]) -> None:
  """Raises StageStopped if a gate of the finished stage ended the cascade.

  Args:
    following: the stages after it.
  """
  if entry and entry.get("decision") == "stop":
    raise StageStopped(line(entry, following))


def line(entry: dict, following: Sequence[str] = ()) -> str:
  """What a stage's gates decided, for messages; "" if none fired.

  Args:
    following: the stages after it.
  """
  fell = [
    f"{domain} changed by {gate['change']:+.3f} [{gate['interval'][0]:+.3f}, {gate['interval'][1]:+.3f}],"
    f" below -{gate['tolerance']:g}"
    for domain, gate in entry.get("gates", {}).items()
    if gate["fell"]
  ]
  if not fell:
    return ""
  then = {
    "warn": "the cascade goes on",
    "mopd": f"{inserted_name(entry['name'])} follows",
    "back": f"the next stage starts from {entry['parent']}, before it",
    "stop": f"the cascade ends here{f'; --from={following[0]} goes on' if following else ''}",
  }[entry["decision"]]
  return f"gates of {entry['name']}: {'; '.join(fell)}: {then}"
