"""The command that a launcher starts on every host, and the steps that start it there."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

from nemocascade.errors import UserError
from nemocascade.fields import flag, text
from nemocascade.runtime.config_file import shown_path

ROOT = Path(__file__).parents[2]
FOLDER = "nemocascade"  # Where the code lies on the hosts, in the home directory.
DRY_RUN = (flag("Print the commands, and run none."), False)
COMMAND = "command"  # The positional argument of the launchers.
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # Of TPUs, clusters and workloads.


@dataclasses.dataclass(frozen=True)
class Step:
  """A program to run on this machine, with what it is for, and its standard input."""

  what: str
  words: list[str]
  stdin: str = ""


def checked(command: str) -> str:
  """The command for every host: the given one, with --distributed=auto.

  Raises:
    UserError: it is no command of this repository for several processes, or its work directory is no absolute path.
  """
  words = shlex.split(command)
  if words[:2] != ["python", "-m"] or not words[2:] or not words[2].startswith("experiments."):
    raise UserError(
      f"the command {command[:60]!r} must be 'python -m experiments.NAME ...', in quotes, as for a single machine"
    )
  path = ROOT / f"{words[2].replace('.', '/')}.py"
  if not path.exists():
    raise UserError(f"the command {command[:60]!r}: there is no {words[2]}")
  if not _takes(path, "several"):
    raise UserError(f"{words[2]} runs in one process: it cannot be started on several hosts")
  told = dict(word[2:].split("=", 1) for word in words[3:] if word.startswith("--") and "=" in word)
  if "distributed" in told:
    raise UserError(f"--distributed={told['distributed']}: leave it out of the command; it is added")
  workdir = told.get("workdir", "")
  if workdir.startswith("gs://") and not _takes(path, "buckets"):
    raise UserError(f"--workdir={shown_path(workdir)}: {words[2]} writes to a folder that all hosts share; give one")
  if not workdir.startswith(("/", "gs://")):
    raise UserError(
      f"--workdir={shown_path(workdir)}: must be an absolute path that all hosts share, or gs://BUCKET/FOLDER, given as"
      " --workdir=DIR"
    )
  return shlex.join([*words, "--distributed=auto"])


def _takes(path: Path, setting: str) -> bool:
  """Whether the page of experiments/ passes `setting` (several, buckets) to `launch`."""
  calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  return any(
    isinstance(call.func, ast.Name) and call.func.id == "launch" and keyword.arg == setting
    for call in calls
    for keyword in call.keywords
  )


def named(name: str, value: str) -> str:
  """The value of a flag that names something in the cloud. Raises UserError if it is missing or has another form."""
  if not NAME.fullmatch(value):
    raise UserError(f"--{name}={value!r}: must be a name of lower-case letters, digits and hyphens")
  return value


def name_of(what: str):
  """A flag that must be given."""
  return text(what), ""


def take(steps: list[Step], dry_run: bool) -> None:
  """Runs the steps in order, or prints them. Ends with the exit code of the first that fails."""
  for step in steps:
    print(f"# {step.what}\n{shlex.join(step.words)}", flush=True)
    if step.stdin:
      print(f"# with the input:\n{step.stdin}", flush=True)
    if not dry_run:
      try:
        code = subprocess.run(step.words, input=step.stdin or None, text=True, cwd=ROOT, check=False).returncode
      except FileNotFoundError as error:
        raise UserError(f"{step.words[0]} is not installed on this machine; --dry_run shows what it is for") from error
      if code:
        sys.exit(code)
