"""From the teachers that a config names to checked checkpoints, and what they say of a rollout."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import loading
from experiments.assembly import Assembly
from nemocascade.cascade import Record
from nemocascade.domains import domain as domain_lib
from nemocascade.errors import UserError, unknown
from nemocascade.rollout.episode import Samples
from nemocascade.teachers import Teacher, Teachers, best_checkpoints, of_stage, take_probe
from nemocascade.types import Params, Rollout

BEST = "best"  # In a config: the cascade's best checkpoint for the domain so far (paper.md 5.2).
# Rows that a teacher or reference scores at a time, or one a device: one compiled shape for any share
# of a batch.
SCORED_ROWS = 64
PROBE_ROWS, PROBE_TOKENS = 4, 16
SEEN = 64  # Tokens of a domain by which a teacher is judged, where its whole distribution has to be made.


def find(c: ConfigDict, record: Record | None = None) -> list[Teacher]:
  """The teachers of `c.teachers`: each is "best", the name of a finished stage, or a checkpoint.

  Raises:
    UserError: there is no such stage or checkpoint, or no cascade whose best could be taken.
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
  """The registry that loads and probes them; each has been, once, when this returns."""
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
  """What the parameters say of some held-out prompts, for a stage's entry."""
  return dataclasses.asdict(take_probe(a.score, params, probe_tokens(a)))


def probe_tokens(a: Assembly) -> list[list[int]]:
  """The first tokens of some held-out prompts, equally many of each."""
  rows = [rows[0] for rows in a.heldout.values()][:PROBE_ROWS]
  texts = ["\n".join(str(m.get("content")) for m in domain_lib.prompt_messages(row)) for row in rows]
  tokens = [a.tokenizer.encode(text)[:PROBE_TOKENS] for text in texts]
  shortest = min(map(len, tokens))
  return [row[:shortest] for row in tokens]


def scored_rows(a: Assembly) -> int:
  return max(SCORED_ROWS, a.mesh.size)


def over_rows(a: Assembly, program: Callable, samples: Samples, q: list[int]) -> tuple[np.ndarray, ...]:
  """program(tokens_BT, segment_ids_BT, wanted_BT) -> arrays [B, T, ...], of these prompts: [len(q), G, T, ...]."""
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
  """logprobs [len(q), G, T] of the sampled tokens of these prompts at a temperature; 0 elsewhere."""
  program = lambda *rows: (a.score(params, *rows, temperature=temperature).logprobs_BT,)  # noqa: E731
  return over_rows(a, program, samples, q)[0]


def by_teachers(a: Assembly, teachers: Teachers, samples: Samples, program: Callable) -> list[np.ndarray]:
  """program(params, tokens_BT, segment_ids_BT, wanted_BT) -> arrays, each prompt's by its domain's teacher.

  Each checkpoint loads once.
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
  """logprobs_QGT, each prompt's under the teacher of its domain, at the samples' temperature."""
  program = lambda *args: (a.score(*args, temperature=temperature).logprobs_BT,)  # noqa: E731
  return by_teachers(a, teachers, samples, program)[0]


def teacher_likeliest(a: Assembly, teachers: Teachers, samples: Samples, k: int, temperature) -> dict:
  """The k tokens that each prompt's teacher finds likeliest at every place, as fields of a Rollout."""
  tokens, logprobs = by_teachers(a, teachers, samples, lambda *args: a.likeliest(*args, k, temperature))
  return dict(top_tokens_QGTK=tokens, top_logprobs_QGTK=logprobs)


def teacher_states(a: Assembly, teachers: Teachers, samples: Samples) -> dict:
  """What each prompt's teacher predicts its tokens from, as fields of a Rollout."""
  (states,) = by_teachers(a, teachers, samples, lambda params, *rows: a.states(params, *rows[:2])[:1])
  order = list(teachers.checkpoints())
  teacher_Q = np.array([order.index(teachers.of(name).checkpoint) for name in samples.domains], np.int32)
  return dict(teacher_states_QGTD=states, teacher_Q=teacher_Q)


def teacher_heads(a: Assembly, teachers: Teachers) -> jax.Array:
  """heads_ZDV of all teachers, in the order that `teacher_Q` counts in."""
  return jnp.stack([a.head(teachers.params(domain)) for domain in teachers.checkpoints().values()])


def uniform_share(rollout: Rollout, domains: list[str], vocab_size: int, heads_ZDV: jax.Array | None = None) -> dict:
  """{"teacher/uniform": share of learned tokens on which a teacher is within a nat of 1 / vocab_size}.

  Judged by the sampled token's log-probability, or by the likeliest token's where those were asked for;
  of the domain whose share is largest. Of teachers whose states the rollout carries, SEEN tokens a domain.
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
      seen_ND = seen_ND[np.linspace(0, len(seen_ND) - 1, SEEN).astype(int)]  # One shape: of few, some twice.
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
