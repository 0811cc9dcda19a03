"""Trains the Bradley-Terry reward model that judges the preference domain, on generated pairs or those of files.

  python -m experiments.reward_model --config=configs/tiny/reward_model.py --workdir=runs/judge

If `init_from` names a checkpoint of the language model, training starts from its blocks.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.field_check import check as check_fields
from nemocascade.model.reward import init_reward_params
from nemocascade.report.metrics import Phases, progress
from nemocascade.runtime import finished, loading, parts
from nemocascade.runtime.launch import launch
from nemocascade.runtime.meter import BETWEEN, Meter
from nemocascade.runtime.outcome import Outcome, Spent, announce
from nemocascade.runtime.pairs import open_pairs
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import abstract_state, check_start, jit_step, start
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.text import answer_rows, own_tokenizer
from nemocascade.runtime.watching import FLAGS, Watching
from nemocascade.runtime.workdir import check_owner, claim
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.reward_model import reward_model_step
from nemocascade.step.update import SKIPPED
from nemocascade.types import Params


def check(c: ConfigDict) -> None:
  """Raises UserError if the stage cannot run. Nothing is compiled."""
  check_fields(c, "reward_model")
  if c.heldout_pairs < c.pairs:
    raise UserError(f"heldout_pairs={c.heldout_pairs}: must be at least pairs={c.pairs}, which are scored together")


def run(c: ConfigDict, stage_dir: Path, p: Parts, init_from: str = "") -> Outcome:
  """Trains to step c.steps. The last line of metrics.jsonl has the accuracy on held-out pairs."""
  began = time.time()
  programs = p.programs

  def rows(pairs):
    prompts, chosen, rejected = zip(*pairs, strict=True)
    sides = (answer_rows(p.text.tokenizer, prompts, side, len(pairs), c.row_tokens) for side in (chosen, rejected))
    return tuple(programs.put(side) for side in sides)

  tx, state, step_fn = program(c, programs)
  state, record, store = start(
    c,
    stage_dir,
    p,
    tx,
    init_from,
    lambda key: init_reward_params(programs.config, key),
    programs.reward_template,
    on_top_of,
  )
  first, supervisor = int(state.step), Supervisor(c, stage_dir, record.get("supervisor", {}))
  meter, tokens = Meter(programs.config, record.get("meter", {})), 2 * c.pairs * c.row_tokens
  pairs = open_pairs(c.seed, c.pairs, **c.source)
  # Compiled before training, so that a failure to compile does not lose a trained stage.
  judge = programs.reward.lower(state.params, *rows(pairs.train(0, c.pairs))[0]).compile()

  with store, p.watching.writer(stage_dir, first, c) as writer:
    bar, phases = progress(c.steps, initial=first, desc=stage_dir.name), Phases()
    for step in p.watching.steps(range(first, c.steps), stage_dir):
      store.check()
      state, metrics = step_fn(state, *rows(pairs.train(step * c.pairs, c.pairs)))
      metrics = jax.device_get(metrics)
      phases.end("update")
      times, _ = meter.step(phases, Spent(trained=tokens), counts=not metrics[SKIPPED])
      if step + 1 == c.steps:
        metrics["heldout/accuracy"] = accuracy(judge, state.params, rows, pairs.heldout(c.heldout_pairs), c.pairs)
      bar.update(1, loss=float(metrics["loss/reward_model"]))
      due = (step + 1) % c.save_every == 0 or step + 1 == c.steps
      supervisor.write(writer, step, metrics | times, to_save=state if due else None)
      if due or supervisor.stopping:
        store.start_save(step + 1, state, {"supervisor": supervisor.record(), "meter": meter.record()})
        supervisor.end(store, step + 1)
      phases.end(BETWEEN)
    bar.close()
  supervisor.finish()
  return Outcome(state.params, str(store.path_of(c.steps)), c.steps, c.steps * tokens, time.time() - began)


def check_pairs(c: ConfigDict) -> None:
  """Raises UserError if files of `source` are missing or malformed, or have too few pairs."""
  open_pairs(c.seed, c.pairs, **c.source)


def program(c: ConfigDict, programs: Programs):
  """(optimizer, abstract state, jitted step) of the stage."""
  tx = make_optimizer(total_steps=c.steps, **c.optimizer)
  state = abstract_state(tx, programs.reward_template, programs.mesh)
  return tx, state, jit_step(reward_model_step(programs.reward_fn, tx), state, programs.mesh)


def on_top_of(checkpoint: str, template: Params) -> Params:
  """Reward model parameters: the checkpoint's language model, and a head of zeros."""
  head = template["reward_head"]
  zeros = jax.jit(lambda: jnp.zeros(head.shape, head.dtype), out_shardings=head.sharding)
  return {"backbone": loading.load(checkpoint, template["backbone"]), "reward_head": zeros()}


def accuracy(reward, params, rows, pairs, batch: int) -> float:
  """Share of pairs whose chosen answer has the higher reward. An incomplete last batch is left out."""
  right = []
  for i in range(0, len(pairs) - batch + 1, batch):
    chosen, rejected = rows(pairs[i : i + batch])
    right.append(np.asarray(reward(params, *chosen)) > np.asarray(reward(params, *rejected)))
  return float(np.mean(np.concatenate(right)))


def main(c: ConfigDict, workdir: Path, wandb: str = "", trace: str = "") -> None:
  check(c)
  watching = Watching.of(wandb, trace)
  check_owner(c, workdir)
  if finished.stage(c, workdir / "reward_model"):
    return
  p = parts.build(c, workdir, own_tokenizer(c, workdir / "reward_model", c.init_from), domains=())
  check_start("init_from", c.init_from, p.text.tokenizer, p.programs.template)
  program(c, p.programs)
  check_pairs(c)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text), watching=watching)
  announce(run(c, workdir / "reward_model", p, c.init_from))


if __name__ == "__main__":
  launch(main, several=True, buckets=True, **FLAGS)
