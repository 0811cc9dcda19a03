"""The plan of a cascade, from its config alone: what each stage computes and saves. No array is made.

Tokens and FLOPs are those of one batch a step whose prompts and completions all have their greatest length. So they are
upper bounds, but for batches that `refill_rounds` adds. FLOPs are those of matrix products: 2 per parameter and token
forward, 6 with the backward pass (runtime/outcome.py).
"""

import dataclasses
import functools
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.generated.registry import PREFIX
from nemocascade.model.hybrid import init_params
from nemocascade.model.reward import init_reward_params
from nemocascade.model.size import matmul_params
from nemocascade.report.metrics import read_lines
from nemocascade.runtime import course, gates, lineage, objective, validation
from nemocascade.runtime.outcome import Spent
from nemocascade.step.optimizer import make_optimizer, new_state
from nemocascade.store import hf
from nemocascade.store.checkpoint import NEWEST
from nemocascade.store.record import Record

GIB = 1 << 30
IF_GATE = "if a gate fires"  # Status of a stage that only a gate's decision inserts. Sums leave it out.
COMPILED = {  # JSON schema of a line of experiments.compile that is read here.
  "type": "object",
  "required": ["stage", "program", "topology", "peak_gib"],
  "properties": {
    **{name: {"type": "string"} for name in ("stage", "program", "topology")},
    **{name: {"type": ["number", "null"]} for name in ("peak_gib", "resident_gib", "host_gib")},
  },
}


@dataclasses.dataclass(frozen=True)
class Planned:
  """A line of the plan. Sizes are in bytes."""

  stage: str
  status: str  # done, running, more steps, to do, or IF_GATE.
  kind: str
  start: str  # A stage, a checkpoint, or fresh.
  domains: tuple[str, ...]  # Of an SFT stage its sources.
  teachers: Mapping[str, str]
  gates: Mapping[str, str]  # Domain -> tolerance and action.
  steps: int
  batch: str  # Prompts x completions, packed rows, or pairs.
  rows: str  # Rows x tokens of the training step, and in how many pieces.
  spent: Spent
  flops: int
  checkpoint: int
  disk: int


def plan(c: ConfigDict, record: Record) -> list[Planned]:
  """A line for each stage of a cascade, stages that gates may insert included, in their order."""
  config = ModelConfig.from_fields(c.model.to_dict())
  weights, size = matmul_params(config), functools.cache(functools.partial(_checkpoint_bytes, config))
  now, whole = course.decided(c, record), gates.with_all_insertions(c)
  lines = []
  for name in whole.order:
    line = _planned(now if name in now.order else whole, name, record, weights, size)
    lines.append(line if name in now.order else dataclasses.replace(line, status=IF_GATE))
  return lines


def _planned(c: ConfigDict, name: str, record: Record, weights: int, size: Callable[[bool, str], int]) -> Planned:
  stage = course.flat(c, name)
  of = {"sft": _sft, "rl": _rl, "reward_model": _reward_model}[stage.kind]
  batch, rows, step = of(stage)
  spent = Spent(**{field: stage.steps * tokens for field, tokens in dataclasses.asdict(step).items()})
  optimizer = json.dumps(json.loads(ConfigDict(stage.optimizer).to_json_best_effort()), sort_keys=True)
  checkpoint = size(stage.kind == "reward_model", optimizer)
  best = stage.kind != "reward_model" and validation.settings(stage).every > 0
  status = "more steps" if lineage.is_grown(c, record, name) else (record.stage(name) or {}).get("status", "to do")
  saves = min(stage.steps // stage.save_every + 1, NEWEST + best)
  return Planned(
    stage=name, kind=stage.kind, start=course.parent(c, name) or "fresh", steps=stage.steps,
    status=status,
    domains=tuple(stage.get("mixture", stage.get("sources", ()))), teachers=dict(stage.get("teachers", {})),
    gates={domain: f"{gate.action} at -{gate.tolerance:g}" for domain, gate in sorted(gates.of(stage).items())},
    batch=batch, rows=rows, spent=spent, flops=spent.flops(weights), checkpoint=checkpoint, disk=saves * checkpoint,
  )  # fmt: skip


def _sft(c: ConfigDict) -> tuple[str, str, Spent]:
  rows = f"{c.rows} x {c.row_tokens}" + (f" / {c.pieces}" if c.pieces > 1 else "")
  return f"{c.rows} rows", rows, Spent(trained=c.rows * c.row_tokens)


def _reward_model(c: ConfigDict) -> tuple[str, str, Spent]:
  rows = 2 * c.pairs
  return f"{c.pairs} pairs", f"{rows} x {c.row_tokens}", Spent(trained=rows * c.row_tokens)


def _rl(c: ConfigDict) -> tuple[str, str, Spent]:
  r, p = c.rollout, c.packing
  samples = r.prompts * r.completions
  scorings = (1 if objective.taught(c) else 0) + (1 if c.kl_weight else 0) + (c.updates > 1)
  trained = p.rows * p.row_tokens + (r.prompts * r.prompt_tokens if p.shared_prompts else 0)
  spent = Spent(
    sampled=samples * (r.total_tokens - r.prompt_tokens), prefilled=r.prompts * r.prompt_tokens,
    scored=scorings * samples * r.total_tokens, trained=trained * c.updates,
  )  # fmt: skip
  pieces = f" / {p.pieces}" if p.pieces > 1 else ""
  return f"{r.prompts} x {r.completions}", f"{p.rows} x {p.row_tokens}{pieces}", spent


def _checkpoint_bytes(config: ModelConfig, reward_model: bool, optimizer: str) -> int:
  """Bytes of a checkpoint: parameters and Adam's moments.

  Args:
    optimizer: the section of a stage's config, as JSON.
  """
  fields = json.loads(optimizer)
  tx = make_optimizer(total_steps=1, **fields | {"frozen": tuple(fields["frozen"])})
  init = init_reward_params if reward_model else init_params

  def state(key):
    return new_state(tx, init(config, key))

  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(state, jax.random.key(0))))


