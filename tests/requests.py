"""Sends bad requests; each must get one line, exit code 2, and leave nothing written.

  python tests/requests.py            all, and some of them again in separate processes
  python tests/requests.py --short    every eighth

Some are written by hand (tests/cases/requests.json). The others are generated from the table of fields: for each
field a value below its range, above it, outside its choices, of another type, and empty. The commands are
imported once, and each request runs in a fork of that process.
"""

import sys
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent
# This file has the same name as the library `requests`, so its folder must come last.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != HERE), str(HERE)]

# ruff: noqa: E402  The imports need the path above.
import argparse
import atexit
import collections
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator

from nemocascade.field_table import OWN, SEED, SHARED, WHOLE
from nemocascade.fields import Field

COMMANDS = (
  "cascade", "sft", "rl", "reward_model", "ablation", "evaluate", "generate", "score", "chat", "convert", "compile",
  "estimate", "parity", "bench",
)  # fmt: skip
CONFIGS = {  # Kind of config -> its file. STARS: part of a field pattern -> fields that exist.
  "sft": "tiny/sft", "rl": "tiny/if_rl", "reward_model": "tiny/reward_model", "cascade": "tiny/cascade",
  "ablation": "tiny/grpo_vs_mopd",
}  # fmt: skip
STARS = {"options.*": "options.icepop", "tasks.*": "tasks.math", "mixture.*": "mixture.instruction",
         "sources.*": "sources.math", "teachers.*": "teachers.math", "teachers_of.*": "teachers_of.math",
         "rate_of.*": "rate_of.mopd"}  # fmt: skip
