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
import functools
import time
import zlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime import finished, hosts, parts, signals, validation
from nemocascade.runtime.batches import Batches
from nemocascade.runtime.checks import check_rl as check
from nemocascade.runtime.checks import judged
from nemocascade.runtime.heldout import Heldout, draw_heldout
from nemocascade.runtime.launch import launch
from nemocascade.runtime.learner import arrange, learn
from nemocascade.runtime.logbook import Logbook, Watch
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.objective import program
from nemocascade.runtime.outcome import Outcome, Spent, announce
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.sampler import sample_lines
from nemocascade.runtime.signals import annotate
from nemocascade.runtime.start import check_start, start
from nemocascade.runtime.teachers import Teachers, find, gather
from nemocascade.runtime.text import own_tokenizer
from nemocascade.runtime.validation import Validation
from nemocascade.runtime.watching import FLAGS, Watching
from nemocascade.runtime.workdir import check_owner, claim


def run(
  c: ConfigDict, stage_dir: Path, p: Parts, init_from: str = "", teachers: Teachers | None = None,
  watch: Watch = lambda *_: False, title: str = "",
) -> Outcome:  # fmt: skip
  """Trains to step c.steps, or until `watch`, called after every step, returns True.

  Args:
    init_from: the checkpoint to start from; the KL reference too.
    teachers: needed if the advantage or the distillation loss reads teachers.
    title: shown at the progress bar; "" is the name of `stage_dir`.

  Raises:
    StageStopped: a guard ended the stage, or too many updates in a row were not finite.
  """
  began = time.time()
  tx, _ = program(c, p.programs)
  state, resumed, store = start(c, stage_dir, p, tx, init_from, teachers=teachers.by_domain() if teachers else None)
  first, key = int(state.step) // c.updates, jax.random.fold_in(jax.random.key(c.seed), _number(stage_dir.name))
  spent = Spent(**resumed.get("spent", {}))
  sources, wanted = signals.open_sources(c, p, teachers, init_from), signals.wanted(c)
  mixture = prompts(c, p, resumed.get("mixture", {}))
  book = Logbook(c, stage_dir, p, store, watch, first=first, record=resumed, title=title)
  # If the stage was killed after its last step, `watch` ends it here.
  ended, step = first > 0 and watch(first, state.params, spent), first - 1

  with book, Batches(c, p, mixture, key) as batches:
    for step in book.steps(first if ended else c.steps):
      hosts.spent()  # Leaves out what was exchanged before the step.
      sampled, cost = batches.take(state, step, book.phases)
      place = mixture.get_state()
      batches.begin(state, step + 1)
      rollout, masked = annotate(sampled, wanted, sources, book.phases)
      rows = arrange(rollout, sources)
      book.phases.end("advantage")
      state, metrics, skipped = learn(state, rows, sources)
      hosts.decided([rows.empty, *map(float, skipped)], "skipped updates")
      book.phases.end("update")
      metrics |= masked | sampled.metrics | cost | hosts.spent() | {"rollout/skipped": rows.empty}
      scored = signals.scored_tokens(sampled.samples, wanted)
      spent = (spent + sampled.spent).plus(scored=scored, trained=rows.tokens * c.updates)
      lines = functools.partial(sample_lines, sampled, rollout, c.samples)
      if book.record(step, state, metrics, skipped, spent, lines, place):
        break
  return Outcome(state.params, str(store.path_of(step + 1)), step + 1, spent.sampled, time.time() - began)


def prompts(c: ConfigDict, p: Parts, state: dict) -> Mixture:
  """The source of the stage's prompts.

  Args:
    state: the result of Mixture.get_state to continue from, or empty.
  """
  return Mixture(
    p.domains, c.mixture.to_dict(), seed=c.seed, tokenizer=p.text.tokenizer, limit=c.rollout.prompt_tokens, state=state
  )


def _number(name: str) -> int:
  """A number from a stage's name, to give each stage its own random numbers."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def check_prompts(c: ConfigDict, p: Parts) -> None:
  """Raises UserError if a domain of the mixture has no prompt that fits."""
  prompts(c, p, {}).check()


def main(c: ConfigDict, workdir: Path, wandb: str = "", trace: str = "") -> None:
  check(c)
  watching = Watching.of(wandb, trace)
  if c.init_from in ("", "previous"):
    raise UserError(
      f"init_from={c.init_from!r}: names no checkpoint; give --config.init_from=CKPT (a checkpoint directory)"
    )
  if (why := judged(c, c)) and not c.judge:
    raise UserError(f"judge='' under {why}: give --config.judge=CKPT, a checkpoint of experiments.reward_model")
  check_owner(c, workdir)
  if finished.stage(c, workdir / "rl"):
    return
  teachers = find(c)
  asked = {name for name, share in c.mixture.items() if share} | set(c.teachers)
  p = parts.build(c, workdir, own_tokenizer(c, workdir / "rl", c.init_from), domains=asked)
  programs, tokenizer = p.programs, p.text.tokenizer
  check_start("init_from", c.init_from, tokenizer, programs.template)
  for domain, name in c.teachers.items():
    check_start(f"teachers.{domain}", name, tokenizer, programs.template)
  program(c, programs)
  check_prompts(c, p)
  if c.judge:
    check_start("judge", c.judge, tokenizer, programs.reward_template)
    p = parts.with_judge(c, p, c.judge)
  wanted = teachers or validation.settings(c).every  # Teachers are probed with held-out rows.
  heldout = draw_heldout(c, p.domains, tokenizer) if wanted else Heldout({}, c.evaluation, c.seed)
  teachers = gather(programs, tokenizer, teachers, c.teachers_in_memory, heldout.rows)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text), watching=watching)
  watch = Validation(c, workdir / "rl", p, heldout)
  announce(watch.handed_on(run(c, workdir / "rl", p, c.init_from, teachers, watch)))


if __name__ == "__main__":
  launch(main, several=True, buckets=True, **FLAGS)
