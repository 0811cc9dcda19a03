"""Estimates the seconds of a step of an RL stage on a TPU slice, from counts and sizes: nothing is compiled or run.

  python -m experiments.estimate --config=configs/nano_30b/if_rl.py --topology=v5p:4x4x4 --verify_s=0.02

Prints a JSON line for each phase: {"phase", "seconds", "limit", "parts"}. `seconds` are those at the limit of the
hardware, so a real step takes longer; `parts` has the seconds that each limit alone would take. The last line is
the whole step, with the number of verifier cores that keep verification to 1% of it.
"""

import json
import math

from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.field_check import kind_of
from nemocascade.fields import number, text, whole
from nemocascade.runtime import step_time
from nemocascade.runtime.checks import check_rl
from nemocascade.runtime.launch import launch
from nemocascade.sandbox import limited

SHARE = 0.01  # Of a step, for the number of verifier cores.


def run(
  c: ConfigDict, topology: str, verify_s: float, verifiers: int = limited.WORKERS, length: float = 1.0
) -> list[dict]:
  """Prints and returns the lines.

  Raises:
    UserError: the config is of no RL stage, or the slice is not known.
  """
  if (kind := kind_of(c.to_dict())) != "rl":
    raise UserError(f"kind of stage to estimate: {kind!r}; must be rl")
  check_rl(c)
  phases = step_time.step(c, topology, verify=verify_s, verifiers=verifiers, length=length)
  rounded = lambda seconds: float(f"{seconds:.3g}")
  lines = [
    {"phase": p.name, "seconds": rounded(p.seconds), "limit": p.limit, "parts": {k: rounded(s) for k, s in p.parts.items()}}
    for p in phases
  ]  # fmt: skip
  whole, longest = sum(p.seconds for p in phases), max(phases, key=lambda p: p.seconds)
  of_cpu = c.rollout.prompts * c.rollout.completions * verify_s
  lines.append(
    {"phase": "step", "seconds": rounded(whole), "limit": f"{longest.name}: {longest.limit}",
     "verifier_cores": math.ceil(of_cpu / (SHARE * whole)), "cores": step_time.cores(topology)}
  )  # fmt: skip
  for line in lines:
    print(json.dumps(line))
  return lines


if __name__ == "__main__":
  launch(
    run,
    workdir=False,
    topology=(text("KIND:CHIPSxCHIPS of the TPU slice.", empty=False), "v5p:4x4x4"),
    verify_s=(number("CPU seconds of parsing and verifying a completion.", low=0, high=86_400), 0.0),
    verifiers=(whole("Completions that a host verifies at once."), limited.WORKERS),
    length=(number("Length of the completions, as a share of the most tokens.", low=1e-6, high=1), 1.0),
  )
