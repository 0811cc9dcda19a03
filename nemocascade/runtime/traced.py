"""The programs of an RL stage, of a judge and of the evaluation, traced on shapes alone, for experiments.compile."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from nemocascade.mesh import first_rows, placed
from nemocascade.mesh import rows as rows_sharding
from nemocascade.model.routing import as_record
from nemocascade.rollout.decoding import Decoding
from nemocascade.rollout.engine import TOGETHER, Engine
from nemocascade.rollout.sampling import Options
from nemocascade.runtime import checks, domains, objective, signals
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.sampler import ahead, recorded
from nemocascade.runtime.scoring import scored_rows
from nemocascade.types import Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    key: programs of equal keys are the same.
    trace: traces it.
    spent: the tokens that it processes.
    advice: what to change if it does not fit.
    arguments: what it is given of the things that a stage keeps on the devices, see Footprint.resident.
    work: computes further fields of its line: for an SFT step, work.ratios.
  """

  name: str
  key: tuple
  trace: Callable
  spent: Spent
  advice: str
  arguments: tuple[str, ...] = ("params",)
  work: Callable[[], dict] = dict


def as_rows(programs: Programs, tree):
  """Shapes and dtypes with the shardings that Programs.put gives rows."""
  return placed(tree, first_rows(tree, programs.mesh))


def judge(programs: Programs, B: int, T: int, advice: str, arguments: tuple[str, ...] = ()) -> Program:
  """The reward model, reading B answers of at most T tokens with their prompts."""
  rows = one_document_rows(B, T, programs)
  trace = lambda: programs.reward.trace(programs.reward_template, *rows)
  return Program("judge", ("judge", B, T), trace, Spent(scored=B * T), advice, arguments)


def one_document_rows(B: int, T: int, programs: Programs):
  """(tokens_BT, segment_ids_BT), as shapes with shardings."""
  rows_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
  return as_rows(programs, (rows_BT, rows_BT))


def of_rl(c: ConfigDict, programs: Programs):
  """(abstract state, programs) of an RL stage: rollout, scores, judge, update and evaluation."""
  e = c.evaluation
  found = [*_sampling("", _rollout(c, programs), "rollout", ahead=ahead(c, programs.mesh)), *_scoring(c, programs)]
  if checks.judged(c, c):
    advice = (
      f"fewer rows than evaluation.batch={e.batch}, or shorter ones than evaluation.prompt_tokens={e.prompt_tokens}"
    )
    found.append(judge(programs, e.batch, e.prompt_tokens, advice))
  state, updates = _updates(c, programs)
  return state, [*found, *updates, *evaluation(c, programs)]


