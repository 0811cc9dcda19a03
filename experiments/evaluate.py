"""Evaluates a checkpoint on held-out prompts of every domain: avg@k and pass@k, with 95% intervals.

  python -m experiments.evaluate --config=configs/tiny/cascade.py \\
    --checkpoint=runs/tiny/sft/latest --workdir=runs/eval --completions=4

pass@k is the share of prompts with at least one completion of full reward. Partial rewards count in avg@k
only.
"""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.generate import TEMPERATURE
from nemocascade.evaluate.suites import DomainScore
from nemocascade.field_check import check
from nemocascade.fields import text, whole
from nemocascade.mesh import make_mesh, mesh_sizes
from nemocascade.runtime import domains
from nemocascade.runtime.checks import check_evaluation
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.launch import launch
from nemocascade.runtime.sharing import own
from nemocascade.runtime.start import trained_parts
from nemocascade.state_files import write_json


def run(
  c: ConfigDict, workdir: Path, checkpoint: str, judge: str = "", completions: int = 1, temperature: float = 1.0,
  mesh: str = "",
) -> dict:  # fmt: skip
  """Prints a table and writes scores.json in the work directory. Returns domain -> DomainScore."""
  check(c)
  check_evaluation(c, "--completions", completions)
  p, params = trained_parts(c, checkpoint, judge, make_mesh(**(mesh_sizes(mesh) if mesh else c.mesh)))
  if not judge and (needing := domains.that_need(c, "judge")) and jax.process_index() == 0:
    print(f"no --judge: {', '.join(needing)} is masked")
  first_alone(lambda: own(workdir), "lock of the work directory")
  heldout = draw_heldout(c, p.domains, p.text.tokenizer)
  scores = heldout.evaluate(p, params, temperature=temperature, completions=completions)
  first_alone(lambda: _tell(scores, completions, workdir), "scores")
  return scores


def _tell(scores: dict[str, DomainScore], completions: int, workdir: Path) -> None:
  """Prints the table and writes scores.json."""
  print(f"{'domain':14} {'avg@' + str(completions):>7}  {'95% interval':14} {'pass@' + str(completions):>7}  masked")
  for name, s in scores.items():
    print(f"{name:14} {s.mean:7.3f}  [{s.low:.3f}, {s.high:.3f}] {s.best:7.3f}  {s.masked}")
  write_json(workdir / "scores.json", {n: dataclasses.asdict(s) for n, s in scores.items()})


if __name__ == "__main__":
  launch(
    run,
    several=True,
    buckets=True,
    checkpoint=(text("The checkpoint to evaluate.", empty=False), ""),
    judge=(text("The reward model's checkpoint, for the preference domain."), ""),
    completions=(whole("Completions of each prompt: the k of avg@k and pass@k."), 1),
    temperature=(TEMPERATURE, 1.0),
    mesh=(
      text("Devices that share the model, as data:1,expert:8; -1 takes those that are left. Default: the config's."),
      "",
    ),
  )
