"""Compiles every program of a stage for a TPU slice, on a machine without TPUs.

  python -m experiments.compile --config=configs/nano_30b/sft.py --topology=v5p:4x4x4
  python -m experiments.compile --config=configs/nano_30b/cascade.py --stages=if_rl,mopd --programs=rl_step,score

Prints a JSON line per program: {"stage", "program", "topology", "chips", "tokens", "peak_gib", "argument_gib",
"temp_gib", "resident_gib", "host_gib", "flops", "compile_s"}. Memory is the compiler's count for one device (a chip;
on tpu7x one of its two cores). `resident_gib` is what the stage keeps on a device beside the program's arguments,
`host_gib` what it holds in the memory of a host; both are computed from shapes (runtime/footprint.py). flops cover
all devices: 2 per parameter and token forward, 6 with the backward pass. An SFT step also has
`work_ratio`, its operations over those that its documents need, and `remat_ratio`, those that model.remat adds
(runtime/work.py). Nothing is allocated. If programs do not
fit, an error at the end names them and what to change.

The programs are those of a rollout (prefill, decode_step, and tool_results where there are tools), of teachers and
reference (score), of the update (sft_step, rl_step, reward_step), of the judge, and of the evaluation. Teachers,
reference and judge change places with one another by copies between host and chips, for which nothing is compiled.
Small programs between these, which copy rows from one layout to another, are left out.
"""

import functools
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from experiments import cascade, reward_model, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import kind_of
from nemocascade.fields import text
from nemocascade.mesh import make_mesh
from nemocascade.model.size import matmul_params
from nemocascade.runtime import traced, work
from nemocascade.runtime.footprint import footprint
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.traced import Program
from nemocascade.types import Batch

GIB = 1 << 30
# Kind of chip -> (GiB per device, devices per chip).
CHIPS = {"v5e": (16, 1), "v5p": (95, 1), "v6e": (32, 1), "tpu7x": (96, 2)}
MORE = "more chips, or mesh.expert and mesh.data that cut the parameters finer"


