"""Benchmarks against peers and hardware limits: one JSON line per case; ratio > 1 means ours is better.

  python -m experiments.bench SUITE
  python -m experiments.bench kernels --static
  python -m experiments.bench gpu --table=TABLE.md
  python -m experiments.bench train --table=TABLE.md

A line is {"suite", "case", "ours", "peer", "peer_name", "unit", "ratio", "device"}. Both sides of a
ratio run in this process, on this machine, in turns. With --static nothing is run: the schedules that the
TPU compiler makes of our kernels and of the peers' are compared.
"""

import contextlib
import datetime
import importlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax

from nemocascade.errors import UserError, unknown
from nemocascade.fields import flag, text
from nemocascade.runtime.launch import launch

# Suite -> the module whose `cases()` yields its lines without "suite" and "device".
SUITES = {
  "convert": "experiments.bench.convert",
  "gpu": "experiments.bench.gpu",
  "kernels": "experiments.bench.kernels",
  "loader": "experiments.bench.loader",
  "rl": "experiments.bench.rl",
  "rollout": "experiments.bench.rollout",
  "train": "experiments.bench.train",
  "verifiers": "experiments.bench.verifiers",
}
STATIC = "experiments.bench.schedules"  # The suite `kernels` with --static.


def run(suite: str, static: bool = False, table: str = "", full: bool = False) -> None:
  if suite not in SUITES:
    raise unknown("suite", suite, SUITES)
  if static and suite != "kernels":
    raise UserError(f"--static with suite {suite!r}: must be with the suite 'kernels'")
  if full and suite != "rollout":
    raise UserError(f"--full with suite {suite!r}: must be with the suite 'rollout'")
  module, out = importlib.import_module(STATIC if static else SUITES[suite]), sys.stdout
  device = "TPU v5p, compiled for" if static else jax.devices()[0].device_kind
  lines, began = [], time.time()
  with contextlib.redirect_stdout(sys.stderr):  # The measured code may print.
    for line in module.cases(*[full] * full):
      lines.append({"suite": suite, **line, "device": device})
      print(json.dumps(lines[-1]), file=out, flush=True)
      print(f"{time.time() - began:.0f} s", file=sys.stderr, flush=True)
      if table:  # Rewritten after every line, so that an interrupted run keeps its results.
        Path(table).write_text(as_table(lines))
        if hasattr(module, "draw"):
          module.draw(lines, Path(table).with_suffix(".png"))


def as_table(lines: list[dict]) -> str:
  """The lines as a Markdown table, below a line with the device, today's date and the versions of JAX."""
  versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
  head = [
    f"{lines[0]['device']}, {datetime.date.today()}, {versions}. A ratio above 1 is better than the peer.",
    "",
    "| case | ours | peer | peer's name | unit | ratio |",
    "|---|---|---|---|---|---|",
  ]
  rows = [
    f"| {a['case']} | {a['ours']:.4g} | {a['peer']:.4g} | {a['peer_name']} | {a['unit']} | {a['ratio']:.3g} |"
    for a in lines
  ]
  return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
  launch(
    run, config=False, positional="suite",
    static=(flag("Compare the TPU compiler's schedules."), False),
    table=(text("A file that gets the lines as a Markdown table; of `rollout` also a picture, TABLE.png."), ""),
    full=(flag("All cases of the suite `rollout`; they take minutes."), False),
  )  # fmt: skip
