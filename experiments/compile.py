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

The programs are those of a rollout (prefill, decode_step), of teachers and reference (score), of the update
(sft_step, rl_step, reward_step), of the judge, and of the evaluation. Teachers, reference and judge change places
with one another by copies between host and chips, for which nothing is compiled.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from experiments import cascade, reward_model, sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import kind_of
from nemocascade.fields import text
from nemocascade.mesh import first_rows, make_mesh, placed, whole
from nemocascade.mesh import rows as rows_sharding
from nemocascade.model.size import matmul_params
from nemocascade.rollout.sampling import Options
from nemocascade.runtime import checks, objective, signals, work
from nemocascade.runtime.footprint import footprint
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.scoring import scored_rows
from nemocascade.types import Batch, Prompts, Rollout

GIB = 1 << 30
# Kind of chip -> (GiB per device, devices per chip).
CHIPS = {"v5e": (16, 1), "v5p": (95, 1), "v6e": (32, 1), "tpu7x": (96, 2)}
MORE = "more chips, or mesh.expert and mesh.data that cut the parameters finer"


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    key: programs of equal keys are the same.
    trace: traces it.
    spent: the tokens that it processes.
    advice: what to change if it does not fit.
    work: computes further fields of its line: for an SFT step, work.ratios.
    arguments: what it is given of the things that a stage keeps on the devices, see Footprint.resident.
  """

  name: str
  key: tuple
  trace: Callable
  spent: Spent
  advice: str
  arguments: tuple[str, ...] = ("params",)
  work: Callable[[], dict] = dict


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
    raise UserError("the TPU compiler (libtpu) is not installed: pip install 'nemocascade[tpu]'")
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


def _rows(programs: Programs, tree):
  """Shapes and dtypes with the shardings that Programs.put gives rows."""
  return placed(tree, first_rows(tree, programs.mesh))


# Kind of stage -> a function (config, programs) -> (abstract state, its programs).


def _sft_programs(c: ConfigDict, programs: Programs):
  _, state, step_fn = sft.program(c, programs)
  of = functools.partial(jax.ShapeDtypeStruct, (c.rows, c.row_tokens))
  batch = _rows(programs, Batch(of(jnp.int32), of(jnp.int32), of(bool)))

  def trace(config):
    same = config == programs.config
    return (step_fn if same else sft.program(c, Programs(config, programs.mesh))[2]).trace(state, batch)

  step = Program(
    "sft_step", (c.to_json_best_effort(),), lambda: trace(programs.config), Spent(trained=c.rows * c.row_tokens),
    f"more pieces than pieces={c.pieces}, shorter rows than row_tokens={c.row_tokens}, or model.remat='block'",
    ("params", "moments"), functools.partial(work.ratios, programs.config, c.rows, c.row_tokens, trace),
  )  # fmt: skip
  return state, [step, *_evaluation(c, programs)]


def _reward_programs(c: ConfigDict, programs: Programs):
  _, state, step_fn = reward_model.program(c, programs)
  side = _one_document_rows(c.pairs, c.row_tokens, programs)
  advice = f"fewer pairs than pairs={c.pairs}, or shorter rows than row_tokens={c.row_tokens}"
  step = Program(
    "reward_step", (c.to_json_best_effort(),), lambda: step_fn.trace(state, side, side),
    Spent(trained=2 * c.pairs * c.row_tokens), advice, ("params", "moments"),
  )  # fmt: skip
  return state, [step, _judge(programs, c.pairs, c.row_tokens, advice, ("params",))]


def _judge(programs: Programs, B: int, T: int, advice: str, arguments: tuple[str, ...] = ()) -> Program:
  """The reward model, reading B answers of at most T tokens with their prompts."""
  rows = _one_document_rows(B, T, programs)
  trace = lambda: programs.reward.trace(programs.reward_template, *rows)
  return Program("judge", ("judge", B, T), trace, Spent(scored=B * T), advice, arguments)


def _one_document_rows(B: int, T: int, programs: Programs):
  """(tokens_BT, segment_ids_BT), as shapes with shardings."""
  rows_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
  return _rows(programs, (rows_BT, rows_BT))


def _rl_programs(c: ConfigDict, programs: Programs):
  r, p, struct = c.rollout, c.packing, jax.ShapeDtypeStruct
  Q, T, temperature = r.prompts, r.total_tokens, np.float32(r.temperature)
  found = [
    *_sampling(programs, "", Q, r.completions, r.prompt_tokens, T, drawn=r.top_p < 1, section="rollout", slots=r.slots)
  ]
  found += _scoring(c, programs)
  if checks.judged(c, c):
    e = c.evaluation
    advice = (
      f"fewer rows than evaluation.batch={e.batch}, or shorter ones than evaluation.prompt_tokens={e.prompt_tokens}"
    )
    found.append(_judge(programs, e.batch, e.prompt_tokens, advice))

  state, step_fn, proximal_fn = objective.step_program(c, programs)
  rows, count = _taught_rows(c, programs.config.hidden_size, programs.config.dtype)
  rows = {name: struct((p.rows, p.row_tokens, *row.shape[2:]), row.dtype) for name, row in rows.items()}
  # As step/rows.py leaves them on the devices.
  held = rows_sharding(programs.mesh, p.rows if p.shared_prompts else p.rows // p.pieces)
  rows, count = placed(rows, dict.fromkeys(rows, held)), _rows(programs, count)
  pieces = f"more pieces than packing.pieces={p.pieces}, or shorter rows than packing.row_tokens={p.row_tokens}"
  prompts = None
  if p.shared_prompts:
    prompts = Prompts(*_rows(programs, (struct((Q, r.prompt_tokens), jnp.int32), struct((Q,), jnp.int32))))
  tokens = p.rows * p.row_tokens + (Q * r.prompt_tokens if p.shared_prompts else 0)
  key = objective.step_settings(c), tuple(sorted(rows)), Q, r.prompt_tokens
  if c.updates > 1:
    trace = lambda rows=rows: proximal_fn.trace(programs.template, dict(rows), prompts, temperature)
    found.append(Program("proximal_logprobs", ("proximal", *key), trace, Spent(scored=tokens), pieces))
    rows = rows | {"proximal": rows["behaviour"]}
  trace = lambda: step_fn.trace(state, rows, count, _heads(c, programs), prompts, temperature)
  found.append(Program("rl_step", ("step", *key), trace, Spent(trained=tokens), pieces, ("params", "moments")))
  return state, [*found, *_evaluation(c, programs)]


def _scoring(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  """The programs by which teachers and reference read samples."""
  n, T, temperature = scored_rows(programs), c.rollout.total_tokens, np.float32(c.rollout.temperature)
  rows = _rows(programs, tuple(jax.ShapeDtypeStruct((n, T), dtype) for dtype in (jnp.int32, jnp.int32, bool)))
  traces = {  # A signal that is not named here has the log-probabilities of "score".
    "score": lambda: programs.logprobs.trace(programs.template, *rows, temperature),
    "teacher_states": lambda: programs.states.trace(programs.template, *rows[:2]),
    "teacher_likeliest": lambda: programs.likeliest.trace(programs.template, *rows, objective.topk(c), temperature),
  }
  for name in dict.fromkeys(s.name if s.name in traces else "score" for s in signals.wanted(c) if s.phase == "score"):
    advice = f"shorter ones than rollout.total_tokens={T}"
    yield Program(name, (name, n, T, objective.topk(c)), traces[name], Spent(scored=n * T), advice, ())


def _heads(c: ConfigDict, programs: Programs):
  """The shape of the teachers' heads, which a step needs that distils from their states; else None."""
  if not signals.by_states(c):
    return None
  m, checkpoints = programs.config, len(set(c.teachers.values()))
  shape = jax.ShapeDtypeStruct((checkpoints, m.hidden_size, m.vocab_size), m.dtype)
  return placed(shape, whole(programs.mesh))


