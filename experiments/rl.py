"""One stage of reinforcement learning: prompts -> rollout -> verdicts -> advantages -> step.

  python -m experiments.rl --config=configs/tiny/if_rl.py --workdir=runs/if_rl --config.init_from=CKPT

GRPO as in Nemotron-Cascade 2. Unlike DeepSeekMath's:
  1. One update a batch, so the policy that sampled is the policy that learns.
  2. No KL to a reference (RLHF pays 0.03).
  3. The loss is averaged over the batch's tokens, not over each completion's.
MOPD is the same stage with another advantage and a teacher a domain.
"""

import functools
import json
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import loading
from experiments.assembly import Assembly, claim
from experiments.launch import launch
from experiments.stage import Outcome, start
from experiments.teaching import find, gather, score_rows, teacher_logprobs
from nemocascade import advantage
from nemocascade.domains import domain as domain_lib
from nemocascade.domains import judge as judge_lib
from nemocascade.errors import UserError, unknown
from nemocascade.metrics import MetricsWriter, progress
from nemocascade.rollout import score
from nemocascade.rollout.episode import Samples
from nemocascade.step import loss
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.policy_gradient import (
  pack_rows,
  policy_gradient_step,
  rollout_metrics,
  rows_needed,
  to_rows,
)
from nemocascade.teachers import Teachers


def check(c: ConfigDict) -> None:
  """Refuses a stage that cannot run, before anything is compiled."""
  for what, name, choices in (
    ("advantage", c.advantage, advantage.ADVANTAGES),
    ("aggregation", c.aggregation, loss.AGGREGATIONS),
    ("correction", c.correction, loss.CORRECTIONS),
    ("reward", c.reward, ("verdict", "pairwise")),
    ("overlong", c.overlong, score.OVERLONG),
  ):
    if name not in choices:
      raise unknown(what, name, choices)
  for name in c.mixture:
    if name not in c.domains:
      raise unknown("domain in mixture", name, c.domains)
    if c.advantage == "mopd" and name not in c.teachers:
      raise UserError(
        f"advantage='mopd': domain {name!r} of the mixture has no teacher; there are {sorted(c.teachers)}"
      )
  r, p = c.rollout, c.packing
  if p.row_tokens < r.total_tokens:
    raise UserError(f"packing.row_tokens={p.row_tokens} is less than rollout.total_tokens={r.total_tokens}")
  needed = rows_needed(r.prompts * r.completions, r.total_tokens, p.row_tokens)
  if p.rows < needed or p.rows % p.pieces:
    raise UserError(
      f"packing.rows={p.rows}: must be a multiple of packing.pieces={p.pieces} and at least {needed},"
      f" to hold {r.prompts * r.completions} completions of {r.total_tokens} tokens in rows of {p.row_tokens}"
    )
  if c.advantage == "grpo" and c.rollout.completions < 2:
    raise UserError("rollout.completions=1 under advantage='grpo': a group of one teaches nothing; give at least 2")


def draw(a: Assembly, mixture: dict[str, float], seed: int, frontier: dict[str, int], prompts: int):
  """The step's training rows by largest remainder of the mixture's shares; moves the frontier."""
  total = sum(mixture.values())
  want = {name: prompts * share / total for name, share in mixture.items()}
  count = {name: int(share) for name, share in want.items()}
  for name in sorted(want, key=lambda n: count[n] - want[n])[: prompts - sum(count.values())]:
    count[name] += 1
  rows = []
  for name, n in count.items():
    begin = frontier.get(name, 0)
    rows += domain_lib.rows(a.domains[name], "train", seed, begin, n)
    frontier[name] = begin + n
  return rows


def pairwise_rewards(a: Assembly, samples: Samples) -> np.ndarray:
  """rewards_QG: each group's answers compared in pairs, with length control (paper.md 4.4)."""
  count = lambda text: len(a.tokenizer.encode(text or ""))  # noqa: E731
  return judge_lib.batch_rewards(
    a.judge,
    [domain_lib.prompt_messages(row) for row in samples.rows],
    samples.completions,
    think_tokens_QG=[[count(c.reasoning) for c in group] for group in samples.completions],
    answer_tokens_QG=[[count(c.content) for c in group] for group in samples.completions],
  )


