"""Kills a cascade at random instants, resumes it, and compares its results with those of an undisturbed run.

  python tests/chaos.py --kills=40 --seed=1
  python tests/chaos.py --kills=3 --order=reward_model,sft,if_rl

Each process of a disturbed cascade is killed (SIGKILL) at an instant drawn uniformly from the duration of
the undisturbed run. Every second kill waits, from that instant on, for a temporary file to show that the
process is writing. After `--kills_each` kills the cascade is left to finish, and the next one begins.

The comparison is bitwise: parameters, optimizer states and records of all kept checkpoints, metrics.jsonl
without times, samples.jsonl, the tokenizer, and cascade.json without times and compilation counts.
The exit code is 1 on a difference, or if a cascade cannot be resumed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
CONFIG = "configs/tiny/cascade.py:smoke"
WRITING = (".orbax-checkpoint-tmp", ".tmp", ".partial")  # Marks in the names of unfinished files and folders.
OF_PROCESS = ("wall_s", "train_s", "eval_s_after", "compilations")  # cascade.json fields that vary by run.


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=40)
  parser.add_argument("--kills_each", type=int, default=5, help="Of one cascade, at most.")
  parser.add_argument("--seed", type=int, default=0, help="Of the instants.")
  parser.add_argument("--order", default="", help="Some of the stages, by commas; all without it.")
  parser.add_argument("--directory", default="", help="Where the cascades are left; else they are removed.")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    directory = Path(flags.directory or temporary).resolve()
    return chaos(directory, flags.kills, flags.kills_each, random.Random(flags.seed), order_flags(flags.order))


def order_flags(order: str) -> list[str]:
  """Command-line flags for a cascade of these stages only; none for the whole cascade."""
  names = tuple(filter(None, order.split(",")))
  greedy = tuple(name for name in ("sft", "swe_agentic_rl") if name in names)
  return [f"--config.order={names!r}", f"--config.evaluation.greedy={greedy!r}"] if names else []


def chaos(directory: Path, kills: int, kills_each: int, draw: random.Random, flags: list[str]) -> int:
  whole = directory / "whole"
  began = time.monotonic()
  finish(begin(whole, flags), whole)
  print(f"undisturbed, with compilation: {time.monotonic() - began:.0f} s", flush=True)
  warm = directory / "warm"
  began = time.monotonic()
  finish(begin(warm, flags), warm)
  seconds = time.monotonic() - began
  wrong = report_differences("undisturbed again", whole, warm)
  print(f"undisturbed, compiled: {seconds:.0f} s\n{'cascade':>8} {'kill':>5} {'after s':>8}  in the middle of")
  done, number, saving = 0, 0, 0
  while done < kills:
    number += 1
    workdir = directory / f"disturbed_{number}"
    for _ in range(min(kills_each, kills - done)):
      process, began = begin(workdir, flags), time.monotonic()
      found = killed(process, workdir, draw.uniform(0, seconds), in_save=done % 2 == 1, draw=draw)
      if found is None:  # The cascade had finished before it was killed.
        break
      done, saving = done + 1, saving + bool(found)
      print(f"{number:8} {done:5} {time.monotonic() - began:8.1f}  {found or position(workdir)}", flush=True)
    finish(begin(workdir, flags), workdir)
    wrong += report_differences(f"cascade {number}", whole, workdir)
  print(f"{done} kills, {saving} of them while a file was written, in {number} cascades: {wrong or 'no'} differences")
  return 1 if wrong else 0


def begin(workdir: Path, flags: list[str]) -> subprocess.Popen:
  """Starts or resumes the cascade of a work directory. All work directories share one compilation cache."""
  workdir.mkdir(parents=True, exist_ok=True)
  compilations = workdir / "compilations"
  if not compilations.is_symlink():
    (workdir.parent / "compilations").mkdir(exist_ok=True)
    compilations.symlink_to(workdir.parent / "compilations")
  with (workdir / "stderr").open("ab") as errors:
    return subprocess.Popen(
      [sys.executable, "-m", "experiments.cascade", f"--config={CONFIG}", f"--workdir={workdir}", *flags],
      cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen, workdir: Path) -> None:
  """Waits for the process to end; exits this script with an error if it failed."""
  if process.wait():
    tail = (workdir / "stderr").read_text(errors="replace").splitlines()[-5:]
    sys.exit("\n".join([f"{workdir}: exit code {process.returncode}", *tail]))


def killed(process: subprocess.Popen, workdir: Path, after: float, *, in_save: bool, draw: random.Random) -> str | None:
  """Kills the process after `after` seconds.

  Returns the file it was writing, "" if that is unknown, or None if the process had already finished.
  """
  found, deadline, left = "", time.monotonic() + after, set(unfinished(workdir))  # `left`: files of earlier kills.
  while process.poll() is None:
    if time.monotonic() >= deadline and (not in_save or (found := next(unfinished(workdir, left), ""))):
      time.sleep(draw.uniform(0, 0.05) if in_save else 0)  # A random instant within the save.
      process.kill()
      break
    time.sleep(0.001)
  if process.wait() >= 0:
    finish(process, workdir)
    return None
  return found


def unfinished(workdir: Path, but: Container[str] = ()) -> Iterator[str]:
  """Paths of files and folders that are being written, except those in `but`."""
  folders = [workdir, *(p for p in workdir.iterdir() if p.is_dir() and p.name != "compilations")]
  folders += [p / name for p in folders[1:] for name in ("checkpoints", "model")]
  for folder in filter(Path.is_dir, folders):
    for name in os.listdir(folder):
      path = str((folder / name).relative_to(workdir))
      if any(mark in name for mark in WRITING) and path not in but:
        yield path


def position(workdir: Path) -> str:
  """Name of the stage that the cascade in the work directory is running."""
  path = workdir / "cascade.json"
  stages = json.loads(path.read_text())["stages"] if path.exists() else []
  return next((s["name"] for s in stages if s["status"] != "done"), f"what comes after {len(stages)} stages")


def report_differences(name: str, whole: Path, other: Path) -> int:
  found = differences(whole, other)
  print(f"{name}: {'; '.join(found) or 'bit-identical'}", flush=True)
  return len(found)


def differences(whole: Path, other: Path) -> list[str]:
  """Names of everything that differs between two work directories of the same config."""
  records = [record_of(workdir) for workdir in (whole, other)]
  found = ["cascade.json"] if records[0] != records[1] else []
  for stage in (entry["name"] for entry in records[0]["stages"]):
    found += [f"{stage}: {what}" for what in stage_differences(whole / stage, other / stage)]
  tokenizers = [(workdir / "tokenizer" / "tokenizer.model").read_bytes() for workdir in (whole, other)]
  return found + (["tokenizer"] if tokenizers[0] != tokenizers[1] else [])


def record_of(workdir: Path) -> dict:
  text = (workdir / "cascade.json").read_text().replace(str(workdir), "")
  record = json.loads(text)
  record["stages"] = [{k: v for k, v in s.items() if k not in OF_PROCESS} for s in record["stages"]]
  return record


def stage_differences(whole: Path, other: Path) -> list[str]:
  """Names of everything that differs between two folders of the same stage."""
  found = []
  if lines_of(whole) != lines_of(other):
    found.append("metrics.jsonl")
  samples = [(stage / "samples.jsonl").read_bytes() for stage in (whole, other)]
  if samples[0] != samples[1]:
    found.append("samples.jsonl")
  steps = [sorted(p.name for p in (stage / "checkpoints").iterdir()) for stage in (whole, other)]
  if steps[0] != steps[1]:
    return [*found, f"checkpoints {steps[0]} and {steps[1]}"]
  for step in steps[0]:
    a, b = (stage / "checkpoints" / step for stage in (whole, other))
    for part in ("params", "rest"):
      of_a, of_b = arrays_of(a / part), arrays_of(b / part)
      names = [name for name in of_a.keys() | of_b.keys() if of_a.get(name) != of_b.get(name)]
      found += [f"checkpoint {step}: {part}/{name}" for name in sorted(names)]
    if saved_record(a) != saved_record(b):
      found.append(f"checkpoint {step}: record")
  return found


def lines_of(stage: Path) -> list[dict]:
  lines = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "exchange/"))} for line in lines]


def saved_record(checkpoint: Path) -> dict:
  """The record without the seconds that the steps took."""
  return json.loads((checkpoint / "record" / "metadata").read_text()) | {"meter": None}


def restored(folder: Path) -> dict:
  """The tree of arrays of a part of a checkpoint, which any devices may have saved."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)  # noqa: E731
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder, jax.tree.map(place, checkpointer.metadata(folder).item_metadata.tree))


def arrays_of(folder: Path) -> dict[str, tuple]:
  """Array name -> (dtype, shape, bytes)."""
  found = jax.tree_util.tree_leaves_with_path(restored(folder))
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in found}
  return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}


if __name__ == "__main__":
  sys.exit(main())
