"""Ratios against peers and limits: one JSON line a case, ratio > 1 where ours is better.

  python -m experiments.bench SUITE
  python -m experiments.bench kernels --static

A line is {"suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"}. Both sides of a
ratio run in this process, on this machine, in turns. With --static, kernels are not run: the TPU
compiler's schedules of ours and of the peer's are compared.
"""

import contextlib
import importlib
import json
import sys

import jax

from experiments.launch import launch
from nemocascade.errors import UserError, unknown
from nemocascade.fields import flag

# Suite -> the module whose `cases()` yields its lines without "suite" and "device".
SUITES = {
  "convert": "experiments.bench_convert",
  "kernels": "experiments.bench_kernels",
  "rl": "experiments.bench_rl",
}
STATIC = "experiments.bench_schedules"  # Of the kernels, not run.


def run(suite: str, static: bool = False) -> None:
  if suite not in SUITES:
    raise unknown("suite", suite, SUITES)
  if static and suite != "kernels":
    raise UserError(f"--static with suite {suite!r}: must be with the suite 'kernels'")
  module, out = importlib.import_module(STATIC if static else SUITES[suite]), sys.stdout
  device = "TPU v5p, compiled for" if static else jax.devices()[0].device_kind
  with contextlib.redirect_stdout(sys.stderr):  # What is measured may print too.
    for line in module.cases():
      print(json.dumps({"suite": suite, **line, "device": device}), file=out, flush=True)


if __name__ == "__main__":
  launch(run, config=False, positional="suite", static=(flag("Compare the TPU compiler's schedules."), False))
