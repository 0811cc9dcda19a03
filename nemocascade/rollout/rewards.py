"""Turns verdicts into rewards: judging, unfinished completions, and filters on groups."""

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nemocascade.domains.domain import Domain, NotStarted
from nemocascade.rollout.episode import Samples
from nemocascade.types import Rollout
from nemocascade.verifiers.verdict import Completion, Verdict, no_verdict

Verdicts = list[list[Verdict]]  # [Q][G]

# Rules for completions that met the sampler's limit:
# (rewards_QG; finished_QG, bool; room_QG, tokens left to the limit) -> (rewards_QG, kept_QG, bool).


def zero(rewards_QG, finished_QG, room_QG):
  """An unfinished completion gets reward 0 (IF-RL in Nemotron-Cascade 2, arXiv 2603.19220, section 4.2)."""
  del room_QG
  return np.where(finished_QG, rewards_QG, np.float32(0)), np.ones_like(finished_QG)


def drop(rewards_QG, finished_QG, room_QG):
  """An unfinished completion is left out: overlong filtering (DAPO, arXiv 2503.14476, section 3.4)."""
  del room_QG
  return rewards_QG, finished_QG


def keep(rewards_QG, finished_QG, room_QG):
  """An unfinished completion keeps its reward."""
  del room_QG
  return rewards_QG, np.ones_like(finished_QG)


def soft(rewards_QG, finished_QG, room_QG, *, tokens: int = 16):
  """Subtracts a penalty from 0 to 1 that grows over the last `tokens` before the limit (DAPO, eq. 13).

  An unfinished completion gets the full penalty of 1.
  """
  penalty_QG = np.clip(room_QG / tokens - 1.0, -1.0, 0.0)
  penalty_QG = np.where(finished_QG, penalty_QG, -1.0)
  return (rewards_QG + penalty_QG).astype(np.float32), np.ones_like(finished_QG)


OVERLONG = {"zero": zero, "filter": drop, "keep": keep, "soft": soft}


def judge(samples: Samples, domains: Mapping[str, Domain]) -> Verdicts:
  """The verdict of each completion. A domain's `verify` gets all of its completions in one call.

  The verdict is masked if the episode's environment could not start.
  """
  verdicts: Verdicts = [[] for _ in samples.rows]
  for name in dict.fromkeys(samples.domains):
    q = [i for i, other in enumerate(samples.domains) if other == name]
    rows = [samples.rows[i] for i in q for _ in samples.completions[i]]
    completions = [c for i in q for c in samples.completions[i]]
    flat = iter(domains[name].verify(rows, completions))
    for i in q:
      verdicts[i] = [_if_started(completion, next(flat)) for completion in samples.completions[i]]
  return verdicts


def _if_started(completion: Completion, verdict: Verdict) -> Verdict:
  world = completion.world
  return no_verdict("error", world.reason) if isinstance(world, NotStarted) else verdict


def to_rollout(
  samples: Samples, verdicts: Verdicts, *, overlong: Callable = keep, compared: Verdicts | None = None
) -> tuple[Rollout, dict[str, float]]:
  """Returns the Rollout that a step trains on, and metrics "rollout/<name>" of what was left out.

  Args:
    overlong: a value of OVERLONG.
    compared: verdicts whose rewards and masks are used instead, from judges that compare the completions of a
      group. Then a masked verdict of `verdicts` does not leave out its sample, because it only says that the row
      has no verdict of its own.
  """
  finished_QG = np.array([[c.finished for c in group] for group in samples.completions])
  verdict_QG, masked_verdict_QG = _arrays(verdicts)
  rewards_QG, masked_QG = (verdict_QG, masked_verdict_QG) if compared is None else _arrays(compared)
  causes = collections.Counter(v.cause or "other" for group in compared or verdicts for v in group if v.masked)
  room_QG = samples.limit_QG - (samples.segment_ids_QGT > 0).sum(-1)
  rewards_QG, kept_QG = overlong(rewards_QG, finished_QG, room_QG)
  valid_QG = ~masked_QG & kept_QG
  counts = {
    "rollout/masked": float(masked_QG.mean()),
    **{f"rollout/masked_{cause}": n / masked_QG.size for cause, n in sorted(causes.items()) if n},
    "rollout/unfinished": float(1 - finished_QG.mean()),
    "rollout/verdict": float(verdict_QG[~masked_verdict_QG].mean()) if not masked_verdict_QG.all() else 0.0,
    "rollout/tokens": float(samples.loss_mask_QGT.sum(-1).mean()),
    "rollout/groups_with_signal": float(np.mean([bool(i) for i in _signal(verdicts)])),
  }
  rollout = Rollout(
    tokens_QGT=samples.tokens_QGT,
    segment_ids_QGT=samples.segment_ids_QGT,
    loss_mask_QGT=samples.loss_mask_QGT,
    behaviour_logprobs_QGT=samples.behaviour_logprobs_QGT,
    drawn_logprobs_QGT=samples.drawn_logprobs_QGT,
    rewards_QG=rewards_QG,
    valid_QG=valid_QG,
  )
  return rollout, counts


def _arrays(verdicts: Verdicts) -> tuple[np.ndarray, np.ndarray]:
  """(rewards_QG, fp32; masked_QG, bool) of verdicts."""
  rewards_QG = np.array([[v.reward for v in group] for group in verdicts], np.float32)
  return rewards_QG, np.array([[v.masked for v in group] for group in verdicts])


def _signal(verdicts: Verdicts) -> list[bool]:
  """For each group, whether its unmasked verdicts differ."""
  return [len({v.reward for v in group if not v.masked}) > 1 for group in verdicts]


def informative(verdicts: Sequence[Verdicts]) -> list[list[int]]:
  """For each round, the indices of the groups whose raw verdicts are not all equal."""
  return [[q for q, yes in enumerate(_signal(round_)) if yes] for round_ in verdicts]


def refill(rounds: Sequence[tuple[Samples, Verdicts]], prompts: int) -> tuple[Samples, Verdicts]:
  """The first `prompts` groups of all rounds whose verdicts differ, filled up with other groups if too few.

  The result always has the same shape. `dynamic_filter` then masks the groups that were filled up.
  """
  samples = Samples.concatenate([s for s, _ in rounds])
  verdicts = [group for _, round_ in rounds for group in round_]
  signal = _signal(verdicts)
  order = sorted(range(len(verdicts)), key=lambda q: not signal[q])[:prompts]
  return samples.take(order), [verdicts[q] for q in order]


def dynamic_filter(rollout: Rollout, verdicts: Verdicts) -> Rollout:
  """Masks groups whose verdicts are all equal (Nemotron-Cascade 2, arXiv 2603.19220, section 4.2).

  It compares raw verdicts, not shaped rewards.
  """
  return rollout.replace(valid_QG=rollout.valid_QG & np.array(_signal(verdicts))[:, None])
