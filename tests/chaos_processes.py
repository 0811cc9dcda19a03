"""Kills or stops one of two processes of a run at random instants, resumes it, and compares it with an undisturbed one.

  python tests/chaos_processes.py --kills=20 --seed=1
  python tests/chaos_processes.py --kills=5 --stops=0.5 --command="experiments.sft --config=configs/tiny/sft.py:smoke"

At an instant drawn uniformly from the duration of the undisturbed run, one of the two processes is killed (SIGKILL)
or stopped (SIGSTOP). The other one must end by itself within 60 s, with exit code 69 and one line that names the
victim. Then the same command is run again. After `--kills_each` kills the run is left to finish, and the next begins.
A slow machine spends most of a run on starting, so the share `--late` of the instants is drawn from the time after the
first checkpoint that the run writes after its start.

The comparison is that of chaos.py: bitwise, for the kept checkpoints with their records, metrics.jsonl without times
and exchanges, and samples.jsonl. The exit code is 1 on a difference, or if a run cannot be resumed.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chaos
from linked import free_address

COMMAND = (
  "experiments.sft --config=configs/tiny/sft.py:smoke --config.mesh.data=2 --config.steps=120 --config.save_every=20"
)
LIMIT = 60.0  # Seconds within which a death must be noticed.


@dataclasses.dataclass
class Run:
  """Two connected processes of one device each."""

  processes: list[subprocess.Popen]
  errors: list[Path]

  @classmethod
  def begin(cls, command: str, workdir: Path) -> "Run":
    """Starts or resumes the command in a work directory."""
    workdir.mkdir(parents=True, exist_ok=True)
    address, errors = free_address(), [workdir.parent / f"{workdir.name}.{i}.stderr" for i in range(2)]
    caches = {
      "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compilations"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    environment = os.environ | caches | {"PYTHONPATH": str(chaos.ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [
      subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command), f"--workdir={workdir}", f"--distributed={address},2,{i}"],
        cwd=chaos.ROOT, stdout=subprocess.DEVNULL, stderr=errors[i].open("wb"), env=environment,
      )
      for i in range(2)
    ]  # fmt: skip
    return cls(processes, errors)

  def finish(self) -> None:
    """Waits for the end; exits this script with an error if a process failed."""
    codes = [process.wait() for process in self.processes]
    if any(codes):
      sys.exit("\n".join([f"exit codes {codes}", *map(self.said, range(2))]))

  def wait(self, seconds: float) -> None:
    """Waits so long, or until the first process ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.processes[0].wait(timeout=seconds)

  def wait_for_save(self, workdir: Path) -> None:
    """Waits for a checkpoint that is not there yet, or until the first process ends."""
    before = set(saved(workdir))
    while set(saved(workdir)) <= before and self.processes[0].poll() is None:
      self.wait(0.05)

  def said(self, index: int) -> str:
    """The last line that a process printed."""
    lines = self.errors[index].read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""

  def strike(self, victim: int, kind: signal.Signals) -> tuple[float, int, str] | None:
    """Kills or stops a process. Returns (seconds until the other ended, its exit code, its line).

    Returns None if the run had already ended: one of them is gone, or the other ends with exit code 0, because all
    that was left to the victim was its own end.
    """
    other = self.processes[1 - victim]
    if any(process.poll() is not None for process in self.processes):
      self.finish()
      return None
    self.processes[victim].send_signal(kind)
    began = time.monotonic()
    try:
      code = other.wait(timeout=2 * LIMIT)
    except subprocess.TimeoutExpired:
      other.kill()
      code = other.wait()
    seconds = time.monotonic() - began
    self.processes[victim].kill()
    self.processes[victim].wait()
    return (seconds, code, self.said(1 - victim)) if code else None


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--kills_each", type=int, default=5, help="Of one run, at most.")
  parser.add_argument("--stops", type=float, default=0.25, help="Share of the kills that are SIGSTOP.")
  parser.add_argument("--late", type=float, default=0.25, help="Share of the kills that come after a checkpoint.")
  parser.add_argument("--seed", type=int, default=0, help="Of the instants.")
  parser.add_argument("--command", default=COMMAND, help="The module to run, with its flags.")
  parser.add_argument("--directory", default="", help="Where the runs are left; else they are removed.")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    return shake(Path(flags.directory or temporary).resolve(), flags, random.Random(flags.seed))


def shake(directory: Path, flags: argparse.Namespace, draw: random.Random) -> int:
  for name in ("whole", "warm"):  # The first one compiles.
    began, run = time.monotonic(), Run.begin(flags.command, directory / name)
    run.wait_for_save(directory / name)
    to_save = time.monotonic() - began
    run.finish()
    seconds = time.monotonic() - began
    print(f"undisturbed ({name}): {seconds:.0f} s, {to_save:.0f} s of them up to the first checkpoint", flush=True)
  wrong = report("undisturbed again", directory / "whole", directory / "warm")
  done, number, slowest = 0, 0, 0.0
  print(
    f"{'run':>3} {'kill':>4} {'process':>7} {'signal':>8} {'after s':>8} {'noticed s':>9} {'code':>4}"
    "  saved steps before and after the start, line"
  )
  while done < flags.kills:
    number += 1
    workdir = directory / f"disturbed_{number}"
    for _ in range(min(flags.kills_each, flags.kills - done)):
      before, began = saved(workdir), time.monotonic()
      run, late, victim = Run.begin(flags.command, workdir), draw.random() < flags.late, draw.randrange(2)
      kind = signal.SIGSTOP if draw.random() < flags.stops else signal.SIGKILL
      # The share of the run's steps that come after its newest checkpoint.
      left = 1 - max(before, default=0) / max(saved(directory / "whole"))
      if late:
        run.wait_for_save(workdir)
      run.wait(draw.uniform(0, (seconds - to_save) * left if late else seconds))
      after = time.monotonic() - began
      struck = run.strike(victim, kind)
      if struck is None:
        if not before:  # The machine is faster now than when the undisturbed run was timed.
          to_save *= (time.monotonic() - began) / seconds
          seconds = time.monotonic() - began
        break
      took, code, line = struck
      done, slowest = done + 1, max(slowest, took)
      wrong += took > LIMIT or code != 69 or f"process {victim}" not in line
      print(
        f"{number:3} {done:4} {victim:7} {kind.name:>8} {after:8.1f} {took:9.1f} {code:4}"
        f"  {before} {sorted({*saved(workdir)} - {*before})}, {line}",
        flush=True,
      )
    Run.begin(flags.command, workdir).finish()
    wrong += report(f"run {number}", directory / "whole", workdir)
  print(f"{done} kills in {number} runs, noticed after {slowest:.1f} s at most: {wrong or 'nothing'} wrong")
  return 1 if wrong else 0


def stages(workdir: Path) -> list[str]:
  return sorted(path.parent.name for path in workdir.glob("*/checkpoints"))


def saved(workdir: Path) -> list[int]:
  """Steps of the checkpoints on disk."""
  return sorted(int(path.name) for path in workdir.glob("*/checkpoints/*") if path.name.isdecimal())


def report(name: str, whole: Path, other: Path) -> int:
  found = [f"stages {stages(other)}"] if stages(whole) != stages(other) else []
  for stage in stages(whole) if not found else []:
    found += [f"{stage}: {what}" for what in chaos.stage_differences(whole / stage, other / stage)]
  print(f"{name}: {'; '.join(found) or 'bit-identical'}", flush=True)
  return len(found)


if __name__ == "__main__":
  sys.exit(main())