def _updates(c: ConfigDict, programs: Programs):
  """(abstract state, the programs of an update)."""
  r, p, struct = c.rollout, c.packing, jax.ShapeDtypeStruct
  Q, temperature, found = r.prompts, np.float32(r.temperature), []
  state, step_fn, proximal_fn = objective.step_program(c, programs)
  rows, count = _taught_rows(c, programs)
  rows = {name: struct((p.rows, p.row_tokens, *row.shape[2:]), row.dtype) for name, row in rows.items()}
  # As step/rows.py leaves them on the devices.
  held = rows_sharding(programs.mesh, p.rows if p.shared_prompts else p.rows // p.pieces)
  rows, count = placed(rows, dict.fromkeys(rows, held)), as_rows(programs, count)
  pieces = f"more pieces than packing.pieces={p.pieces}, or shorter rows than packing.row_tokens={p.row_tokens}"
  prompts = None
  if p.shared_prompts:
    QP = Q, r.prompt_tokens
    given = struct(QP, jnp.int32), struct((Q,), jnp.int32), *[_experts(programs, *QP)] * ("experts" in rows)
    prompts = Prompts(*as_rows(programs, given))
  tokens = p.rows * p.row_tokens + (Q * r.prompt_tokens if p.shared_prompts else 0)
  heads = programs.heads_template(len(set(c.teachers.values()))) if signals.by_states(c) else None
  key = objective.step_settings(c), tuple(sorted(rows)), (Q, r.prompt_tokens) if p.shared_prompts else (), heads
  if c.updates > 1:
    trace = lambda rows=rows: proximal_fn.trace(programs.template, dict(rows), prompts, temperature)
    found.append(Program("proximal_logprobs", ("proximal", *key), trace, Spent(scored=tokens), pieces))
    rows = rows | {"proximal": rows["behaviour"]}
  trace = lambda: step_fn.trace(state, rows, count, heads, prompts, temperature)
  found.append(Program("rl_step", ("step", *key), trace, Spent(trained=tokens), pieces, ("params", "moments", "heads")))
  return state, found


def _records(c: ConfigDict, programs: Programs) -> bool:
  """Whether the sampler records experts: a stage may ask for it, and a model without routers has none."""
  return recorded(c) and "E" in programs.config.hybrid_override_pattern


def _experts(programs: Programs, *shape: int) -> jax.ShapeDtypeStruct:
  """The shape of the sampler's experts of tokens [*shape], see Rollout."""
  m = programs.config
  Y = m.hybrid_override_pattern.count("E") * m.num_experts_per_tok
  return jax.eval_shape(lambda: as_record(jnp.zeros((*shape, Y), jnp.int32), m.n_routed_experts))


def _scoring(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  """The programs by which teachers and reference read samples."""
  n, T, temperature = scored_rows(programs), c.rollout.total_tokens, np.float32(c.rollout.temperature)
  replay = c.rollout.replay_teachers and _records(c, programs)
  rows = as_rows(programs, tuple(jax.ShapeDtypeStruct((n, T), dtype) for dtype in (jnp.int32, jnp.int32, bool)))
  experts = [as_rows(programs, _experts(programs, n, T))] * replay
  traces = {  # A signal that is not named here has the log-probabilities of "score".
    "score": lambda: programs.logprobs.trace(programs.template, *rows, temperature, *experts),
    "teacher_states": lambda: programs.states.trace(programs.template, *rows[:2], *experts),
    "teacher_likeliest": lambda: programs.likeliest.trace(
      programs.template, *rows, objective.topk(c), temperature, *experts
    ),
  }
  for name in dict.fromkeys(s.name if s.name in traces else "score" for s in signals.wanted(c) if s.phase == "score"):
    advice = f"shorter ones than rollout.total_tokens={T}"
    yield Program(name, (name, n, T, objective.topk(c), replay), traces[name], Spent(scored=n * T), advice, ())


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoding:
  """The decoding of G completions of Q prompts.

  Args:
    slots: completions that are decoded at a time; 0 decodes all.
    records: whether the experts of the tokens are recorded.
    turns: whether an episode may have several turns. Then tools' results are taken in by a program of their own, and
      states have places beside the slots where they wait for these results.
    parked: these places; 0 takes as many as slots.
  """

  programs: Programs
  Q: int
  G: int
  P: int
  T: int
  drawn: bool = False
  slots: int = 0
  records: bool = False
  turns: bool = False
  parked: int = 0

  @property
  def engine(self) -> Engine:
    return self.programs.engine(self.P, self.T, records=self.records)

  @property
  def S(self) -> int:
    return self.engine.slots_of(self.Q * self.G, self.slots)

  @property
  def K(self) -> int:
    B = self.Q * self.G
    return self.engine.slots_of(B, self.parked or self.S) if self.turns and self.S < B else 0

  @property
  def key(self) -> tuple:
    return self.Q, self.G, self.P, self.T, self.S, self.K, self.drawn, self.records

  def start(self) -> jax.stages.Traced:
    """The traced prefill."""
    return self.programs.once(("traced start", *self.key), self._start)

  def _start(self) -> jax.stages.Traced:
    struct, B, S = jax.ShapeDtypeStruct, self.Q * self.G, self.S
    prompts = as_rows(self.programs, (struct((self.Q, self.P), jnp.int32), struct((self.Q,), jnp.int32)))
    options = Options(top_p=0.5 if self.drawn else 1.0).by_row(B), np.zeros(B, bool)
    weights = self.programs.sampling_template
    return self.engine.start_fn.trace(weights, *prompts, *options, self.G, S, self.drawn, 0, self.K)

  def state(self) -> Decoding:
    """The shapes and shardings of the Decoding."""
    d = self.start().out_info
    return placed(d, self.engine.layout(self.Q * self.G).places(d))


def _rollout(c: ConfigDict, programs: Programs) -> _Decoding:
  r = c.rollout
  return _Decoding(
    programs, r.prompts, r.completions, r.prompt_tokens, r.total_tokens, drawn=r.top_p < 1, slots=r.slots,
    records=_records(c, programs), turns=bool(domains.of_turns(c, among=c.mixture)), parked=r.parked,
  )  # fmt: skip


def of_rollout(c: ConfigDict, programs: Programs) -> Decoding:
  """The shapes and shardings of the Decoding of a stage's rollout."""
  return _rollout(c, programs).state()


def _sampling(prefix: str, of: _Decoding, section: str, *, ahead: bool = False) -> Iterator[Program]:
  """The programs of a rollout.

  Args:
    prefix: of the programs' names.
    section: of the config, and what stands before its lengths' names, for advice.
    ahead: whether the weights and the state that they decode stay on the devices during an update.
  """
  programs, engine, B, struct = of.programs, of.engine, of.Q * of.G, jax.ShapeDtypeStruct
  weights, given = programs.sampling_template, () if programs.resharded else ("params",)
  given = ("sampler", "decoding") if ahead else given
  shorter = f"shorter ones than {section}.{{}}={{}}".format
  yield Program(
    f"{prefix}prefill", ("prefill", *of.key), of.start, Spent(prefilled=of.Q * of.P),
    f"fewer prompts than {of.Q}, or {shorter('prompt_tokens', of.P)}", given,
  )  # fmt: skip
  layout, sequences = engine.layout(B), f"fewer sequences than {of.Q} x {of.G}, or {shorter('total_tokens', of.T)}"

  def decode():
    scalars = struct((), jax.eval_shape(lambda: jax.random.key(0)).dtype), *[struct((), jnp.int32)] * 2
    return engine.decode_fn.trace(weights, of.state(), *scalars)

  yield Program(f"{prefix}decode_step", ("decode", *of.key), decode, Spent(sampled=of.S), sequences, given)
  if of.turns:
    R = layout.shards * min(TOGETHER, B // layout.shards)

    def extend():
      shape = lambda *shape: struct(shape, jnp.int32, sharding=NamedSharding(programs.mesh, layout.cut))
      return engine.extend_fn.trace(weights, of.state(), shape(R), shape(R, engine.chunk), shape(R), shape(R))

    spent = Spent(prefilled=R * engine.chunk)
    yield Program(f"{prefix}tool_results", ("extend", *of.key), extend, spent, sequences, given)


def evaluation(c: ConfigDict, programs: Programs) -> Iterator[Program]:
  """The programs that score held-out prompts: of domains of usual length, and of those with long prompts."""
  e, G = c.evaluation, c.evaluation.completions
  long = [name for name in c.domains if name in e.long_domains]
  usual = [name for name in c.domains if name not in long]
  turns = lambda among: bool(domains.of_turns(c, among=among))
  if usual:
    of = _Decoding(programs, e.batch // G, G, e.prompt_tokens, e.total_tokens, turns=turns(usual))
    yield from _sampling("evaluation_", of, "evaluation")
  if long:
    of = _Decoding(programs, e.long_batch // G, G, e.long_prompt_tokens, e.long_total_tokens, turns=turns(long))
    yield from _sampling("long_evaluation_", of, "evaluation")


def _taught_rows(c: ConfigDict, programs: Programs):
  """(shapes of the training rows of a rollout, shape of the loss's count) of a stage."""
  r, m = c.rollout, programs.config
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  f32, QG, QGT = jnp.float32, (r.prompts, r.completions), (r.prompts, r.completions, r.total_tokens)
  names, k = {signal.name for signal in signals.wanted(c)}, objective.topk(c)
  states, likeliest = "teacher_states" in names, "teacher_likeliest" in names
  rollout = Rollout(
    tokens_QGT=of(jnp.int32, *QGT), segment_ids_QGT=of(jnp.int32, *QGT), loss_mask_QGT=of(bool, *QGT),
    behaviour_logprobs_QGT=of(f32, *QGT), rewards_QG=of(f32, *QG), valid_QG=of(bool, *QG),
    drawn_logprobs_QGT=of(f32, *QGT) if r.top_p < 1 else None,
    experts_QGTY=_experts(programs, *QGT) if _records(c, programs) else None,
    teacher_logprobs_QGT=of(f32, *QGT) if "teacher_logprobs" in names else None,
    reference_logprobs_QGT=of(f32, *QGT) if "reference" in names else None,
    teacher_states_QGTD=of(m.dtype, *QGT, m.hidden_size) if states else None,
    teacher_Q=of(jnp.int32, r.prompts) if states else None,
    top_tokens_QGTK=of(jnp.int32, *QGT, k) if likeliest else None,
    top_logprobs_QGTK=of(f32, *QGT, k) if likeliest else None,
  )  # fmt: skip
  rows, count, _ = jax.eval_shape(objective.rows_program(objective.settings(c, "advantage", "aggregation")), rollout)
  return rows, count
