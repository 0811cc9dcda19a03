"""One stage of reinforcement learning: prompts -> rollout -> verdicts -> advantages -> step.

  python -m experiments.rl --config=configs/tiny/if_rl.py --workdir=runs/if_rl --config.init_from=CKPT

GRPO follows Nemotron-Cascade 2 (arXiv 2603.19220). It differs from DeepSeekMath's:
  1. One update per batch, so it is on-policy.
  2. No KL to a reference, except in RLHF, with weight 0.03.
  3. The loss is averaged over all tokens of the batch, not first over each completion.
MOPD is the same stage with another advantage and one teacher per domain. docs/objectives.md has
the equation of each choice.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade import advantage
from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.report.metrics import MetricsWriter, Phases, progress
from nemocascade.rollout import rewards
from nemocascade.rollout.episode import Samples
from nemocascade.runtime import loading
from nemocascade.runtime.assembly import Assembly, check_lengths, judged
from nemocascade.runtime.hosts import refuse_several
from nemocascade.runtime.launch import launch
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.objective import (
  SLOTS,
  arrange,
  chosen,
  program,
  rows_program,
  settings,
  settings_of,
  taught,
  topk,
)
from nemocascade.runtime.stage import Outcome, Spent, check_start, own_tokenizer, start
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.teachers import Teachers
from nemocascade.runtime.teaching import (
  find,
  gather,
  score_rows,
  teacher_heads,
  teacher_likeliest,
  teacher_logprobs,
  teacher_states,
  uniform_share,
)
from nemocascade.runtime.workdir import check_owner, claim
from nemocascade.step import loss
from nemocascade.step.balance import RouterBalance
from nemocascade.step.rows import rows_needed
from nemocascade.step.update import SKIPPED
from nemocascade.types import Params
from nemocascade.verifiers import judge as judge_lib

Watch = Callable[[int, Params, Spent], bool]  # (steps done, parameters, cost) -> end the stage?


def check(c: ConfigDict) -> None:
  """Raises UserError if the stage cannot run. Nothing is compiled."""
  check_fields(c, "rl")
  functions = {name: fn for choices in SLOTS.values() for name, fn in choices.items()}
  for name, fields in c.options.items():
    if name not in functions:
      raise unknown("function in options", name, functions)
    for field in fields:
      if field not in (allowed := settings_of(functions[name])):
        raise unknown(f"setting in options.{name}", field, allowed)
    if name in loss.CORRECTIONS and (low := fields.get("low", 0)) > (high := fields.get("high", low)):
      raise UserError(f"options.{name}.low={low}: must be at most options.{name}.high={high}")
  for name in c.teachers:
    if name not in c.domains:
      raise unknown("domain in teachers", name, c.domains)
  if not sum(c.mixture.values()):
    raise UserError("mixture: all shares are 0, so there are no prompts; give one above 0")
  for name in c.mixture:
    if name not in c.domains:
      raise unknown("domain in mixture", name, c.domains)
    if taught(c) and name not in c.teachers:
      raise UserError(
        f"{' and '.join(taught(c))}: domain {name!r} of the mixture has no teacher; there are {sorted(c.teachers)}"
      )
  _check_packing(c)
  if c.advantage in advantage.GROUPED and c.rollout.completions < 2:
    raise UserError(
      f"rollout.completions=1 under advantage={c.advantage!r}: a group of one teaches nothing; give at least 2"
    )
  if c.reward == "pairwise" and c.dynamic_filtering:
    raise UserError(
      "dynamic_filtering=True under reward='pairwise': it reads verdicts, which pairs have none of; give False"
    )
  if RouterBalance(**c.router_balance).has_loss and c.packing.shared_prompts:
    raise UserError(
      f"packing.shared_prompts with router_balance.weight={c.router_balance.weight}: the loss is of whole"
      " documents; balance by the bias, or repeat the prompts"
    )
  if c.rollout.top_p < 1 and c.correction == "none":
    raise UserError(
      f"rollout.top_p={c.rollout.top_p} with correction='none': tokens of the nucleus would weigh up to"
      f" 1 / {c.rollout.top_p} times too much; give correction tis, icepop or sequence_mask, or top_p=1"
    )
  if c.advantage == "none" and not (c.distillation_weight or c.kl_weight or c.entropy_weight):
    raise UserError("advantage='none' with no other term in the loss teaches nothing: give distillation_weight")
  if c.distillation_weight and c.distillation in loss.TOPK and (k := topk(c)) > c.model.vocab_size:
    raise UserError(f"options.{c.distillation}.k={k}: must be at most model.vocab_size={c.model.vocab_size}")


def _check_packing(c: ConfigDict) -> None:
  r, p = c.rollout, c.packing
  check_lengths("rollout", r.prompt_tokens, r.total_tokens)
  samples = r.prompts * r.completions
  if p.shared_prompts:
    if p.rows != samples or r.completions % p.pieces:
      raise UserError(
        f"packing.rows={p.rows}: with shared_prompts it must be rollout.prompts x rollout.completions={samples},"
        f" and packing.pieces={p.pieces} must divide the {r.completions} completions"
      )
    if p.row_tokens < r.total_tokens - r.prompt_tokens:
      raise UserError(
        f"packing.row_tokens={p.row_tokens}: with shared_prompts it must hold what follows a prompt,"
        f" rollout.total_tokens - rollout.prompt_tokens={r.total_tokens - r.prompt_tokens}"
      )
    return
  if p.row_tokens < r.total_tokens:
    raise UserError(f"packing.row_tokens={p.row_tokens}: must be at least rollout.total_tokens={r.total_tokens}")
  needed = rows_needed(samples, r.total_tokens, p.row_tokens)
  if p.rows < needed or p.rows % p.pieces:
    raise UserError(
      f"packing.rows={p.rows}: must be a multiple of packing.pieces={p.pieces} and at least {needed},"
      f" to hold {samples} completions of {r.total_tokens} tokens in rows of {p.row_tokens}"
    )


def pairwise_rewards(a: Assembly, samples: Samples) -> np.ndarray:
  """fp32 rewards_QG: the judge compares the answers of each group in pairs, with length control.

  See Nemotron-Cascade 2 (arXiv 2603.19220, section 4.5) and NeMo-Gym's `genrm_compare`.
  """
  count = lambda text: len(a.tokenizer.encode(text or ""))  # noqa: E731
  return judge_lib.batch_rewards(
    a.judge,
    [prompt_messages(row) for row in samples.rows],
    samples.completions,
    think_tokens_QG=[[count(c.reasoning) for c in group] for group in samples.completions],
    answer_tokens_QG=[[count(c.content) for c in group] for group in samples.completions],
  )


def run(
  c: ConfigDict, stage_dir: Path, a: Assembly, init_from: str = "", teachers: Teachers | None = None,
  watch: Watch = lambda *_: False,
) -> Outcome:  # fmt: skip
  """Trains to step c.steps, or until `watch`, called after every step, returns True.

  Args:
    init_from: the checkpoint to start from; the KL reference too.
    teachers: needed if the advantage or the distillation loss reads teachers.

  Raises:
    StageStopped: a guard ended the stage, or too many updates in a row were not finite.
  """
  refuse_several("RL")
  began = time.time()
  rows_fn = rows_program(settings(c, "advantage", "aggregation"))
  tx, (_, step_fn, proximal_fn) = program(c, a)
  state, record, store = start(a, stage_dir, tx, init_from)
  first, key = int(state.step) // c.updates, jax.random.fold_in(jax.random.key(a.c.seed), _number(stage_dir.name))
  spent = Spent(**record.get("spent", {}))
  by_states = c.distillation_weight and c.distillation not in loss.TOPK
  heads = teacher_heads(a, teachers) if by_states else None
  if c.kl_weight:
    reference = loading.load(init_from, a.template)
  r = c.rollout
  # Sampler, trainer, teachers and reference all use softmax(logits / temperature).
  temperature = np.float32(r.temperature)
  mixture = Mixture(
    a.domains, c.mixture.to_dict(), seed=a.c.seed, tokenizer=a.tokenizer, limit=r.prompt_tokens,
    state=record.get("mixture", {}),
  )  # fmt: skip
  # few_signals watches the share of groups whose verdicts differ. Others lack a signal only if verdicts are
  # compared within groups.
  compares = c.advantage in advantage.GROUPED and c.reward == "verdict"
  without = () if compares else ("few_signals",)
  supervisor = Supervisor(c, stage_dir, record.get("supervisor", {}), without=without)
  # If the stage was killed after its last step, `watch` ends it here.
  ended, step = first > 0 and watch(first, state.params, spent), first - 1

  with MetricsWriter(stage_dir, start_step=first) as writer:
    bar = progress(c.steps, initial=first, desc=stage_dir.name)
    for step in range(first, first if ended else c.steps):
      phases, rounds, too_long = Phases(), [], 0
      for round_ in range(c.refill_rounds):
        rows, given, left_out = mixture.draw(r.prompts)
        too_long += left_out
        samples = a.collect(
          state.params, jax.random.fold_in(key, step * 100 + round_), rows, prompts=given,
          prompt_tokens=r.prompt_tokens, total_tokens=r.total_tokens,
          completions=r.completions, temperature=temperature, top_p=r.top_p,
          completion_tokens=c.packing.row_tokens if c.packing.shared_prompts else None,
        )  # fmt: skip
        phases.end("rollout")
        verdicts = rewards.judge(samples, a.domains)
        phases.end("verdict")
        rounds.append((samples, verdicts))
        spent = spent.plus_rollout(samples)
        if not c.dynamic_filtering or sum(map(len, rewards.informative([v for _, v in rounds]))) >= r.prompts:
          break
      samples, verdicts = rewards.refill(rounds, r.prompts) if c.dynamic_filtering else rounds[0]
      rewards_QG = pairwise_rewards(a, samples) if c.reward == "pairwise" else None
      rollout, counts = rewards.to_rollout(samples, verdicts, overlong=chosen(c, "overlong"), rewards_QG=rewards_QG)
      if c.dynamic_filtering:
        rollout = rewards.dynamic_filter(rollout, verdicts)
      phases.end("verdict")
      if c.advantage in advantage.TAUGHT:
        rollout = rollout.replace(teacher_logprobs_QGT=teacher_logprobs(a, teachers, samples, temperature))
      if by_states:
        rollout = rollout.replace(**teacher_states(a, teachers, samples))
      elif c.distillation_weight:
        rollout = rollout.replace(**teacher_likeliest(a, teachers, samples, topk(c), temperature))
      if c.kl_weight:
        everyone = list(range(len(samples.rows)))
        said_QGT = score_rows(a, reference, samples, everyone, temperature)
        rollout = rollout.replace(reference_logprobs_QGT=said_QGT)
      if taught(c):
        counts |= uniform_share(rollout, samples.domains, a.model_config.vocab_size, heads)
      phases.end("score")
      rows, count, of_rollout = rows_fn(rollout)
      packed, prompts = arrange(c, rows)
      trained = int((packed["segment_ids"] > 0).sum() + (prompts.length_Q.sum() if prompts else 0)) * c.updates
      phases.end("advantage")
      if learns := bool(packed["mask"].any()):
        packed, prompts, count = a.put((packed, prompts, count))
        if c.updates > 1:
          packed["proximal"] = proximal_fn(state.params, packed, prompts, temperature)
        skipped = []
        for _ in range(c.updates):
          state, of_step = step_fn(state, packed, count, heads, prompts, temperature)
          skipped.append(of_step[SKIPPED])
        skipped = jax.device_get(skipped)
        of_step[SKIPPED] = sum(skipped)
      else:  # Every sample was filtered out: no update, because momentum alone would move the parameters.
        state, of_step, skipped = state.replace(step=state.step + c.updates), {}, []
      metrics = {k: float(v) for k, v in jax.device_get(of_step | of_rollout).items()} | counts
      phases.end("update")
      metrics |= {f"time/{phase}": seconds for phase, seconds in phases.seconds.items()}
      spent = spent.plus(
        scored=int((samples.segment_ids_QGT > 0).sum()) * (len(taught(c)) + (c.kl_weight != 0)),
        trained=trained,
      )
      metrics |= {"rollout/rounds": len(rounds), "rollout/skipped": not learns, "rollout/too_long_prompts": too_long}
      due = (step + 1) % c.save_every == 0
      supervisor.write(writer, step, metrics, skipped=skipped, to_save=state if due else None)
      ended = watch(step + 1, state.params, spent) or step + 1 == c.steps
      if step % c.samples_every == 0 or ended:
        writer.write_samples(step, sample_lines(samples, verdicts, rollout, c.samples))
      bar.update(1, reward=metrics["reward/mean"], tokens=spent.sampled)
      if due or ended or supervisor.stopping:
        parts = {"mixture": mixture.get_state(), "spent": dataclasses.asdict(spent), "supervisor": supervisor.record()}
        store.save(step + 1, state, parts)
        supervisor.end(store.path_of(step + 1))
      if ended:
        break
    bar.close()
  store.wait()
  return Outcome(state.params, str(store.path_of(step + 1)), step + 1, spent.sampled, time.time() - began)


def sample_lines(samples: Samples, verdicts, rollout, count: int) -> list[dict]:
  """Lines of samples.jsonl: the first completion of up to `count` prompts, spread over the batch."""
  lines = []
  for q in np.linspace(0, len(samples.rows) - 1, min(count, len(samples.rows))).astype(int):
    verdict = verdicts[q][0]
    lines.append(
      {
        "domain": samples.domains[q],
        "prompt": prompt_messages(samples.rows[q])[-1]["content"],
        "completion": samples.completions[q][0].text,
        "reward": float(rollout.rewards_QG[q][0]),
        "verdict": verdict.reward,
        "reason": verdict.reason,
        "masked": verdict.masked,
      }
    )
  return lines


def _number(name: str) -> int:
  """A number from a stage's name, to give each stage its own random numbers."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def main(c: ConfigDict, workdir: Path) -> None:
  check(c)
  refuse_several("RL")
  if c.init_from in ("", "previous"):
    raise UserError(
      f"init_from={c.init_from!r}: names no checkpoint; give --config.init_from=CKPT (a checkpoint directory)"
    )
  if (why := judged(c)) and not c.judge:
    raise UserError(f"judge='' under {why}: give --config.judge=CKPT, a checkpoint of experiments.reward_model")
  check_owner(c, workdir)
  teachers = find(c)
  a = Assembly(c, workdir, own_tokenizer(c, workdir / "rl", c.init_from))
  check_start(a, "init_from", c.init_from)
  for domain, name in c.teachers.items():
    check_start(a, f"teachers.{domain}", name)
  program(c, a)
  if c.judge:
    check_start(a, "judge", c.judge, a.reward_template)
    a.use_judge_from(c.judge)
  teachers = gather(a, teachers, c.teachers_in_memory)
  claim(c, workdir, a)
  run(c, workdir / "rl", a, c.init_from, teachers)


if __name__ == "__main__":
  launch(main)
