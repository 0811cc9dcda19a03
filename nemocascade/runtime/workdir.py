"""Reserves a work directory for one config, and for one process at a time."""

import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade import own_code
from nemocascade.errors import UserError
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.sharing import own
from nemocascade.runtime.text import Text
from nemocascade.state_files import place, read_state, stands, write_json

# Fields that say how a run uses its machines, not what it computes: whoever resumes may have other machines.
OF_MACHINES = ("mesh", "pieces", "packing.pieces", "data_workers", "sandbox.workers")
CONFIG = {  # JSON schema of config.json.
  "type": "object",
  "required": ["config", "versions"],
  "properties": {
    "config": {"type": "object"},
    "versions": {"type": "object", "additionalProperties": {"type": "string"}},
    "own_code": {"type": "object", "additionalProperties": {"type": "string"}},
    "begun": {"type": "object", "additionalProperties": {"type": "string"}},
  },
}


def claim(c: ConfigDict, workdir: Path, text: Text, *, shared: bool = False, may_grow: bool = False) -> Text:
  """Reserves the work directory for this config and this process, and writes config.json and the tokenizer.

  Call it after all checks: it is the first call of a run that writes. Returns the text to go on with.

  Args:
    shared: other processes with the same config may use the directory too, each in its own part.
    may_grow: as in check_owner.

  config.json gets what this config may have anew: more steps, other fields of OF_MACHINES.

  Raises:
    UserError: the directory belongs to another config, or another process writes there.
  """
  check_owner(c, workdir, may_grow=may_grow)
  first_alone(lambda: own(workdir, shared=shared), "lock of the work directory")
  path = place(workdir) / "config.json"
  fields = json.loads(c.to_json_best_effort())
  content = {"config": fields, "versions": versions(), "own_code": own_versions(fields), "begun": begun()}
  first_alone(lambda: path.exists() or write_json(path, content), "config of the work directory")
  check_owner(c, workdir, may_grow=may_grow)  # Another process may have written it first.
  if not shared:
    first_alone(lambda: _rewrite(workdir, fields), "new config of the work directory")
  return text.write()


def keep_compilations(workdir: Path) -> None:
  """Keeps compiled programs in the work directory, unless JAX_COMPILATION_CACHE_DIR names another place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilations"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_owner(c: ConfigDict, workdir: Path, *, may_grow: bool = False) -> None:
  """Checks that the work directory is new, or belongs to this config. Fields of OF_MACHINES may differ.

  Args:
    may_grow: whether stages of a cascade may have more steps here than there.

  Raises:
    UserError: its config.json is damaged or differs, or a user's file that the config names has changed since;
      the message names the first differing field or file.
  """
  path = place(workdir) / "config.json"
  if not stands(path):
    return
  written = _written(workdir)
  before = written["config"]
  fields = json.loads(c.to_json_best_effort())
  _move(before, fields)
  if may_grow:
    _grow(before, fields)
  if found := difference(before, fields):
    name, there, here = found
    raise UserError(
      f"--workdir {path.parent} belongs to another config: {name} is {there!r} in its config.json and {here!r} here;"
      " choose another --workdir"
    )
  now = own_versions(fields)
  for word, version in written.get("own_code", {}).items():
    if now.get(word, version) != version:
      raise UserError(
        f"--workdir {path.parent} was begun with another version of the file of {word!r}: restore that file, or"
        " choose another --workdir"
      )


def _written(workdir: Path) -> dict:
  return read_state(place(workdir) / "config.json", CONFIG, remedy="choose another --workdir, or remove it")


def _rewrite(workdir: Path, fields: dict) -> None:
  """Gives config.json the config `fields` if it has another."""
  if (written := _written(workdir))["config"] != fields:
    write_json(place(workdir) / "config.json", written | {"config": fields})


def _move(before: dict, now: dict) -> None:
  """Gives `before` the fields of OF_MACHINES that are in `now`, also inside of stages and arms."""
  for group in ("stages", "arms"):
    for name, section in before.get(group, {}).items():
      _move(section, now.get(group, {}).get(name, {}))
  for field in OF_MACHINES:
    *parents, last = field.split(".")
    there, here = before, now
    for parent in parents:
      there, here = there.get(parent, {}), here.get(parent, {})
    if last in there and last in here:
      there[last] = here[last]


def _grow(before: dict, now: dict) -> None:
  """Changes `before` where a stage has more steps in `now`."""
  for name, stage in before.get("stages", {}).items():
    steps = now.get("stages", {}).get(name, {}).get("steps")
    if isinstance(steps, int) and steps > stage.get("steps", steps):
      stage["steps"] = steps


def difference(there, here, name: str = "config"):
  """(dotted field, value there, value here) of the first difference of two JSON values, or None."""
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(there.keys() | here.keys()):
      if key not in there or key not in here:
        return f"{name}.{key}", there.get(key, "absent"), here.get(key, "absent")
      if found := difference(there[key], here[key], f"{name}.{key}"):
        return found
    return None
  return None if there == here else (name, there, here)


def own_versions(fields) -> dict[str, str]:
  """FILE.py:NAME -> version of the file, for all such words in the values of a config."""
  if isinstance(fields, dict | list):
    values = fields.values() if isinstance(fields, dict) else fields
    return {word: version for value in values for word, version in own_versions(value).items()}
  return {fields: own_code.version(fields)} if isinstance(fields, str) and own_code.is_own(fields) else {}


def begun() -> dict[str, str]:
  """The command, the time and the machine of this process, for the report of the run that it begins."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  how = ["-m", spec.name] if spec else sys.argv[:1]
  devices = jax.devices()
  on_cpu = devices[0].platform == "cpu"
  held = f" {len(devices)} x {devices[0].device_kind}," if not on_cpu or len(devices) > 1 else ""
  return {
    "command": shlex.join(["python", *how, *sys.argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores,{held} {platform.system()},"
    f" Python {platform.python_version()}",
  }


def versions() -> dict[str, str]:
  """Package -> version, for the packages that results depend on; and this code's git description."""
  import subprocess
  from importlib.metadata import version

  found = {name: version(name) for name in ("jax", "flax", "optax", "numpy", "sentencepiece")}
  if shutil.which("git"):
    git = subprocess.run(
      ["git", "describe", "--always", "--dirty"],
      cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if git.returncode == 0:
      found["nemocascade"] = git.stdout.strip()
  return found
