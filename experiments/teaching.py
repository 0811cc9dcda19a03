"""From the teachers that a config names to checked checkpoints, and what they say of a rollout."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from experiments import loading
from experiments.assembly import Assembly
from nemocascade.cascade import Record
from nemocascade.domains import domain as domain_lib
from nemocascade.errors import UserError, unknown
from nemocascade.rollout.episode import Samples
from nemocascade.teachers import Teacher, Teachers, best_checkpoints, of_stage, take_probe
from nemocascade.types import Params

BEST = "best"  # In a config: the cascade's best checkpoint for the domain so far (paper.md 5.2).
# Rows that a teacher or reference scores at a time, or one a device: one compiled shape for any share
# of a batch.
SCORED_ROWS = 64
PROBE_ROWS, PROBE_TOKENS = 4, 16


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
    tokens_BT=probe_tokens(a) if teachers else None,
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


def score_rows(a: Assembly, params: Params, samples: Samples, q: list[int]) -> np.ndarray:
  """logprobs [len(q), G, T] of the sampled tokens of these prompts; 0 elsewhere."""
  parts = (samples.tokens_QGT, samples.segment_ids_QGT, samples.loss_mask_QGT)
  rows = [a_QGT[q].reshape(-1, a_QGT.shape[-1]) for a_QGT in parts]
  out_BT, B = np.zeros(rows[0].shape, np.float32), scored_rows(a)
  for i in range(0, len(out_BT), B):
    n = len(out_BT[i : i + B])
    piece = [np.pad(x[i : i + B], ((0, B - n), (0, 0))) for x in rows]
    out_BT[i : i + n] = np.asarray(a.score(params, *a.put(piece)).logprobs_BT)[:n]
  return out_BT.reshape(len(q), -1, out_BT.shape[-1])


def teacher_logprobs(a: Assembly, teachers: Teachers, samples: Samples) -> np.ndarray:
  """logprobs_QGT, each prompt's under the teacher of its domain; each checkpoint loads once."""
  out_QGT = np.zeros(samples.tokens_QGT.shape, np.float32)
  for q in teachers.by_checkpoint(samples.domains).values():
    out_QGT[q] = score_rows(a, teachers.params(samples.domains[q[0]]), samples, q)
  return out_QGT
