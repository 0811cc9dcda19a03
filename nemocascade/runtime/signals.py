"""The signals that a rollout is annotated with: what teachers, the reference and the judge say about it.

A new signal is an entry of SIGNALS and the function that reads it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.report.metrics import Phases
from nemocascade.rollout import rewards
from nemocascade.rollout.samples import Samples
from nemocascade.runtime import loading
from nemocascade.runtime.judge import compared
from nemocascade.runtime.objective import chosen, needs, taught, topk
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.sampler import Sampled
from nemocascade.runtime.scoring import by_teachers, score_rows
from nemocascade.runtime.swap import HostParams
from nemocascade.runtime.teachers import Teachers
from nemocascade.runtime.uniform import uniform_share
from nemocascade.types import Rollout
from nemocascade.verifiers.judge import Judge


@dataclasses.dataclass(frozen=True)
class Sources:
  """What the signals of a stage read.

  Attributes:
    c: the stage's config.
    temperature: fp32; sampler, trainer, teachers and reference all use softmax(logits / temperature).
    judge, teachers: None if no signal needs them.
    reference: parameters of the policy that the KL is to, on the devices only while they score; None without a KL.
    heads_ZDV: the result of `teacher_heads`, if the teachers' states are a signal; else None.
  """

  c: ConfigDict
  programs: Programs
  tokenizer: Tokenizer
  temperature: np.float32
  judge: Judge | None
  teachers: Teachers | None
  reference: HostParams | None
  heads_ZDV: jax.Array | None

  @property
  def replays(self) -> bool:
    """Whether teachers and reference take the experts that the sampler recorded."""
    return self.c.rollout.replay_teachers


@dataclasses.dataclass(frozen=True)
class Signal:
  """Something that the rollouts of a stage are annotated with.

  Attributes:
    wanted: config of the stage -> whether the stage needs the signal.
    read: (Sources, Samples) -> {name: array [Q, ...]}, on the devices if it has tokens. A name that is no field of
      Rollout goes to its `signals`. "compared" has verdicts that replace the samples' own, see rewards.to_rollout.
    phase: "score" if `read` runs a language model over all samples, which counts as scored tokens; else "verdict".
  """

  name: str
  wanted: Callable[[ConfigDict], bool]
  read: Callable[[Sources, Samples], dict]
  phase: str = "score"


def by_states(c: ConfigDict) -> bool:
  """Whether the stage distils from whole distributions, which are computed from the teachers' hidden states."""
  return bool(c.distillation_weight) and topk(c) is None


def _by_likeliest(c: ConfigDict) -> bool:
  return bool(c.distillation_weight) and topk(c) is not None


def _reference(s: Sources, samples: Samples) -> dict:
  assert s.reference is not None  # open_sources loads it.
  logprobs_QGT = score_rows(s.programs, s.reference.put(), samples, s.temperature, replay=s.replays)
  return dict(reference_logprobs_QGT=logprobs_QGT)


SIGNALS = (
  Signal(
    "compared",
    lambda c: c.reward == "pairwise",
    lambda s, samples: dict(compared=compared(s.judge, s.tokenizer, samples)),
    phase="verdict",
  ),
  Signal(
    "teacher_logprobs",
    lambda c: needs(c).teachers,
    lambda s, samples: dict(
      teacher_logprobs_QGT=teacher_logprobs(s.programs, s.teachers, samples, s.temperature, replay=s.replays)
    ),
  ),
  Signal(
    "teacher_states",
    by_states,
    lambda s, samples: teacher_states(s.programs, s.teachers, samples, replay=s.replays),
  ),
  Signal(
    "teacher_likeliest",
    _by_likeliest,
    lambda s, samples: teacher_likeliest(s.programs, s.teachers, samples, topk(s.c), s.temperature, replay=s.replays),
  ),
  Signal("reference", lambda c: bool(c.kl_weight), _reference),
)


def wanted(c: ConfigDict) -> list[Signal]:
  """The signals that a stage needs."""
  return [signal for signal in SIGNALS if signal.wanted(c)]


