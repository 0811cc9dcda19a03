"""Turns verdicts into rewards: judging, unfinished completions, and filters on groups."""

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nemocascade.domains.domain import Domain, Failed
from nemocascade.rollout.exchange import Exchange, alone, merge
from nemocascade.rollout.samples import Samples
from nemocascade.types import Rollout
from nemocascade.verifiers.verdict import Completion, Verdict, no_verdict

Verdicts = list[list[Verdict]]  # [Q][G]
LONGEST = 200  # Characters of a verdict's reason that other processes get.

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


def judge(
  samples: Samples, domains: Mapping[str, Domain], *, prompts: int | None = None, exchange: Exchange = alone
) -> Verdicts:
  """The verdict of each completion, in every process.

  A process judges the completions that it has. Those that are judged beside decoding have their verdicts already, or
  this waits for them. Of the others, a domain's `verify` gets all in one call. Unless the domain is judged `beside`,
  that call is made in every process, with empty lists where the process has none, because a judge may be a model
  that all processes run together. The verdict is masked if the episode's environment could not start, or failed.

  Args:
    prompts: judges only this many prompts, the first ones; None judges all.
    exchange: connects the processes.
  """
  Q = len(samples.rows) if prompts is None else prompts
  given = samples.judging.wait() if samples.judging is not None else {}
  found = [to_item(*place, verdict) for place, verdict in given.items() if place[0] < Q]
  for name in dict.fromkeys(samples.domains[:Q]):
    own = [
      (q, g, completion)
      for q in range(Q)
      if samples.domains[q] == name
      for g, completion in enumerate(samples.completions[q])
      if completion is not None and (q, g) not in given
    ]
    if not own and domains[name].beside:
      continue
    completions = [completion for *_, completion in own]
    verdicts = domains[name].verify([samples.rows[q] for q, *_ in own], completions)
    for (q, g, completion), verdict in zip(own, verdicts, strict=True):
      found.append(to_item(q, g, _unless_failed(completion, verdict)))
  return from_items(merge(found, exchange, "verdicts"), (Q, len(samples.completions[0])))


def to_item(q: int, g: int, verdict: Verdict) -> list:
  """The verdict of completion (q, g) as a JSON value, for an exchange."""
  return [q, g, float(verdict.reward), verdict.reason[:LONGEST], verdict.masked, verdict.cause]


def from_items(items: Sequence[list], shape: tuple[int, int]) -> Verdicts:
  """The verdicts [Q][G] of items of `to_item`; `shape` is (Q, G)."""
  verdict = {(q, g): Verdict(*fields) for q, g, *fields in items}
  return [[verdict[q, g] for g in range(shape[1])] for q in range(shape[0])]


def _unless_failed(completion: Completion, verdict: Verdict) -> Verdict:
  world = completion.world
  return no_verdict("error", world.reason) if isinstance(world, Failed) else verdict


def to_rollout(
  samples: Samples, verdicts: Verdicts, *, overlong: Callable = keep, compared: Verdicts | None = None,
  judged: Verdicts | None = None,
) -> tuple[Rollout, dict[str, float]]:  # fmt: skip
  """Returns the Rollout that a step trains on, and metrics "rollout/<name>" of what was left out.

  Args:
    overlong: a value of OVERLONG.
    compared: verdicts whose rewards and masks are used instead, from judges that compare the completions of a
      group. Then a masked verdict of `verdicts` does not leave out its sample, because it only says that the row
      has no verdict of its own.
    judged: all verdicts that the step has cost, those of groups that were not kept included; by default `verdicts`.
      The metrics of masked samples count them all: a group without verdicts has none that differ, so it is not kept.
  """
  finished_QG = samples.finished_QG
  verdict_QG, masked_verdict_QG = _arrays(verdicts)
  rewards_QG, masked_QG = (verdict_QG, masked_verdict_QG) if compared is None else _arrays(compared)
  counted = [v for group in compared or judged or verdicts for v in group]
  causes = collections.Counter(v.cause or "other" for v in counted if v.masked)
  room_QG = samples.limit_QG - samples.length_QG
  rewards_QG, kept_QG = overlong(rewards_QG, finished_QG, room_QG)
  valid_QG = ~masked_QG & kept_QG
  counts = {
    "rollout/masked": causes.total() / len(counted),
    **{f"rollout/masked_{cause}": n / len(counted) for cause, n in sorted(causes.items())},
    "rollout/unfinished": float(1 - finished_QG.mean()),
    "rollout/verdict": float(verdict_QG[~masked_verdict_QG].mean()) if not masked_verdict_QG.all() else 0.0,
    "rollout/tokens": float(samples.sampled_QG.mean()),
    "rollout/tokens_median": float(np.median(samples.sampled_QG)),
    "rollout/tokens_max": float(samples.sampled_QG.max()),
    "rollout/groups_with_signal": float(np.mean([bool(i) for i in _signal(verdicts)])),
  }
  rollout = Rollout(
    tokens_QGT=samples.tokens_QGT,
    segment_ids_QGT=samples.segment_ids_QGT,
    loss_mask_QGT=samples.loss_mask_QGT,
    behaviour_logprobs_QGT=samples.behaviour_logprobs_QGT,
    drawn_logprobs_QGT=samples.drawn_logprobs_QGT,
    experts_QGTY=samples.experts_QGTY,
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


def refill(rounds: Sequence[tuple[Samples, Verdicts]]) -> tuple[Samples, Verdicts]:
  """The first groups of all rounds whose verdicts differ, filled up with other groups if too few.

  The result always has as many groups as a round. `dynamic_filter` then masks the groups that were filled up.
  """
  verdicts = {(i, q): group for i, (_, round_) in enumerate(rounds) for q, group in enumerate(round_)}
  signal = dict(zip(verdicts, _signal(list(verdicts.values())), strict=True))
  order = sorted(verdicts, key=lambda place: not signal[place])[: len(rounds[0][1])]
  return Samples.pick([samples for samples, _ in rounds], order), [verdicts[place] for place in order]


def dynamic_filter(rollout: Rollout, verdicts: Verdicts) -> Rollout:
  """Masks groups whose verdicts are all equal (Nemotron-Cascade 2, arXiv 2603.19220, section 4.2).

  It compares raw verdicts, not shaped rewards.
  """
  return rollout.replace(valid_QG=rollout.valid_QG & np.array(_signal(verdicts))[:, None])
