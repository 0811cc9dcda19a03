"""Ratios against peers and limits: one JSON line a case, ratio > 1 where ours is better.

  python -m experiments.bench SUITE

A line is {"suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"}. Both sides of a
ratio run in this process, on this machine, in turns.
"""

import contextlib
import importlib
import json
import sys

import jax

from experiments.launch import launch
from nemocascade.errors import unknown

# Suite -> the module whose `cases()` yields its lines without "suite" and "device".
SUITES = {"convert": "experiments.bench_convert"}


def run(suite: str) -> None:
  if suite not in SUITES:
    raise unknown("suite", suite, SUITES)
  lines, out = importlib.import_module(SUITES[suite]).cases(), sys.stdout
  device = jax.devices()[0].device_kind
  with contextlib.redirect_stdout(sys.stderr):  # What is measured may print too.
    for line in lines:
      print(json.dumps({"suite": suite, **line, "device": device}), file=out, flush=True)


if __name__ == "__main__":
  launch(run, config=False, positional="suite")
