"""Finds and loads the teachers that a config names, and scores rollouts with them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError, unknown
from nemocascade.rollout.episode import Samples
from nemocascade.runtime import loading
from nemocascade.runtime.assembly import Assembly
from nemocascade.runtime.teachers import Teacher, Teachers, best_checkpoints, of_stage, take_probe
from nemocascade.store.record import Record
from nemocascade.types import Params, Rollout

# A teacher's name in a config: the cascade's best checkpoint so far for the domain. Nemotron-Cascade 2 takes
# its MOPD teachers from its own stages too (arXiv 2603.19220, section 4.4).
BEST = "best"
# Rows that a teacher or reference scores at a time; at least one per device. A constant number, so that one
# compiled program serves any part of a batch.
SCORED_ROWS = 64
PROBE_ROWS, PROBE_TOKENS = 4, 16
SEEN = 64  # Tokens per domain in `uniform_share`, where the teacher's logits must be computed.


def find(c: ConfigDict, record: Record | None = None) -> list[Teacher]:
  """The teachers of `c.teachers`; each value is "best", the name of a finished stage, or a checkpoint.

  Raises:
    UserError: no such stage or checkpoint exists, or no finished stage has a score for a "best".
  """
  stages = record.stages if record else []
  best = best_checkpoints(stages)
  found = []
  for domain, name in c.teachers.items():
    stage = next((s for s in stages if s["name"] == name and s["status"] == "done"), None)
    if name == BEST and domain in best:
      found.append(best[domain])
    elif name == BEST:
      raise UserError(
        f"teachers.{domain}='best': no finished stage of a cascade has a score for it here;"
        f" give --config.teachers.{domain}=CKPT"
      )
    elif stage is not None:
      found.append(of_stage(stage, domain))
    elif loading.is_checkpoint(name):
      tokenizer = loading.find(name).tokenizer
      fingerprint = tokenizer.fingerprint if tokenizer else ""
      found.append(Teacher(domain, name, float("nan"), "", tokenizer=fingerprint))
    else:
      raise unknown(f"teachers.{domain}", name, [BEST, *(s["name"] for s in stages)])
  return found


def gather(a: Assembly, teachers: list[Teacher], keep: int) -> Teachers:
  """A registry that loads and probes the teachers. Checks each teacher once before it returns.

  Args:
    keep: most teacher checkpoints in memory.
  """
  registry = Teachers(
    lambda checkpoint: loading.load(checkpoint, a.template), a.score,
    vocab_size=a.model_config.vocab_size, tokenizer=a.tokenizer.fingerprint, keep=keep,
    tokens_BT=probe_tokens(a) if teachers else None, dtype=a.model_config.dtype,
  )  # fmt: skip
  for teacher in teachers:
    registry.register(teacher)
  registry.check()
  return registry


def probe(a: Assembly, params: Params) -> dict:
  """The parameters' log-probabilities of some held-out prompts, for a stage's entry in the record."""
  return dataclasses.asdict(take_probe(a.score, params, probe_tokens(a)))


def probe_tokens(a: Assembly) -> list[list[int]]:
  """The first tokens of the first held-out prompt of up to PROBE_ROWS domains, equally many of each."""
  rows = [rows[0] for rows in a.heldout.values()][:PROBE_ROWS]
  texts = ["\n".join(str(m.get("content")) for m in prompt_messages(row)) for row in rows]
  tokens = [a.tokenizer.encode(text)[:PROBE_TOKENS] for text in texts]
  shortest = min(map(len, tokens))
  return [row[:shortest] for row in tokens]


def scored_rows(a: Assembly) -> int:
  return max(SCORED_ROWS, a.mesh.size)


def over_rows(a: Assembly, program: Callable, samples: Samples, q: list[int]) -> tuple[np.ndarray, ...]:
  """Applies `program` to the samples of the prompts `q`, scored_rows(a) rows at a time.

  Args:
    program: (tokens_BT, segment_ids_BT, wanted_BT) -> tuple of arrays [B, T, ...].
    q: indices of prompts.

  Returns:
    Each array as [len(q), G, T, ...].
  """
  parts = (samples.tokens_QGT, samples.segment_ids_QGT, samples.loss_mask_QGT)
  rows = [a_QGT[q].reshape(-1, a_QGT.shape[-1]) for a_QGT in parts]
  found, B = [], scored_rows(a)
  for i in range(0, len(rows[0]), B):
    n = len(rows[0][i : i + B])
    piece = [np.pad(x[i : i + B], ((0, B - n), (0, 0))) for x in rows]
    found.append([np.asarray(array)[:n] for array in program(*a.put(piece))])
  G = samples.tokens_QGT.shape[1]
  whole = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
  return tuple(array.reshape(len(q), G, *array.shape[1:]) for array in whole)


def score_rows(a: Assembly, params: Params, samples: Samples, q: list[int], temperature) -> np.ndarray:
  """fp32 [len(q), G, T]: log-probabilities of the sampled tokens of the prompts `q`; 0 on other tokens."""
  program = lambda *rows: (a.score(params, *rows, temperature=temperature).logprobs_BT,)  # noqa: E731
  return over_rows(a, program, samples, q)[0]


def by_teachers(a: Assembly, teachers: Teachers, samples: Samples, program: Callable) -> list[np.ndarray]:
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
    found = over_rows(a, lambda *rows, params=params: program(params, *rows), samples, q)
    out = out or [np.zeros((len(samples.rows), *array.shape[1:]), array.dtype) for array in found]
    for whole, part in zip(out, found, strict=True):
      whole[q] = part
  return out


def teacher_logprobs(a: Assembly, teachers: Teachers, samples: Samples, temperature) -> np.ndarray:
  """fp32 logprobs_QGT of the sampled tokens under the teacher of each prompt's domain; 0 on other tokens."""
  program = lambda *args: (a.score(*args, temperature=temperature).logprobs_BT,)  # noqa: E731
  return by_teachers(a, teachers, samples, program)[0]


def teacher_likeliest(a: Assembly, teachers: Teachers, samples: Samples, k: int, temperature) -> dict:
  """The teacher's k likeliest tokens at every sampled position, as the fields top_* of a Rollout."""
  tokens, logprobs = by_teachers(a, teachers, samples, lambda *args: a.likeliest(*args, k, temperature))
  return dict(top_tokens_QGTK=tokens, top_logprobs_QGTK=logprobs)


def teacher_states(a: Assembly, teachers: Teachers, samples: Samples) -> dict:
  """The teacher's hidden states from which each token is predicted, as the fields teacher_* of a Rollout."""
  (states,) = by_teachers(a, teachers, samples, lambda params, *rows: a.states(params, *rows[:2])[:1])
  order = list(teachers.checkpoints())
  teacher_Q = np.array([order.index(teachers.of(name).checkpoint) for name in samples.domains], np.int32)
  return dict(teacher_states_QGTD=states, teacher_Q=teacher_Q)


def teacher_heads(a: Assembly, teachers: Teachers) -> jax.Array:
  """heads_ZDV: the output matrices of all teacher checkpoints. `teacher_Q` indexes the first axis."""
  return jnp.stack([a.head(teachers.params(domain)) for domain in teachers.checkpoints().values()])


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