LONGEST, SECONDS = 199, 120
# An error message says what is allowed in one of these ways.
SAYS = (
  "must be", "must return", "set a field", "allowed:", "did you mean", "give ", "there are", "at least", "at most", "raise it", "lower ", "lacks its value",
  "flags are written", "is not", "is no", "no such file", "No such file", "not found", "has no", "cannot be", "fails:", "twice",
  "is of another", "does not", "is missing", "matches", "alone take", "no text", "only one", "not JSON", "neither", "would",
  "directory", "from 0", "is there already", "but there are", "is more than", "needs a judge", "tokens, a row", "holds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
  """A bad command line, and the words that its one-line error must contain."""

  command: str
  args: str
  words: tuple[str, ...]
  made: bool = False  # True if generated from the table of fields.


def by_hand() -> list[Request]:
  lines = json.loads((HERE / "cases" / "requests.json").read_text())
  return [Request(line["command"], line["args"], tuple(line["words"])) for line in lines]


def from_table() -> Iterator[Request]:
  """One set of requests for each field, on the first kind of config that has it."""
  seen: set[str] = set()
  for kind, config in CONFIGS.items():
    table = OWN[kind] | (SEED | SHARED if kind == "sft" else {})
    for pattern in [pattern for pattern in table if pattern not in seen]:
      seen.add(pattern)
      name = pattern
      for star, place in STARS.items():
        name = name.replace(star, place)
      if "*" in name or name in ("stages", "arms"):
        continue
      for said, word in wrong(WHOLE[kind][pattern]):
        args = f"--config=configs/{config}.py:smoke --workdir={{new}}/w {shlex.quote(f'--config.{name}={said}')}"
        value = "'x'" if "'x'" in said else said  # The error for a tuple names only the bad item.
        yield Request(kind, args, (name, value, word), made=True)


def wrong(field: Field) -> Iterator[tuple[str, str]]:
  """(text, word that the error must contain) for each value that the field must refuse."""
  if field.kind in (int, float):
    a_number = "number"
    yield "many", a_number
    yield "(1, 2)", a_number
    if field.kind is int:
      yield "2.5", a_number
      yield str((field.high or 2**31 - 1) + 1), "at most"
      yield str((field.low or 0) - 2 - len(field.also)), "at least"
    else:
      yield "nan", "not a number"
      for bound, step, word in (
        (field.low, -0.5, "at least"),
        (field.above, 0, "above"),
        (field.high, 1, "at most"),
        (field.below, 0, "below"),
      ):
        if bound is not None:
          yield f"{float(bound + step)}", word
  if field.kind is bool:
    yield "perhaps", "True or False"
  if field.kind is str and field.choices:
    yield "nothing_like_it", "allowed"
  if field.kind is str and not field.empty:
    yield "", "not empty" if not field.choices else "must be"
  if field.kind in (tuple, dict):
    yield "7", "tuple" if field.kind is tuple else "section"
  if field.kind is tuple and field.item.kind in (int, float):
    yield "('x',)" if not field.length else repr(("x",) * field.length), "number"
  if field.kind is tuple and not field.empty:
    yield "()", "not empty"


def fixtures(folder: Path) -> dict[str, str]:
  """Makes the checkpoints, rows and files that requests name.

  The checkpoint is made in a separate process, because JAX must not be initialised before a fork.
  """
  files = folder / "files"
  files.mkdir(parents=True)
  config = "from configs.tiny import sft\ndef get_config(arg=''):\n  c = sft.get_config('smoke')\n  {}\n  return c\n"
  texts = {
    "syntax.py": "x = 1\ndef get_config(:\n", "raises.py": "1 / 0\n", "imports.py": "import no_such_module\n",
    "fails.py": "def get_config():\n  return {}['x']\n", "none.py": "def get_config():\n  pass\n",
    "dict.py": "def get_config():\n  return {}\n", "exits.py": "raise SystemExit(0)\n", "bytes.py": b"\xff\xfe\x00",
    "takes_none.py": "def get_config():\n  pass\n", "nested.py": config.format("c.steps = (1, 2)").replace("c.steps =", "del c.steps; c.steps ="),
    "extra.py": config.format("c.lr = 1e-3"), "lacks.py": config.format("del c.save_every"),
    "empty.py": "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n",
    "empty.jsonl": "", "broken.jsonl": "{\n", "list.jsonl": "[1]\n", "neither.jsonl": '{"text": "x"}\n',
    "large.jsonl": '{"tokens": [1, 640]}\n', "bool.jsonl": '{"tokens": [1, true]}\n',
    "role.jsonl": '{"messages": [{"role": "usr", "content": "x"}]}\n', "many.jsonl": '{"text": "x"}\n' * 500,
    "rows.jsonl": '{"tokens": [5, 6, 7]}\n',
    "unanswered.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n',
    "order.jsonl": '{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}\n',
  }  # fmt: skip
  for name, text in texts.items():
    (files / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  make = (
    "import sys, pathlib; sys.path.append(sys.argv[1]); import tiny_checkpoint as t; from experiments import convert\n"
    "c = t.make(pathlib.Path(sys.argv[2])); convert.run(c, 'hf:' + sys.argv[3]); print(c)"
  )
  done = subprocess.run(
    [sys.executable, "-c", make, str(HERE), str(folder / "stage"), str(folder / "hf")],
    cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
  )  # fmt: skip
  return {
    "ckpt": done.stdout.split()[-1], "stage": str(folder / "stage"), "hf": f"hf:{folder / 'hf'}",
    "rows": str(files / "rows.jsonl"), "files": str(files),
  }  # fmt: skip


def environment() -> dict[str, str]:
  return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def in_a_fork(command: str, argv: list[str], out: Path) -> int:
  """Runs the command in a fork, with stderr written to `out`; returns its exit code."""
  pid = os.fork()
  if pid == 0:
    code = 99
    try:
      os.setsid()
      null, file = os.open(os.devnull, os.O_RDWR), os.open(out, os.O_WRONLY | os.O_CREAT)
      for target, source in ((0, null), (1, null), (2, file)):
        os.dup2(source, target)
      sys.argv = [f"experiments/{command}.py", *argv]
      warnings.filterwarnings("ignore", module="runpy")
      runpy.run_module(f"experiments.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as error:
      code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    finally:
      with contextlib.suppress(BaseException):
        sys.stderr.flush()
        atexit._run_exitfuncs()  # The sandbox ends its programs in an exit handler.
      os._exit(code)
  deadline = time.monotonic() + SECONDS
  while True:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    if time.monotonic() > deadline:
      os.killpg(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
      return -9
    time.sleep(0.002)


def alone(command: str, argv: list[str], out: Path) -> int:
  """The same in a separate process."""
  with out.open("w") as file:
    return subprocess.run(
      [sys.executable, "-m", f"experiments.{command}", *argv], cwd=ROOT, env=environment(), check=False,
      stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, timeout=SECONDS,
    ).returncode  # fmt: skip


def miss(request: Request, code: int, said: str, left: list[str]) -> str:
  """What is wrong with the response, or "" if it is right."""
  lines = said.strip().splitlines()
  checks = {
    f"exit code {code}": code == 2,
    "a traceback": "Traceback" not in said,
    f"{len(lines)} lines": len(lines) == 1,
    f"{len(said.strip())} characters": len(said.strip()) <= LONGEST,
    f"left {left}": not left,
    "does not say what is allowed": any(word in said for word in SAYS),
  } | {f"lacks {word!r}": word in said for word in request.words}
  return ", ".join(what for what, right in checks.items() if not right)


def run(requests: list[Request], folder: Path, places: dict[str, str], how=in_a_fork) -> dict[Request, str]:
  """Runs all requests; returns request -> what is wrong, for those that failed."""
  misses = {}
  for i, request in enumerate(requests):
    new = folder / "new" / f"{how.__name__}_{i}"
    new.mkdir(parents=True)
    out = folder / "stderr"
    out.unlink(missing_ok=True)
    args = request.args
    for name, place in (places | {"new": str(new)}).items():
      args = args.replace("{" + name + "}", place)
    code = how(request.command, shlex.split(args), out)
    said = out.read_text(errors="replace") if out.exists() else ""
    left = sorted(str(path.relative_to(new)) for path in new.rglob("*"))
    if why := miss(request, code, said, left):
      misses[request] = why
      print(f"MISSED {request.command} {args}\n    {why}\n    {' '.join(said.split())[:300]}", flush=True)
  return misses


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--short", action="store_true", help="every eighth request, none in a process of its own")
  parser.add_argument("--only", default="", help="requests whose command line holds this")
  options = parser.parse_args(argv)
  os.environ |= {"JAX_PLATFORMS": "cpu"}
  os.chdir(ROOT)
  requests = [*by_hand(), *from_table()]
  requests = [r for r in requests if options.only in f"{r.command} {r.args}"][:: 8 if options.short else 1]
  separate = [] if options.short or options.only else list({r.command: r for r in reversed(requests)}.values())
  before, began = sorted(os.listdir(ROOT)), time.monotonic()
  folder = Path(tempfile.mkdtemp())  # A fork that exits would remove a TemporaryDirectory.
  try:
    places = fixtures(folder)
    for command in COMMANDS:
      importlib.import_module(f"experiments.{command}")
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "a fork cannot share a device"
    gc.freeze()  # Forks then copy fewer pages.
    misses = run(requests, folder, places) | run(separate, folder, places, alone)
  finally:
    shutil.rmtree(folder)
  counts = collections.Counter((r.command, r.made) for r in requests)
  print(f"{'command':14} {'by hand':>8} {'from the table':>15} {'missed':>7}")
  for command in COMMANDS:
    missed = sum(r.command == command for r in misses)
    print(f"{command:14} {counts[command, False]:8} {counts[command, True]:15} {missed:7}")
  if after := [name for name in sorted(os.listdir(ROOT)) if name not in before]:
    print(f"left in the repository: {after}")
  print(
    f"{len(requests)} bad requests ({len(separate)} of them again in processes of their own), {len(misses)} missed,"
    f" {time.monotonic() - began:.0f} s"
  )
  return bool(misses or after)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