def run(c: ConfigDict, topology: str, stages: str = "", programs: str = "") -> list[dict]:
  """Compiles the programs; prints and returns their lines.

  Args:
    stages: of a cascade, separated by commas; "" is all. A program that several stages have is compiled once.
    programs: their names, separated by commas; "" is all.

  Raises:
    UserError: the topology is unknown, the compiler is not installed, dimensions do not divide over the mesh,
      or a program does not fit.
  """
  of = _stages(c, stages)
  kind, devices = slice_of(topology)
  gib, cores = CHIPS[kind]
  parts = Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(**c.mesh, of=devices))
  of_host = max(1, len(devices) // len({device.process_index for device in devices}))
  listed = {name: PROGRAMS[stage.kind](stage, parts) for name, stage in of.items()}
  chosen = _chosen(programs, listed)
  lines, too_large, done = [], [], {}
  for stage, (state, found) in listed.items():
    held = footprint(of[stage], parts, state, of_host)
    for program in found:
      if program.name not in chosen:
        continue
      if program.key not in done:
        done[program.key] = _compiled(program, parts)
      line = {"stage": stage, "program": program.name, "topology": topology, "chips": len(devices) // cores}
      line |= done[program.key]
      line |= {"resident_gib": _gib(held.resident(program.arguments)), "host_gib": _gib(sum(held.host.values()))}
      print(json.dumps(line), flush=True)
      lines.append(line)
      if line["peak_gib"] + line["resident_gib"] > gib or line["temp_gib"] is None:
        too_large.append(_too_large(line, program))
  if too_large:
    raise UserError(f"a device of {topology} has {gib} GiB; {'; '.join(too_large)}")
  return lines


def _chosen(names: str, listed: dict) -> set[str]:
  """The names of the programs to compile. Raises UserError if no stage has one of them."""
  known = {program.name for _, found in listed.values() for program in found}
  for name in (wanted := {name for name in names.split(",") if name}):
    if name not in known:
      raise unknown("program in --programs", name, sorted(known))
  return wanted or known


def _too_large(line: dict, program: Program) -> str:
  """What a program needs that does not fit, and what to change."""
  where = f"{line['stage']}: " * bool(line["stage"])
  beside = f" beside {line['resident_gib']:.1f} GiB of the stage" if line["resident_gib"] >= 0.1 else ""
  return f"{where}{program.name} needs {line['peak_gib']:.1f} GiB{beside}: give {program.advice}, or {MORE}"


def _stages(c: ConfigDict, names: str) -> dict[str, ConfigDict]:
  """Stage -> its config; the name of a stage's own file is "". Raises UserError if one of them cannot run."""
  kind = kind_of(c.to_dict())
  if kind == "cascade":
    cascade.check(c)
    chosen = [name for name in names.split(",") if name] or list(c.order)
    for name in chosen:
      if name not in c.order:
        raise unknown("stage in --stages", name, c.order)
    return {name: cascade.flat(c, name) for name in chosen}
  if kind not in PROGRAMS:
    raise unknown("kind of config to compile", kind, [*PROGRAMS, "cascade"])
  if names:
    raise UserError(f"--stages={names}: must be empty: this config is of one stage, not of a cascade")
  cascade.KINDS[kind].check(c)
  return {"": c}


def _compiled(program: Program, programs: Programs) -> dict:
  """Compiles a program: the fields of its line that do not depend on the stage."""
  s, began = program.spent, time.time()
  line = {"tokens": s.sampled + s.prefilled + s.scored + s.trained}
  line |= measure(program.trace) | {"flops": s.flops(matmul_params(programs.config))} | program.work()
  return line | {"compile_s": round(time.time() - began, 1)}


def _gib(size: float) -> float:
  return round(size / GIB, 2)


def slice_of(topology: str) -> tuple[str, list[jax.Device]]:
  """(kind of chip, abstract devices to compile for) of a slice.

  Raises:
    UserError: the topology is unknown, or the compiler is not installed.
  """
  kind, _, shape = topology.partition(":")
  if kind not in CHIPS:
    raise unknown(f"kind of chip in --topology={topology!r}", kind, CHIPS)
  if not re.fullmatch(r"\d+(x\d+)*", shape):
    raise UserError(f"--topology={topology!r}: give KIND:CHIPSxCHIPS, such as v5p:4x4x4 or v6e:16x16")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("the TPU compiler (libtpu) is not installed: pip install -e '.[tpu]'")
  # libtpu reads these when it loads: do not look for a slice, and allow other processes to load it.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # A program from the cache can report other memory.
  try:
    return kind, list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except Exception as error:  # Any error of the compiler.
    why = " ".join(str(error).split())[:200]
    raise UserError(f"--topology={topology!r}: not a slice that the TPU compiler knows ({why})") from error


def measure(trace: Callable) -> dict[str, float | None]:
  """GiB of one device: peak, arguments, and temporary buffers.

  The last two are None if the compiler refuses the program because it does not fit.
  """
  try:
    m = trace().lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm", str(error))
    if used is None:
      raise
    peak = float(used[1]) * {"M": 2**-10, "G": 1, "T": 2**10}[used[2]]
    return {"peak_gib": round(peak, 2), "argument_gib": None, "temp_gib": None}
  # A result that reuses the buffer of an argument is counted once.
  sizes = m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes
  return {
    "peak_gib": _gib(sum(sizes) + m.generated_code_size_in_bytes),
    "argument_gib": _gib(sizes[0]),
    "temp_gib": _gib(sizes[2]),
  }


# Kind of stage -> a function (config, programs) -> (abstract state, its programs).


def _sft_programs(c: ConfigDict, programs: Programs):
  _, state, step_fn = sft.program(c, programs)
  of = functools.partial(jax.ShapeDtypeStruct, (c.rows, c.row_tokens))
  batch = traced.as_rows(programs, Batch(of(jnp.int32), of(jnp.int32), of(bool)))

  def trace(config):
    same = config == programs.config
    return (step_fn if same else sft.program(c, Programs(config, programs.mesh))[2]).trace(state, batch)

  step = Program(
    "sft_step", (c.to_json_best_effort(),), lambda: trace(programs.config), Spent(trained=c.rows * c.row_tokens),
    f"more pieces than pieces={c.pieces}, shorter rows than row_tokens={c.row_tokens}, or model.remat='block'",
    ("params", "moments"), functools.partial(work.ratios, programs.config, c.rows, c.row_tokens, trace),
  )  # fmt: skip
  return state, [step, *traced.evaluation(c, programs)]


def _reward_programs(c: ConfigDict, programs: Programs):
  _, state, step_fn = reward_model.program(c, programs)
  side = traced.one_document_rows(c.pairs, c.row_tokens, programs)
  advice = f"fewer pairs than pairs={c.pairs}, or shorter rows than row_tokens={c.row_tokens}"
  step = Program(
    "reward_step", (c.to_json_best_effort(),), lambda: step_fn.trace(state, side, side),
    Spent(trained=2 * c.pairs * c.row_tokens), advice, ("params", "moments"),
  )  # fmt: skip
  return state, [step, traced.judge(programs, c.pairs, c.row_tokens, advice, ("params",))]


PROGRAMS = {"sft": _sft_programs, "rl": traced.of_rl, "reward_model": _reward_programs}

if __name__ == "__main__":
  launch(
    run,
    workdir=False,
    topology=(text("KIND:CHIPSxCHIPS of the TPU slice.", empty=False), "v5p:4x4x4"),
    stages=(text("Stages of a cascade, separated by commas; all if empty."), ""),
    programs=(text("Names of programs, separated by commas; all if empty."), ""),
  )
