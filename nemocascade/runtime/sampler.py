"""Samples the completions of a step's prompts, and gets their verdicts."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade.report.metrics import Phases
from nemocascade.rollout import episode, rewards
from nemocascade.rollout.exchange import Exchange
from nemocascade.rollout.samples import Samples
from nemocascade.runtime.answer_lines import answer_lines
from nemocascade.runtime.hosts import decided, exchange
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.parts import Parts
from nemocascade.types import Params, Rollout


@dataclasses.dataclass(frozen=True)
class Sampled:
  """The samples of a step and their verdicts.

  Attributes:
    judged: the verdicts of all rounds, those of groups that were not kept included.
    rounds: batches that were sampled.
    too_long: prompts that were skipped because they are too long.
    spent: tokens that all rounds have cost.
    cost: metrics of the last round's decoding, in this process.
  """

  samples: Samples
  verdicts: rewards.Verdicts
  judged: rewards.Verdicts
  rounds: int
  too_long: int
  spent: Spent
  cost: Mapping[str, float]

  @property
  def metrics(self) -> dict[str, float]:
    return {"rollout/rounds": self.rounds, "rollout/too_long_prompts": self.too_long, **self.cost}


def sample(
  c: ConfigDict, parts: Parts, mixture: Mixture, weights: Params, key: jax.Array, step: int, phases: Phases, *,
  exchange: Exchange = exchange,
) -> Sampled:  # fmt: skip
  """Samples `rollout.prompts` groups.

  With dynamic_filtering it samples up to `refill_rounds` batches, until enough groups have verdicts that differ.

  Args:
    weights: the result of `for_sampling`.
    key: the stage's random key; each step and round gets its own.
    phases: the step's timer.
    exchange: connects the processes.
  """
  r, rounds, too_long, spent = c.rollout, [], 0, Spent()
  for round_ in range(c.refill_rounds):
    rows, prompts, left_out = mixture.draw(r.prompts)
    decided(prompts, "drawn prompts")
    too_long += left_out
    samples = episode.collect(
      parts.programs.engine(r.prompt_tokens, r.total_tokens, records=recorded(c), exact=c.packing.pieces * r.exact),
      weights,
      jax.random.fold_in(key, step * 100 + round_),
      rows, parts.domains, tokenizer=parts.text.tokenizer, G=r.completions, prompts=prompts,
      completion_tokens=c.packing.row_tokens if c.packing.shared_prompts else None,
      temperature=np.float32(r.temperature), top_p=r.top_p, slots=r.slots, parked=r.parked, calls_s=r.calls_s,
      episode_s=r.episode_s, judged=len(rows), verdict_s=r.verdict_s, exchange=exchange,
    )  # fmt: skip
    decided([samples.length_QG.tolist(), samples.sampled_QG.tolist(), samples.finished_QG.tolist()], "ends of episodes")
    phases.end("rollout")
    verdicts = rewards.judge(samples, parts.domains, exchange=exchange)
    decided([[dataclasses.astuple(verdict) for verdict in group] for group in verdicts], "verdicts")
    rounds.append((samples, verdicts))
    phases.end("verdict")
    spent = spent.plus_rollout(samples)
    if not c.dynamic_filtering or sum(map(len, rewards.informative([v for _, v in rounds]))) >= r.prompts:
      break
  decided(len(rounds), "rounds")
  judged = [group for _, verdicts in rounds for group in verdicts]
  samples, verdicts = rewards.refill(rounds) if c.dynamic_filtering else rounds[0]
  return Sampled(samples, verdicts, judged, len(rounds), too_long, spent, rounds[-1][0].metrics)


def recorded(c: ConfigDict) -> bool:
  """Whether the sampler of a stage records the experts of each token."""
  return c.rollout.record_experts or c.rollout.replay or c.rollout.replay_teachers


def ahead(c: ConfigDict, mesh: Mesh) -> bool:
  """Whether a stage samples a batch while the one before is learned: several devices need their programs in one order."""
  return bool(c.rollout.lag) and mesh.size == 1


def sample_lines(sampled: Sampled, rollout: Rollout, count: int) -> list[dict]:
  """Lines of samples.jsonl: the first completion of up to `count` prompts, spread over the batch.

  All processes call it.
  """
  samples = sampled.samples
  places = np.linspace(0, len(samples.rows) - 1, min(count, len(samples.rows))).astype(int).tolist()
  lines = answer_lines(samples, sampled.verdicts, places, "texts of samples")
  return [line | {"reward": float(rollout.rewards_QG[q][0])} for q, line in zip(places, lines, strict=True)]
