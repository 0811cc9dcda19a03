"""Runs every stage of the smoke cascade in 1, 2 and 4 processes of one mesh of four devices, and compares them.

  python tests/processes.py
  python tests/processes.py --order=sft,if_rl,swe_agentic_rl --processes=2

The cascade in one process comes first. Then each stage runs alone in several processes, from the same checkpoints:
a difference of one stage does not reach the next. SFT and the reward model are compared after a few steps; the other
stages start from a longer SFT, because a model that knows nothing gets equal rewards and learns nothing. A line says
  - tokens: whether the first step sampled the same completions, or SFT and the reward model have equal losses,
  - moved: the largest update of a step, as its norm over that of the parameters; with 0, `params` says nothing,
  - params: after the last step, the largest difference of an array, as the norm of the difference over its norm,
  - single: the largest difference of one number, relative to the largest of its array, and how many exceed 1e-5,
  - scores: whether the held-out scores of all domains are equal; rounding may turn a token of a trained model,
  - record: the fields of the stage in cascade.json that differ, without scores, times and the probe,
  - exchange: bytes and milliseconds a step, of process 0.
The exit code is 1 if tokens differ, or an array by more than 1e-5. Single numbers may differ by more: sums over
devices are taken in another order, and Adam divides a gradient by its own size, so that a number whose gradient is
nearly zero turns the rounding of that sum into a part of a whole step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from chaos import restored
from linked import free_address

ROOT = Path(__file__).parent.parent
CONFIG = "configs/tiny/cascade.py:smoke"
ORDER = "reward_model,sft,if_rl,multi_domain_rl,rlhf_teacher,mopd,rlhf,long_context_rl,code_rl,swe_rl,swe_agentic_rl"
SAMPLING_NOTHING = ("sft", "reward_model")
DEVICES, STEPS = 4, 4
# Stage -> fields of its config. A smoke model repairs nothing with tools: an entropy bonus gives it a gradient.
FIELDS = {"swe_agentic_rl": ("dynamic_filtering=False", "entropy_weight=0.01")}
# Fields of cascade.json that vary by run, and those that `scores` compares.
OF_PROCESS = ("wall_s", "train_s", "eval_s_after", "compilations", "probe", "checkpoint")
SCORES = ("scores_", "prompt_scores_")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", default="2,4", help="Numbers of processes to compare with one, by commas.")
  parser.add_argument("--order", default=ORDER, help="The stages, by commas, in their order.")
  parser.add_argument("--compare", default="", help="Those of them that are compared, by commas; all if empty.")
  parser.add_argument("--sft_steps", type=int, default=200, help="Of the SFT that the stages of RL start from.")
  parser.add_argument("--directory", default="", help="Where the runs are left; else they are removed.")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    directory = Path(flags.directory or temporary).resolve()
    order, counts = flags.order.split(","), list(map(int, flags.processes.split(",")))
    compared = set(flags.compare.split(",") if flags.compare else order)
    return compare(directory, counts, order, compared, flags.sft_steps)


def compare(directory: Path, counts: list[int], order: list[str], compared: set[str], sft_steps: int) -> int:
  began, wrong = time.monotonic(), 0
  few, rest = [name for name in order if name in SAMPLING_NOTHING], directory / "one"
  run(directory / "few", 1, few)
  run(rest, 1, order, sft_steps)
  print(f"{len(order)} stages in one process: {time.monotonic() - began:.0f} s", flush=True)
  print(
    f"{'stage':18} {'processes':>9} {'tokens':>7} {'moved':>8} {'params':>8} {'single':>20} {'scores':>7} {'exchange':>18}  {'s':>4}  record"
  )
  for one, done, names in ((directory / "few", [], few), (rest, few, [name for name in order if name not in few])):
    stages = json.loads((one / "cascade.json").read_text())["stages"]
    for i, name in enumerate(names, len(done)):
      for count in counts if name in compared else ():
        workdir, began = directory / f"{name}_{count}", time.monotonic()
        begin_with(workdir, one, stages[:i])
        run(workdir, count, [*done, *names][: i + 1], sft_steps if done else STEPS)
        wrong += report(name, count, one, workdir, time.monotonic() - began)
  print(f"{wrong or 'no'} differences")
  return 1 if wrong else 0


def begin_with(workdir: Path, one: Path, stages: list[dict]) -> None:
  """Makes a work directory in which these stages are done; their checkpoints stay where they are."""
  (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
  for path in (one / "tokenizer").iterdir():
    (workdir / "tokenizer" / path.name).write_bytes(path.read_bytes())
  (workdir / "cascade.json").write_text(json.dumps({"stages": stages, "teachers": {}}))


def run(workdir: Path, count: int, order: list[str], sft_steps: int = STEPS) -> None:
  """Runs the cascade of these stages; exits this script if it fails."""
  workdir.mkdir(parents=True, exist_ok=True)
  address, steps = free_address(), []
  for name in order:
    count_of = sft_steps if name == "sft" else STEPS
    fields = f"steps={count_of}", f"save_every={count_of}", *FIELDS.get(name, ())
    steps += [f"--config.stages.{name}.{field}" for field in fields]
    if name not in SAMPLING_NOTHING:
      steps.append(f"--config.stages.{name}.samples=1000")
  command = [
    sys.executable, "-m", "experiments.cascade", f"--config={CONFIG}", f"--workdir={workdir}",
    "--config.mesh.data=2", "--config.mesh.expert=2", f"--config.order={tuple(order)!r}", *steps,
    "--config.evaluation.greedy=()",  # So that the config of a stage does not depend on the others.
  ]  # fmt: skip
  processes = [
    subprocess.Popen(
      command + ([f"--distributed={address},{count},{i}", "--check_hosts"] if count > 1 else []),
      cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(workdir / f"stderr_{i}").open("wb"),
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count)},
    )
    for i in range(count)
  ]  # fmt: skip
  for i, process in enumerate(processes):
    if process.wait():
      sys.exit(f"{workdir}: process {i}: {(workdir / f'stderr_{i}').read_text(errors='replace')[-2000:]}")


def report(name: str, count: int, one: Path, workdir: Path, seconds: float) -> int:
  """Prints the line of a stage; returns the number of differences that should not be."""
  entries = [
    next(e for e in json.loads((d / "cascade.json").read_text())["stages"] if e["name"] == name) for d in (one, workdir)
  ]
  fields = [{k: v for k, v in e.items() if k not in OF_PROCESS} for e in entries]
  differ = [k for k in fields[0].keys() | fields[1].keys() if fields[0].get(k) != fields[1].get(k)]
  scores = [k for k in differ if k.startswith(SCORES)]
  lines = [[json.loads(line) for line in (d / name / "metrics.jsonl").open()] for d in (one, workdir)]
  same = first_step(one / name, lines[0]) == first_step(workdir / name, lines[1])
  error, single = differences(one / name, workdir / name)
  moved = max((line["norm/update"] / line["norm/param"] for line in lines[0] if "norm/update" in line), default=0.0)
  spent = [(line.get("exchange/bytes", 0), line.get("exchange/ms", 0)) for line in lines[1]]
  size, milliseconds = np.mean(spent, axis=0)
  print(
    f"{name:18} {count:9} {'same' if same else 'DIFFER':>7} {moved:8.1e} {error:8.1e} {single:>20}"
    f" {'differ' if scores else 'same':>7} {size:9.0f} B {milliseconds:4.0f} ms  {seconds:4.0f}  {', '.join(sorted(set(differ) - set(scores))) or 'same'}",
    flush=True,
  )
  return int(not same) + int(not error <= 1e-5)


def first_step(stage: Path, lines: list[dict]) -> object:
  """What the first step sampled; of a stage that samples nothing, its loss to six digits."""
  if "rollout/tokens" in lines[0]:
    samples = [json.loads(line) for line in (stage / "samples.jsonl").open()]
    return [s for s in samples if s["step"] == 0], lines[0]["rollout/tokens"], lines[0]["rollout/unfinished"]
  return {name: f"{value:.6g}" for name, value in lines[0].items() if name.startswith("loss/")}


def differences(one: Path, other: Path) -> tuple[float, str]:
  """(largest relative difference of a parameter array of the last checkpoints, that of single numbers as a text)."""
  last = max(int(p.name) for p in (one / "checkpoints").iterdir() if p.name.isdecimal())
  a, b = (restored(stage / "checkpoints" / str(last) / "params") for stage in (one, other))
  largest, of_single, count, total = 0.0, 0.0, 0, 0
  for x, y in zip(map(np.float64, jax.tree.leaves(a)), map(np.float64, jax.tree.leaves(b)), strict=True):
    difference = np.abs(x - y)
    largest = max(largest, float(np.linalg.norm(difference) / max(np.linalg.norm(x), 1e-30)))
    relative = difference / max(np.abs(x).max(), 1e-30)
    of_single, count, total = (
      max(of_single, float(relative.max())),
      count + int((relative > 1e-5).sum()),
      total + x.size,
    )
  return largest, f"{of_single:.1e} {count}/{total}"


if __name__ == "__main__":
  sys.exit(main())