def run(
  c: ConfigDict, stage_dir: Path, a: Assembly, init_from: str = "", teachers: Teachers | None = None
) -> Outcome:
  """Trains to c.steps, with the teachers where the advantage needs them."""
  check(c)
  began = time.time()
  tx = make_optimizer(total_steps=c.steps, **c.optimizer)
  rows_fn, step_fn = programs(a, settings(c))
  state, record, store = start(a, stage_dir, tx, init_from)
  first, key = int(state.step), jax.random.fold_in(jax.random.key(a.c.seed), _number(stage_dir.name))
  frontier, tokens = record.get("frontier", {}), record.get("tokens", 0)
  if c.kl_weight:
    reference = loading.load(init_from, jax.eval_shape(a.fresh_params, jax.random.key(0)))
  r = c.rollout

  with MetricsWriter(stage_dir, start_step=first) as writer:
    bar = progress(c.steps, initial=first, desc=stage_dir.name)
    for step in range(first, c.steps):
      clock = {"begin": time.time()}
      rounds = []
      for round_ in range(c.refill_rounds):
        rows = draw(a, c.mixture.to_dict(), a.c.seed, frontier, r.prompts)
        samples = a.collect(
          state.params, jax.random.fold_in(key, step * 100 + round_), rows,
          prompt_tokens=r.prompt_tokens, total_tokens=r.total_tokens,
          completions=r.completions, temperature=r.temperature, top_p=r.top_p,
        )  # fmt: skip
        verdicts = score.judge(samples, a.domains)
        rounds.append((samples, verdicts))
        if not c.dynamic_filtering or sum(map(len, score.informative([v for _, v in rounds]))) >= r.prompts:
          break
      samples, verdicts = score.refill(rounds, r.prompts) if c.dynamic_filtering else rounds[0]
      clock["rollout"] = time.time()
      rewards_QG = pairwise_rewards(a, samples) if c.reward == "pairwise" else None
      rollout, counts = score.to_rollout(samples, verdicts, overlong=c.overlong, rewards_QG=rewards_QG)
      if c.dynamic_filtering:
        rollout = score.dynamic_filter(rollout, verdicts)
      if c.advantage == "mopd":
        rollout = rollout.replace(teacher_logprobs_QGT=teacher_logprobs(a, teachers, samples))
      if c.kl_weight:
        everyone = list(range(len(samples.rows)))
        rollout = rollout.replace(reference_logprobs_QGT=score_rows(a, reference, samples, everyone))
      clock["judge"] = time.time()
      rows, count, of_rollout = rows_fn(rollout)
      packed = pack_rows(rows, B=c.packing.rows, T=c.packing.row_tokens, accumulate=c.packing.pieces)
      state, metrics = step_fn(state, packed, count)
      metrics = {k: float(v) for k, v in jax.device_get(metrics | of_rollout).items()} | counts
      clock["step"] = time.time()
      names = list(clock)
      metrics |= {f"time/{b}": clock[b] - clock[a_] for a_, b in zip(names, names[1:], strict=False)}
      tokens += sum(int(s.loss_mask_QGT.sum()) for s, _ in rounds)
      writer.write(step, metrics)
      if step % c.samples_every == 0 or step + 1 == c.steps:
        writer.write_samples(step, sample_lines(samples, verdicts, rollout, c.samples))
      bar.update(1, reward=metrics["reward/mean"], tokens=tokens)
      if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
        store.save(step + 1, state, {"frontier": frontier, "tokens": tokens})
    bar.close()
  store.wait()
  return Outcome(state.params, str(store.path_of(c.steps)), c.steps, tokens, time.time() - began)


SCHEDULED = ("peak_lr", "warmup_steps", "final_fraction")  # Kept in the optimizer's state.


def settings(c: ConfigDict) -> str:
  """What a stage's step depends on, as JSON: stages that agree share one compiled program."""
  fields = json.loads(c.to_json_best_effort())
  names = ["advantage", "aggregation", "correction", "icepop", "kl_weight", "optimizer", "packing"]
  step = {name: fields[name] for name in names}
  step["optimizer"] = {k: v for k, v in fields["optimizer"].items() if k not in SCHEDULED}
  return json.dumps(step, sort_keys=True)


@functools.cache
def programs(a: Assembly, fields: str):
  """The jitted rollout -> rows, and the jitted step, of `settings`."""
  c = ConfigDict(json.loads(fields))
  tx = make_optimizer(peak_lr=1.0, warmup_steps=0, total_steps=1, **c.optimizer)
  correction = loss.CORRECTIONS[c.correction]
  if c.correction == "icepop":
    correction = functools.partial(correction, low=c.icepop[0], high=c.icepop[1])

  def rows(rollout):
    advantages_QGT = advantage.ADVANTAGES[c.advantage](rollout)
    rows, count = to_rows(rollout, advantages_QGT, loss.AGGREGATIONS[c.aggregation])
    return rows, count, rollout_metrics(rollout)

  step = policy_gradient_step(
    a.score_fn, tx, correction=correction, kl_weight=c.kl_weight, accumulate=c.packing.pieces
  )
  return jax.jit(rows), jax.jit(step, donate_argnums=0)


def sample_lines(samples: Samples, verdicts, rollout, count: int) -> list[dict]:
  """The first completion of up to `count` prompts, spread over the batch."""
  lines = []
  for q in np.linspace(0, len(samples.rows) - 1, min(count, len(samples.rows))).astype(int):
    verdict = verdicts[q][0]
    lines.append(
      {
        "domain": samples.domains[q],
        "prompt": domain_lib.prompt_messages(samples.rows[q])[-1]["content"],
        "completion": samples.completions[q][0].text,
        "reward": float(rollout.rewards_QG[q][0]),
        "verdict": verdict.reward,
        "reason": verdict.reason,
        "masked": verdict.masked,
      }
    )
  return lines


def _number(name: str) -> int:
  """A stage's own stream of random numbers, from its name."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def main(c: ConfigDict, workdir: Path) -> None:
  check(c)
  teachers = find(c)
  claim(c, workdir)
  if c.init_from in ("", "previous"):
    raise UserError("init_from names no checkpoint: give --config.init_from=CKPT (a checkpoint directory)")
  a = Assembly(c, workdir)
  run(c, workdir / "rl", a, c.init_from, gather(a, teachers, c.teachers_in_memory))


if __name__ == "__main__":
  launch(main)