def heldout_tokens(c: ConfigDict) -> int:
  """Sampled tokens of one scoring of all domains at temperature 1, at most."""
  e = c.evaluation
  long = sum(name in e.long_domains for name in c.domains)
  short = (len(c.domains) - long) * (e.total_tokens - e.prompt_tokens)
  return e.prompts * e.completions * (short + long * (e.long_total_tokens - e.long_prompt_tokens))


def read_compiled(path: str) -> dict[str, tuple[float, float | None, str]]:
  """Stage -> (GiB of a device, GiB of a host or None, topology), from the lines that experiments.compile printed.

  A stage needs what the largest of its programs needs.

  Raises:
    UserError: there is no such file, or a line is of another form.
  """
  if not path:
    return {}
  if not os.path.isfile(path):
    raise UserError(f"--compiled={path}: there is no such file; give what experiments.compile printed")
  found: dict[str, tuple[float, float | None, str]] = {}
  for line in read_lines(path, COMPILED):
    chip, host, topology = found.get(line["stage"], (0.0, None, line["topology"]))
    if topology != line["topology"]:
      raise UserError(
        f"--compiled={path}: has lines for {topology} and for {line['topology']}; give those of one slice"
      )
    hosts = [gib for gib in (host, line.get("host_gib")) if gib is not None]
    # Beside a program's memory there is what the stage keeps on the device, such as teachers.
    needed = math.inf if line["peak_gib"] is None else line["peak_gib"] + (line.get("resident_gib") or 0.0)
    found[line["stage"]] = max(chip, needed), max(hosts, default=None), topology
  return found


def table(c: ConfigDict, planned: Sequence[Planned], compiled: Mapping[str, tuple]) -> str:
  """The plan as text: a line for each stage, and sums below."""
  header = "stage status kind start domains steps batch rows tokens FLOPs checkpoint disk".split()
  topology = next(iter(compiled.values()))[2] if compiled else ""
  header += [f"{topology} device", "host"] if compiled else []
  lines = [header]
  for p in planned:
    tokens = p.spent.sampled + p.spent.prefilled + p.spent.scored + p.spent.trained
    of = _several(p.domains, "sources" if p.kind == "sft" else "domains")
    sizes = [_short(tokens), _short(p.flops), _size(p.checkpoint), _size(p.disk)]
    lines.append([p.stage, p.status, p.kind, p.start, of, str(p.steps), p.batch, p.rows, *sizes])
    chip, host, _ = compiled.get(p.stage, (None, None, ""))
    lines[-1] += ["-" if gib is None else f"{gib:.1f} GiB" for gib in (chip, host)] if compiled else []
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  left = 5  # Columns of words; the others are numbers.
  out = [
    "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
    for line in lines
  ]
  return "\n".join([*out, "", *_sums(c, planned), *_notes(planned)])


def _sums(c: ConfigDict, planned: Sequence[Planned]) -> Iterator[str]:
  sure = [p for p in planned if p.status != IF_GATE]
  scored = sum(p.kind != "reward_model" for p in sure)
  yield (
    f"all stages: {_short(sum(p.flops for p in sure))} FLOPs;"
    f" held-out scores after {scored} stages: at most {_short(scored * heldout_tokens(c))} sampled tokens, without"
    " validations and greedy scores"
  )
  yield "tokens are those sampled, prefilled, scored and trained on, each row and completion at its greatest length"
  most = max(p.checkpoint for p in planned)
  yield (
    f"the work directory needs {_size(sum(p.disk for p in sure) + most)}, with a checkpoint that is being written;"
    " every host writes its share of it"
  )


def _notes(planned: Sequence[Planned]) -> Iterator[str]:
  for p in planned:
    if p.teachers:
      yield f"teachers of {p.stage}: {_pairs(p.teachers, '=')}"
    if p.gates:
      yield f"gates of {p.stage}: {_pairs(p.gates, ' ')}"


def not_here(c: ConfigDict) -> list[str]:
  """Fields whose files or folders are not on this machine: a plan needs none of them, a run does."""
  named = {
    f"domains.{name}.{field}": c.domains[name].get(field, "") for name in c.domains for field in ("rows", "heldout")
  }
  named["tokenizer.path"] = c.tokenizer.path
  for name in c.order:
    stage = c.stages[name]
    named |= {f"stages.{name}.sources.{n}.path": source.path for n, source in stage.get("sources", {}).items()}
    if stage.init_from.startswith(hf.PREFIX):
      named[f"stages.{name}.init_from"] = stage.init_from
  paths = {
    field: value.removeprefix(hf.PREFIX) for field, value in named.items() if value and not value.startswith(PREFIX)
  }
  return sorted(field for field, path in paths.items() if not (Path(path).exists() or glob.glob(path)))


def _pairs(of: Mapping[str, str], sign: str) -> str:
  return ", ".join(f"{name}{sign}{value}" for name, value in sorted(of.items()))


def _several(names: Sequence[str], what: str, most: int = 3) -> str:
  return ",".join(sorted(names)) if len(names) <= most else f"{len(names)} {what}"


def _short(number: float) -> str:
  """A number with three digits and a factor: 1.23M."""
  for factor, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
    if number >= factor:
      return f"{number / factor:.3g}{unit}"
  return f"{number:.3g}"


def _size(size: int) -> str:
  return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
