"""What made a checkpoint, as its record says it: {"lineage": {"stage", "config", "commit", "start", "teachers"}}.

It stands beside the position in the data. Checkpoints in the work directory are named relative to it.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime.workdir import versions

SHAPE = {  # JSON schema of a checkpoint's lineage.
  "type": "object",
  "required": ["stage", "config", "commit", "start", "teachers"],
  "properties": {
    **{name: {"type": "string"} for name in ("stage", "config", "commit", "start")},
    "teachers": {"type": "object", "additionalProperties": {"type": "string"}},
  },
}


@functools.cache
def commit() -> str:
  """This code's git description, "-dirty" included if files have changed; "" outside a checkout."""
  return versions().get("nemocascade", "")


def config_hash(c: ConfigDict) -> str:
  """The first 12 hex digits of the SHA-256 of a config's JSON."""
  fields = json.dumps(json.loads(c.to_json_best_effort()), sort_keys=True)
  return hashlib.sha256(fields.encode()).hexdigest()[:12]


def stamp(c: ConfigDict, stage_dir: Path, start: str, teachers: Mapping[str, str]) -> dict[str, Any]:
  """The lineage of the checkpoints that a stage saves, as in SHAPE.

  Args:
    c: the stage's config.
    start: the checkpoint that it starts from.
    teachers: domain -> checkpoint of its teacher.
  """
  near = lambda checkpoint: relative(checkpoint, stage_dir.parent)
  return {
    "stage": stage_dir.name, "config": config_hash(c), "commit": commit(), "start": near(start),
    "teachers": {domain: near(checkpoint) for domain, checkpoint in sorted(teachers.items())},
  }  # fmt: skip


def relative(checkpoint: str, workdir: Path) -> str:
  """The checkpoint's path from the work directory if it is in there, else its whole path."""
  prefix = f"{workdir}/"
  return checkpoint.removeprefix(prefix)


def check_same_teachers(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Raises UserError if a resumed stage has other teachers than those it began with; names the first that differs.

  Args:
    before: the lineage in the checkpoint that the stage resumes from, or empty.
    now: its `stamp` now.
  """
  if not before:  # Of a version that wrote none.
    return
  there, here = before["teachers"], now["teachers"]
  for domain in sorted(there.keys() | here.keys()):
    if there.get(domain) != here.get(domain):
      raise UserError(
        f"{now['stage']} began with teachers.{domain}={there.get(domain, 'none')}, which now is"
        f" {here.get(domain, 'none')}: restore that teacher, pin it by teachers.{domain}, or choose another --workdir"
      )