def _sampling(
  programs: Programs, prefix: str, Q: int, G: int, P: int, T: int, *, drawn: bool, section: str, slots: int = 0
) -> Iterator[Program]:
  """The two programs of a rollout of G completions of Q prompts.

  Args:
    prefix: of the programs' names.
    section: of the config, and what stands before its lengths' names, for advice.
    slots: completions that are decoded at a time; 0 decodes all.
  """
  engine, struct, B = programs.engine(P, T), jax.ShapeDtypeStruct, Q * G
  prompts = _rows(programs, (struct((Q, P), jnp.int32), struct((Q,), jnp.int32)))
  S = engine.slots_of(B, slots)
  options = Options(top_p=0.5 if drawn else 1.0).by_row(B), np.zeros(B, bool)
  weights, given = programs.sampling_template, () if programs.resharded else ("params",)
  prefill = functools.cache(lambda: engine.start_fn.trace(weights, *prompts, *options, G, S, drawn, 0, 0))
  shorter = f"shorter ones than {section}.{{}}={{}}".format
  yield Program(
    f"{prefix}prefill", ("prefill", Q, G, P, T, drawn), prefill, Spent(prefilled=Q * P),
    f"fewer prompts than {Q}, or {shorter('prompt_tokens', P)}", given,
  )  # fmt: skip

  def decode():
    d = prefill().out_info
    scalars = struct((), jax.eval_shape(lambda: jax.random.key(0)).dtype), *[struct((), jnp.int32)] * 2
    return engine.decode_fn.trace(weights, placed(d, engine.layout(B).places(d)), *scalars)

  yield Program(
    f"{prefix}decode_step", ("decode", B, S, P, T, drawn), decode, Spent(sampled=S),
    f"fewer sequences than {Q} x {G}, or {shorter('total_tokens', T)}", given,
  )  # fmt: skip


