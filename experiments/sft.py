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
from nemocascade.errors import UserError
from nemocascade.field_check import check as check_fields
from nemocascade.mesh import own_rows, owners
from nemocascade.model.sequence_parallel import check_rows
from nemocascade.report.metrics import Phases, progress
from nemocascade.runtime import conversations, finished, hosts, parts, source_loss, validation
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.launch import launch
from nemocascade.runtime.logbook import Watch
from nemocascade.runtime.meter import BETWEEN, Meter
from nemocascade.runtime.outcome import Outcome, Spent, announce
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import abstract_state, check_start, jit_step, start
from nemocascade.runtime.supervision import Supervisor
from nemocascade.runtime.text import own_tokenizer
from nemocascade.runtime.validation import Validation
from nemocascade.runtime.watching import FLAGS, Watching
from nemocascade.runtime.workdir import check_owner, claim
from nemocascade.step.balance import RouterBalance
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.sft import sft_step
from nemocascade.step.update import SKIPPED


def check(c: ConfigDict) -> None:
  """Raises UserError if the stage cannot run. Nothing is compiled."""
  check_fields(c, "sft")
  RouterBalance(**c.router_balance)
  if c.rows % c.pieces:
    raise UserError(f"pieces={c.pieces} does not divide rows={c.rows}: give a divisor of {c.rows}")
  conversations.check(c)
  validation.check(c)
  loader.check(T=c.row_tokens, B=c.rows, look_ahead=c.look_ahead, streams=c.streams)


def check_documents(c: ConfigDict, p: Parts) -> None:
  """Raises UserError if a source has no conversation among its first that can be trained on."""
  conversations.check_first(c, p.text.tokenizer)
  source_loss.heldout(c, p.text.tokenizer)


def batches(c: ConfigDict, stage_dir: Path, p: Parts) -> loader.Loader:
  """The batches of the stage from its beginning. Bad conversations are named in bad_rows.jsonl."""
  blend = conversations.open_blend(c, stage_dir.parent, stage_dir.name)
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
  check_rows("rows / pieces", c.rows // c.pieces, programs.config, programs.mesh)
  tx = make_optimizer(total_steps=c.steps, **c.optimizer)
  state = abstract_state(tx, programs.template, programs.mesh)
  balance = RouterBalance(**c.router_balance)
  score_fn = programs.score_fn_under(balance)
  step = sft_step(score_fn, tx, accumulate=c.pieces, balance=balance, add_to_bias=programs.add_to_bias, z_loss=c.z_loss)
  return tx, state, jit_step(step, state, programs.mesh)


def run(c: ConfigDict, stage_dir: Path, p: Parts, init_from: str = "", watch: Watch = lambda *_: False) -> Outcome:
  """Trains to step c.steps, from the stage's last checkpoint if there is one, else from `init_from`.

  `watch` is called before every checkpoint; the stage ends where it returns True.

  Raises:
    StageStopped: a guard ended the stage, or too many updates in a row were not finite.
  """
  began = time.time()
  tx, _, step_fn = program(c, p.programs)
  state, record, store = start(c, stage_dir, p, tx, init_from)
  first, tokens = int(state.step), record.get("tokens", 0)
  # If the stage was killed after its last step, `watch` ends it here.
  ended, step = first > 0 and watch(first, state.params, Spent(trained=tokens)), first - 1
  supervisor = Supervisor(c, stage_dir, record.get("supervisor", {}))
  meter = Meter(p.programs.config, record.get("meter", {}))
  held = source_loss.heldout(c, p.text.tokenizer)
  mine = owners(p.programs.mesh, c.rows) == jax.process_index()  # Rows that several processes hold count once.
  with store, batches(c, stage_dir, p) as data, p.watching.writer(stage_dir, first, c) as writer:
    if record.get("iterator"):
      data.set_state(record["iterator"])
    # pending: the step that is dispatched, and not finished.
    bar, phases, pending = progress(c.steps, initial=first, desc=stage_dir.name), Phases(), None

    def finish(step: int, metrics, own: int, seconds, to_save=None) -> int:
      """Waits for the step, writes its metrics, and returns its tokens; `own` are those of this host."""
      metrics = jax.device_get(metrics)
      phases.end("update")
      phases.add(seconds)
      times, sums = meter.step(phases, Spent(), counts=not metrics[SKIPPED], mine={"trained": own})
      bar.update(1, loss=float(metrics["loss/sft"]), tokens=tokens + sums["trained"])
      losses = source_loss.losses(c, p.programs, to_save.params, held) if to_save else {}
      supervisor.write(writer, step, metrics | times | losses, to_save=to_save)
      phases.end(BETWEEN)
      return sums["trained"]

    for step in p.watching.steps(range(first, first if ended else c.steps), stage_dir):
      store.check()
      batch = next(data)
      phases.end("data")
      if step == 0:
        writer.write_samples(step, conversations.sample_lines(batch, data.own, p.text.tokenizer))
      state, metrics = step_fn(state, p.programs.put(batch))  # Asynchronous: does not wait for the step.
      metrics |= conversations.metrics(data, batch.segment_ids_BT[data.own])
      phases.end("update")  # On some devices the dispatch computes.
      dispatched = step, metrics, int((batch.segment_ids_BT[mine] > 0).sum()), phases.take()
      tokens, pending = tokens + (finish(*pending) if pending else 0), dispatched
      if (step + 1) % c.save_every == 0 or step + 1 == c.steps or supervisor.stopping:
        tokens, pending = tokens + finish(*pending, to_save=state), None
        ended = watch(step + 1, state.params, Spent(trained=tokens))
        writer.write_scores(step, validation.scores_at(c, stage_dir, step + 1))
        parts = dict(iterator=data.get_state(), tokens=tokens, supervisor=supervisor.record(), meter=meter.record())
        store.start_save(step + 1, state, parts)
        supervisor.end(store, step + 1)
        phases.end(BETWEEN)
        if ended:
          break
    bar.close()
  supervisor.finish()
  return Outcome(state.params, str(store.path_of(step + 1)), step + 1, tokens, time.time() - began)


def main(c: ConfigDict, workdir: Path, wandb: str = "", trace: str = "") -> None:
  check(c)
  watching = Watching.of(wandb, trace)
  check_owner(c, workdir)
  if finished.stage(c, workdir / "sft"):
    return
  scored = None if validation.settings(c).every else ()  # Domains that are built: all, or none.
  p = parts.build(c, workdir, own_tokenizer(c, workdir / "sft", c.init_from), domains=scored)
  check_start("init_from", c.init_from, p.text.tokenizer, p.programs.template)
  program(c, p.programs)
  check_documents(c, p)
  heldout = draw_heldout(c, p.domains, p.text.tokenizer)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text), watching=watching)
  watch = Validation(c, workdir / "sft", p, heldout)
  announce(watch.handed_on(run(c, workdir / "sft", p, c.init_from, watch)))


if __name__ == "__main__":
  launch(main, several=True, buckets=True, **FLAGS)
