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
from nemocascade.runtime.teachers import Teachers
from nemocascade.types import Params, Rollout
from nemocascade.verifiers.judge import Judge

# Rows that a teacher or reference scores at a time; at least one per device. A constant number, so that one
# compiled program serves any part of a batch.
SCORED_ROWS = 64
SEEN = 64  # Tokens per domain in `uniform_share`, where the teacher's logits must be computed.


@dataclasses.dataclass(frozen=True)
class Sources:
  """What the signals of a stage read.

  Attributes:
    c: the stage's config.
    temperature: fp32; sampler, trainer, teachers and reference all use softmax(logits / temperature).
    judge, teachers: None if no signal needs them.
    reference: parameters of the policy that the KL is to; None without a KL.
    heads_ZDV: the result of `teacher_heads`, if the teachers' states are a signal; else None.
  """

  c: ConfigDict
  programs: Programs
  tokenizer: Tokenizer
  temperature: np.float32
  judge: Judge | None
  teachers: Teachers | None
  reference: Params | None
  heads_ZDV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Signal:
  """Something that the rollouts of a stage are annotated with.

  Attributes:
    wanted: config of the stage -> whether the stage needs the signal.
    read: (Sources, Samples) -> {name: array [Q, ...]}. A name that is no field of Rollout goes to its `signals`.
      "compared" has verdicts that replace the samples' own, see rewards.to_rollout.
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
  everyone = list(range(len(samples.rows)))
  return dict(reference_logprobs_QGT=score_rows(s.programs, s.reference, samples, everyone, s.temperature))


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
    lambda s, samples: dict(teacher_logprobs_QGT=teacher_logprobs(s.programs, s.teachers, samples, s.temperature)),
  ),
  Signal("teacher_states", by_states, lambda s, samples: teacher_states(s.programs, s.teachers, samples)),
  Signal(
    "teacher_likeliest",
    _by_likeliest,
    lambda s, samples: teacher_likeliest(s.programs, s.teachers, samples, topk(s.c), s.temperature),
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
    reference=loading.load(init_from, programs.template) if c.kl_weight else None,
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
    counts |= uniform_share(rollout, samples.domains, s.programs.config.vocab_size, s.heads_ZDV)
  phases.end("score")
  return rollout, counts


def scored_rows(programs: Programs) -> int:
  """Rows that a teacher or reference scores at a time."""
  return max(SCORED_ROWS, programs.mesh.size)


def over_rows(programs: Programs, program: Callable, samples: Samples, q: list[int]) -> tuple[np.ndarray, ...]:
  """Applies `program` to the samples of the prompts `q`, `scored_rows` rows at a time.

  Args:
    program: (tokens_BT, segment_ids_BT, wanted_BT) -> tuple of arrays [B, T, ...].
    q: indices of prompts.

  Returns:
    Each array as [len(q), G, T, ...].
  """
  parts = (samples.tokens_QGT, samples.segment_ids_QGT, samples.loss_mask_QGT)
  rows = [np.asarray(a_QGT)[q].reshape(-1, a_QGT.shape[-1]) for a_QGT in parts]
  found, B = [], scored_rows(programs)
  for i in range(0, len(rows[0]), B):
    n = len(rows[0][i : i + B])
    piece = [np.pad(x[i : i + B], ((0, B - n), (0, 0))) for x in rows]
    found.append([np.asarray(array)[:n] for array in program(*programs.put(piece))])
  G = samples.tokens_QGT.shape[1]
  whole = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
  return tuple(array.reshape(len(q), G, *array.shape[1:]) for array in whole)


def score_rows(programs: Programs, params: Params, samples: Samples, q: list[int], temperature) -> np.ndarray:
  """fp32 [len(q), G, T]: log-probabilities of the sampled tokens of the prompts `q`; 0 on other tokens."""
  program = lambda *rows: (programs.score(params, *rows, temperature=temperature).logprobs_BT,)  # noqa: E731
  return over_rows(programs, program, samples, q)[0]


def by_teachers(programs: Programs, teachers: Teachers, samples: Samples, program: Callable) -> list[np.ndarray]:
  """Applies `program` to all samples, each prompt with the parameters of its domain's teacher.

  Each teacher checkpoint is loaded once.

  Args:
    program: (params, tokens_BT, segment_ids_BT, wanted_BT) -> tuple of arrays [B, T, ...].

  Returns:
    Each array as [Q, G, T, ...].
  """
  out = []
  for q in teachers.by_checkpoint(samples.domains).values():
    params = teachers.params(samples.domains[q[0]])
    found = over_rows(programs, lambda *rows, params=params: program(params, *rows), samples, q)
    out = out or [np.zeros((len(samples.rows), *array.shape[1:]), array.dtype) for array in found]
    for whole, part in zip(out, found, strict=True):
      whole[q] = part
  return out


def teacher_logprobs(programs: Programs, teachers: Teachers, samples: Samples, temperature) -> np.ndarray:
  """fp32 logprobs_QGT of the sampled tokens under the teacher of each prompt's domain; 0 on other tokens."""
  program = lambda *args: (programs.score(*args, temperature=temperature).logprobs_BT,)  # noqa: E731
  return by_teachers(programs, teachers, samples, program)[0]


