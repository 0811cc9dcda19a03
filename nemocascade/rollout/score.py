"""Verdicts to rewards: what is judged, what is left out, and how much of each."""

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nemocascade.domains.domain import Domain, Verdict
from nemocascade.rollout.episode import Samples
from nemocascade.types import Rollout

Verdicts = list[list[Verdict]]  # [Q][G]

# Overlong: what becomes of completions that met the limit. (rewards_QG; finished_QG, bool; room_QG,
# tokens that were left of the limit) -> (rewards_QG, kept_QG).


def zero(rewards_QG, finished_QG, room_QG):
  """Unfinished is paid 0 (paper.md 4.2)."""
  del room_QG
  return np.where(finished_QG, rewards_QG, np.float32(0)), np.ones_like(finished_QG)


def drop(rewards_QG, finished_QG, room_QG):
  """Unfinished is left out: overlong filtering (DAPO, arXiv 2503.14476, section 3.4)."""
  del room_QG
  return rewards_QG, finished_QG


def keep(rewards_QG, finished_QG, room_QG):
  """Judged as any other."""
  del room_QG
  return rewards_QG, np.ones_like(finished_QG)


def soft(rewards_QG, finished_QG, room_QG, *, tokens: int = 16):
  """Up to 1 less where the room was less than `tokens`, and 1 less for unfinished (DAPO, eq. 13)."""
  penalty_QG = np.clip(room_QG / tokens - 1.0, -1.0, 0.0)
  penalty_QG = np.where(finished_QG, penalty_QG, -1.0)
  return (rewards_QG + penalty_QG).astype(np.float32), np.ones_like(finished_QG)


OVERLONG = {"zero": zero, "filter": drop, "keep": keep, "soft": soft}


def judge(samples: Samples, domains: Mapping[str, Domain]) -> Verdicts:
  """Each completion's verdict; a domain gets all of its completions in one call."""
  verdicts: Verdicts = [[] for _ in samples.rows]
  for name in dict.fromkeys(samples.domains):
    q = [i for i, other in enumerate(samples.domains) if other == name]
    rows = [samples.rows[i] for i in q for _ in samples.completions[i]]
    completions = [c for i in q for c in samples.completions[i]]
    flat = iter(domains[name].verify(rows, completions))
    for i in q:
      verdicts[i] = [next(flat) for _ in samples.completions[i]]
  return verdicts


def to_rollout(
  samples: Samples, verdicts: Verdicts, *, overlong: Callable = keep, rewards_QG: np.ndarray | None = None
) -> tuple[Rollout, dict[str, float]]:
  """The record a step learns from, and counts of what was left out.

  Args:
    overlong: one of OVERLONG.
    rewards_QG: in the place of the verdicts, where rewards compare a group's completions. Then a
      masked verdict leaves nothing out: it says that the row cannot be judged by itself.
  """
  finished_QG = np.array([[c.finished for c in group] for group in samples.completions])
  masked_QG = np.array([[v.masked for v in group] for group in verdicts])
  verdict_QG = np.array([[v.reward for v in group] for group in verdicts], np.float32)
  verdicted_QG = ~masked_QG
  if rewards_QG is not None:
    masked_QG = np.zeros_like(masked_QG)
  rewards_QG = verdict_QG if rewards_QG is None else np.asarray(rewards_QG, np.float32)
  causes = collections.Counter(v.cause or "other" for group in verdicts for v in group if v.masked)
  room_QG = samples.tokens_QGT.shape[-1] - (samples.segment_ids_QGT > 0).sum(-1)
  rewards_QG, kept_QG = overlong(rewards_QG, finished_QG, room_QG)
  valid_QG = ~masked_QG & kept_QG
  counts = {
    "rollout/masked": float(masked_QG.mean()),
    **{f"rollout/masked_{cause}": n / masked_QG.size for cause, n in sorted(causes.items())},
    "rollout/unfinished": float(1 - finished_QG.mean()),
    "rollout/verdict": float(verdict_QG[verdicted_QG].mean()) if verdicted_QG.any() else 0.0,
    "rollout/tokens": float(samples.loss_mask_QGT.sum(-1).mean()),
    "rollout/groups_with_signal": float(np.mean([bool(i) for i in _signal(verdicts)])),
  }
  rollout = Rollout(
    tokens_QGT=samples.tokens_QGT,
    segment_ids_QGT=samples.segment_ids_QGT,
    loss_mask_QGT=samples.loss_mask_QGT,
    behaviour_logprobs_QGT=samples.behaviour_logprobs_QGT,
    rewards_QG=rewards_QG,
    valid_QG=valid_QG,
  )
  return rollout, counts


def _signal(verdicts: Verdicts) -> list[bool]:
  """Of each group: whether its verdicts differ."""
  return [len({v.reward for v in group if not v.masked}) > 1 for group in verdicts]


def informative(verdicts: Sequence[Verdicts]) -> list[list[int]]:
  """Of each round: the groups whose raw verdicts are not all equal."""
  return [[q for q, yes in enumerate(_signal(round_)) if yes] for round_ in verdicts]


def refill(rounds: Sequence[tuple[Samples, Verdicts]], prompts: int) -> tuple[Samples, Verdicts]:
  """The first `prompts` informative groups of all rounds; uninformative ones fill up if too few.

  One shape whatever was found; `dynamic_filter` leaves the uninformative out.
  """
  samples = Samples.concatenate([s for s, _ in rounds])
  verdicts = [group for _, round_ in rounds for group in round_]
  signal = _signal(verdicts)
  order = sorted(range(len(verdicts)), key=lambda q: not signal[q])[:prompts]
  return samples.take(order), [verdicts[q] for q in order]


def dynamic_filter(rollout: Rollout, verdicts: Verdicts) -> Rollout:
  """Leaves out groups whose raw verdicts are all equal (paper.md 4.2): raw, not shaped rewards."""
  return rollout.replace(valid_QG=rollout.valid_QG & np.array(_signal(verdicts))[:, None])
