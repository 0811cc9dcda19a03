"""Supervised fine-tuning on packed conversations: those of files, or of the domains' generators.

  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/sft
  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/mine
    "--config.sources={'mine': {'path': 'chats/*.jsonl'}}"

Conversations are read, tokenized and packed as they are needed. Generated ones are written once, in the work
directory. Run the same command again to resume.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.data import loader
from nemocascade.field_check import check as check_fields
from nemocascade.mesh import check_rows, own_rows
from nemocascade.report.metrics import MetricsWriter, progress
from nemocascade.runtime import conversations, hosts, parts
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Outcome, announce
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import abstract_state, check_start, jit_step, start
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.text import own_tokenizer
from nemocascade.runtime.workdir import check_owner, claim
from nemocascade.step.balance import RouterBalance
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.sft import sft_step


def check(c: ConfigDict) -> None:
  """Raises UserError if the stage cannot run. Nothing is compiled."""
  check_fields(c, "sft")
  RouterBalance(**c.router_balance)
  conversations.check(c)
  loader.check(T=c.row_tokens, B=c.rows, look_ahead=c.look_ahead, streams=c.streams)


def check_documents(c: ConfigDict, p: Parts) -> None:
  """Raises UserError if a source has no conversation among its first that can be trained on."""
  conversations.check_first(c, p.text.tokenizer)


def batches(c: ConfigDict, stage_dir: Path, p: Parts) -> loader.Loader:
  """The batches of the stage from its beginning. Bad conversations are named in bad_rows.jsonl."""
  blend = conversations.open_blend(c, stage_dir.parent / "data", stage_dir.name)
  if jax.process_index() == 0:
    print(f"{stage_dir.name}: {conversations.described(blend)}", file=sys.stderr)
  return loader.Loader(
    blend, p.text.tokenizer, T=c.row_tokens, B=c.rows, seed=c.seed, look_ahead=c.look_ahead, streams=c.streams,
    long_documents=c.long_documents, max_bad_share=c.max_bad_share, workers=c.data_workers,
    own=own_rows(p.programs.mesh, c.rows), on_bad=conversations.BadRows(stage_dir),
    gather=functools.partial(hosts.exchange, what="positions in the data"),
  )  # fmt: skip


def program(c: ConfigDict, programs: Programs):
  """(optimizer, abstract state, jitted step). Raises UserError if rows do not divide over the mesh."""
  check_rows("rows of a step", c.rows, programs.mesh)
  tx = make_optimizer(total_steps=c.steps, **c.optimizer)
  state = abstract_state(tx, programs.template, programs.mesh)
  balance = RouterBalance(**c.router_balance)
  step = sft_step(programs.score_fn_under(balance), tx, balance=balance, add_to_bias=programs.add_to_bias)
  return tx, state, jit_step(step, state, programs.mesh)


def run(c: ConfigDict, stage_dir: Path, p: Parts, init_from: str = "") -> Outcome:
  """Trains to step c.steps, from the stage's last checkpoint if there is one, else from `init_from`.

  Raises:
    StageStopped: a guard ended the stage, or too many updates in a row were not finite.
  """
  began = time.time()
  tx, _, step_fn = program(c, p.programs)
  state, record, store = start(c, stage_dir, p, tx, init_from)
  first, tokens = int(state.step), record.get("tokens", 0)
  supervisor = Supervisor(c, stage_dir, record.get("supervisor", {}))
  with batches(c, stage_dir, p) as data, MetricsWriter(stage_dir, start_step=first) as writer:
    if record.get("iterator"):
      data.set_state(record["iterator"])
    bar = progress(c.steps, initial=first, desc=stage_dir.name)

    def finish(step: int, metrics, to_save=None) -> None:
      """Waits for the step, and writes its metrics."""
      metrics = jax.device_get(metrics)
      bar.update(1, loss=float(metrics["loss/sft"]), tokens=tokens + own)
      supervisor.write(writer, step, metrics, to_save=to_save)

    pending, own = None, 0  # own: tokens of this host's rows since `tokens` was counted.
    for step in range(first, c.steps):
      batch = next(data)
      if step == 0:
        writer.write_samples(step, conversations.sample_lines(batch, data.own, p.text.tokenizer))
      state, metrics = step_fn(state, p.programs.put(batch))  # Asynchronous: does not wait for the step.
      metrics |= conversations.metrics(data.counts, batch.segment_ids_BT[data.own])
      own += int((batch.segment_ids_BT[data.own] > 0).sum())
      if pending is not None:
        finish(step - 1, pending)
      pending = metrics
      if (step + 1) % c.save_every == 0 or step + 1 == c.steps or supervisor.stopping:
        finish(step, pending, to_save=state)
        pending = None
        tokens, own = tokens + sum(hosts.exchange(own, "tokens")), 0
        parts = {"iterator": data.get_state(), "tokens": tokens, "supervisor": supervisor.record()}
        store.save(step + 1, state, parts)
        supervisor.end(store.path_of(step + 1))
    bar.close()
  store.wait()
  return Outcome(state.params, str(store.path_of(c.steps)), c.steps, tokens, time.time() - began)


def main(c: ConfigDict, workdir: Path) -> None:
  check(c)
  check_owner(c, workdir)
  p = parts.build(c, workdir, own_tokenizer(c, workdir / "sft", c.init_from), domains=())
  check_start("init_from", c.init_from, p.text.tokenizer, p.programs.template)
  program(c, p.programs)
  check_documents(c, p)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text))
  announce(run(c, workdir / "sft", p, c.init_from))


if __name__ == "__main__":
  launch(main, several=True)