def _evaluation(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  """The programs that score held-out prompts: of domains of usual length, and of those with long prompts."""
  e, G = c.evaluation, c.evaluation.completions
  long = [name for name in c.domains if name in e.long_domains]
  if len(long) < len(c.domains):
    yield from _sampling(
      programs, "evaluation_", e.batch // G, G, e.prompt_tokens, e.total_tokens, drawn=False, section="evaluation"
    )
  if long:
    yield from _sampling(
      programs, "long_evaluation_", e.long_batch // G, G, e.long_prompt_tokens, e.long_total_tokens, drawn=False,
      section="evaluation",
    )  # fmt: skip


def _taught_rows(c: ConfigDict, D: int, dtype: str):
  """(shapes of the training rows of a rollout, shape of the loss's count) of a stage; D and dtype are the model's."""
  r = c.rollout
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  f32, QG, QGT = jnp.float32, (r.prompts, r.completions), (r.prompts, r.completions, r.total_tokens)
  names, k = {signal.name for signal in signals.wanted(c)}, objective.topk(c)
  states, likeliest = "teacher_states" in names, "teacher_likeliest" in names
  rollout = Rollout(
    tokens_QGT=of(jnp.int32, *QGT), segment_ids_QGT=of(jnp.int32, *QGT), loss_mask_QGT=of(bool, *QGT),
    behaviour_logprobs_QGT=of(f32, *QGT), rewards_QG=of(f32, *QG), valid_QG=of(bool, *QG),
    drawn_logprobs_QGT=of(f32, *QGT) if r.top_p < 1 else None,
    teacher_logprobs_QGT=of(f32, *QGT) if "teacher_logprobs" in names else None,
    reference_logprobs_QGT=of(f32, *QGT) if "reference" in names else None,
    teacher_states_QGTD=of(dtype, *QGT, D) if states else None,
    teacher_Q=of(jnp.int32, r.prompts) if states else None,
    top_tokens_QGTK=of(jnp.int32, *QGT, k) if likeliest else None,
    top_logprobs_QGTK=of(f32, *QGT, k) if likeliest else None,
  )  # fmt: skip
  rows, count, _ = jax.eval_shape(objective.rows_program(objective.settings(c, "advantage", "aggregation")), rollout)
  return rows, count


PROGRAMS = {"sft": _sft_programs, "rl": _rl_programs, "reward_model": _reward_programs}

if __name__ == "__main__":
  launch(
    run,
    workdir=False,
    topology=(text("KIND:CHIPSxCHIPS of the TPU slice.", empty=False), "v5p:4x4x4"),
    stages=(text("Stages of a cascade, separated by commas; all if empty."), ""),
    programs=(text("Names of programs, separated by commas; all if empty."), ""),
  )