def teacher_likeliest(programs: Programs, teachers: Teachers, samples: Samples, k: int, temperature) -> dict:
  """The teacher's k likeliest tokens at every sampled position, as the fields top_* of a Rollout."""
  tokens, logprobs = by_teachers(programs, teachers, samples, lambda *args: programs.likeliest(*args, k, temperature))
  return dict(top_tokens_QGTK=tokens, top_logprobs_QGTK=logprobs)


def teacher_states(programs: Programs, teachers: Teachers, samples: Samples) -> dict:
  """The teacher's hidden states from which each token is predicted, as the fields teacher_* of a Rollout."""
  (states,) = by_teachers(programs, teachers, samples, lambda params, *rows: programs.states(params, *rows[:2])[:1])
  order = list(teachers.checkpoints())
  teacher_Q = np.array([order.index(teachers.of(name).checkpoint) for name in samples.domains], np.int32)
  return dict(teacher_states_QGTD=states, teacher_Q=teacher_Q)


def teacher_heads(programs: Programs, teachers: Teachers) -> jax.Array:
  """heads_ZDV: the output matrices of all teacher checkpoints. `teacher_Q` indexes the first axis."""
  return jnp.stack([programs.head(teachers.params(domain)) for domain in teachers.checkpoints().values()])


def uniform_share(rollout: Rollout, domains: list[str], vocab_size: int, heads_ZDV: jax.Array | None = None) -> dict:
  """{"teacher/uniform": share of learned tokens on which a teacher is nearly uniform}, or {} without tokens.

  Nearly uniform means a log-probability within one nat of -log(vocab_size). It is that of the likeliest token
  if the rollout has top tokens or teacher states, else that of the sampled token. With teacher states only
  SEEN tokens per domain are judged. The result is the largest share of any domain.

  Args:
    domains: the domain of each prompt.
    heads_ZDV: the result of `teacher_heads`; needed if the rollout has teacher states.
  """
  learned_QGT = np.asarray(rollout.loss_mask_QGT & rollout.valid_QG[..., None])
  shares = []
  for name in dict.fromkeys(domains):
    q = [i for i, other in enumerate(domains) if other == name]
    learned = learned_QGT[q]
    if not learned.any():
      continue
    if rollout.teacher_states_QGTD is not None:
      seen_ND = np.asarray(rollout.teacher_states_QGTD)[q][learned]
      seen_ND = seen_ND[np.linspace(0, len(seen_ND) - 1, SEEN).astype(int)]  # May repeat tokens.
      logprobs = np.asarray(_top_logprobs(seen_ND, heads_ZDV, int(rollout.teacher_Q[q[0]])))
    elif rollout.top_logprobs_QGTK is not None:
      logprobs = np.asarray(rollout.top_logprobs_QGTK)[q].max(-1)[learned]
    else:
      logprobs = np.asarray(rollout.teacher_logprobs_QGT)[q][learned]
    shares.append(np.mean(np.abs(logprobs + np.log(vocab_size)) < 1.0))
  return {"teacher/uniform": float(max(shares))} if shares else {}


@jax.jit
def _top_logprobs(x_ND, heads_ZDV, z):
  logits_NV = jnp.einsum("ND,DV->NV", x_ND, heads_ZDV[z], preferred_element_type=jnp.float32)
  return jnp.max(jax.nn.log_softmax(logits_NV), axis=-1)