def scored_tokens(samples: Samples, signals: Sequence[Signal]) -> int:
  """Tokens that teachers and reference read to give these signals."""
  return int(samples.length_QG.sum()) * sum(signal.phase == "score" for signal in signals)


def open_sources(c: ConfigDict, parts: Parts, teachers: Teachers | None, init_from: str) -> Sources:
  """Loads what the stage's signals read.

  Args:
    init_from: the checkpoint that the stage starts from, which is the reference of the KL.
  """
  programs = parts.programs
  return Sources(
    c, programs, parts.text.tokenizer, np.float32(c.rollout.temperature), parts.judge, teachers,
    reference=HostParams.of(loading.load(init_from, programs.template)) if c.kl_weight else None,
    heads_ZDV=teacher_heads(programs, teachers) if by_states(c) else None,
  )  # fmt: skip


def annotate(sampled: Sampled, signals: Sequence[Signal], s: Sources, phases: Phases) -> tuple[Rollout, dict]:
  """The rollout of a step with its rewards and signals, and metrics of what was masked and of the teachers.

  Args:
    signals: the result of `wanted`.
    phases: the step's timer; the time of each signal goes to its phase.
  """
  samples, found = sampled.samples, {}
  for signal in signals:
    found |= signal.read(s, samples)
    phases.end(signal.phase)
  rollout, counts = rewards.to_rollout(
    samples,
    sampled.verdicts,
    overlong=chosen(s.c, "overlong"),
    compared=found.pop("compared", None),
    judged=sampled.judged,
  )
  if s.c.dynamic_filtering:
    rollout = rewards.dynamic_filter(rollout, sampled.verdicts)
  phases.end("verdict")
  fields = {field.name for field in dataclasses.fields(Rollout)}
  own = {name: found.pop(name) for name in found.keys() - fields}
  rollout = rollout.replace(**found, signals=own)
  if taught(s.c):
    counts |= uniform_share(rollout, samples.domains, s.programs.config.vocab_size, s.programs.mesh, s.heads_ZDV)
  phases.end("score")
  return rollout, counts


def teacher_logprobs(
  programs: Programs, teachers: Teachers, samples: Samples, temperature, *, replay: bool = False
) -> jax.Array:  # fmt: skip
  """fp32 logprobs_QGT of the sampled tokens under the teacher of each prompt's domain; 0 on other tokens."""
  program = lambda *args: (programs.logprobs(*args[:4], temperature, *args[4:]),)  # noqa: E731
  return by_teachers(programs, teachers, samples, program, replay=replay)[0]


def teacher_likeliest(
  programs: Programs, teachers: Teachers, samples: Samples, k: int, temperature, *, replay: bool = False
) -> dict:  # fmt: skip
  """The teacher's k likeliest tokens at every sampled position, as the fields top_* of a Rollout."""
  program = lambda *args: programs.likeliest(*args[:4], k, temperature, *args[4:])  # noqa: E731
  tokens, logprobs = by_teachers(programs, teachers, samples, program, replay=replay)
  return dict(top_tokens_QGTK=tokens, top_logprobs_QGTK=logprobs)


def teacher_states(programs: Programs, teachers: Teachers, samples: Samples, *, replay: bool = False) -> dict:
  """The teacher's hidden states from which each token is predicted, as the fields teacher_* of a Rollout."""
  program = lambda params, *rows: (programs.states(params, *rows[:2], *rows[3:]),)  # noqa: E731
  (states,) = by_teachers(programs, teachers, samples, program, replay=replay)
  order = list(teachers.checkpoints())
  teacher_Q = np.array([order.index(teachers.of(name).checkpoint) for name in samples.domains], np.int32)
  return dict(teacher_states_QGTD=states, teacher_Q=teacher_Q)


def teacher_heads(programs: Programs, teachers: Teachers) -> jax.Array:
  """heads_ZDV: the output matrices of all teacher checkpoints. `teacher_Q` indexes the first axis."""
  heads = [programs.heads(teachers.params(domain)) for domain in teachers.checkpoints().values()]
  teachers.leave()
  return jax.jit(jnp.concatenate, out_shardings=programs.heads_template(len(heads)).sharding)(heads)
