"""Supervised fine-tuning on packed demonstrations of all domains.

  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/sft

The dataset (TFDS, array_record) is written once, in the work directory. Run the same command again to resume.
"""

import dataclasses
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.data import loader, sources
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.generated.generator import demonstrations as made_by
from nemocascade.generated.registry import GENERATORS, make
from nemocascade.mesh import check_rows
from nemocascade.report.metrics import MetricsWriter, progress
from nemocascade.runtime import parts
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.launch import launch
from nemocascade.runtime.outcome import Outcome
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
  for name in c.conversations:
    if name not in GENERATORS:
      raise unknown("domain in conversations", name, GENERATORS)
  if not sum(c.conversations.values()):
    raise UserError("conversations: all are 0, so there is nothing to learn from; give one of at least 1")


def check_documents(c: ConfigDict, p: Parts) -> None:
  """Raises UserError if not even the shortest of the first demonstrations fits in a row."""
  lengths = {
    len(document.tokens_T)
    for name, count in c.conversations.items()
    for example in made_by(make(name, c.tasks), c.seed, 0, min(count, 8), non_thinking_share=c.non_thinking)
    for document in loader.to_documents(example, p.text.tokenizer)
  }  # fmt: skip
  if min(lengths) > c.row_tokens:
    raise UserError(
      f"row_tokens={c.row_tokens}: demonstrations have {min(lengths)} to {max(lengths)} tokens; give at least that"
    )


def demonstrations(c: ConfigDict, directory: Path):
  """The demonstrations of all domains as a data source. Written at the first call, then read."""

  def write():
    examples = (
      example
      for name, count in c.conversations.items()
      for example in made_by(make(name, c.tasks), c.seed, 0, count, non_thinking_share=c.non_thinking)
    )
    if not directory.exists():
      sources.write_demonstrations(examples, directory, name="demonstrations")

  first_alone(write)
  return sources.read_demonstrations(directory)


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
  source = demonstrations(c, stage_dir.parent / "data" / "demonstrations")
  documents = loader.tokenize_all(source, p.text.tokenizer)
  batches = loader.Loader(documents, T=c.row_tokens, B=c.rows, seed=c.seed)

  state, record, store = start(c, stage_dir, p, tx, init_from)
  first = int(state.step)
  if record.get("iterator"):
    batches.set_state(record["iterator"])

  supervisor = Supervisor(c, stage_dir, record.get("supervisor", {}))
  tokens = record.get("tokens", 0)
  with MetricsWriter(stage_dir, start_step=first) as writer:
    bar = progress(c.steps, initial=first, desc=stage_dir.name)

    def finish(step: int, metrics, to_save=None) -> None:
      """Waits for the step, and writes its metrics."""
      metrics = jax.device_get(metrics)
      bar.update(1, loss=float(metrics["loss/sft"]), tokens=tokens)
      supervisor.write(writer, step, metrics, to_save=to_save)

    pending = None
    for step in range(first, c.steps):
      batch = next(batches)
      state, metrics = step_fn(state, p.programs.put(batch))  # Asynchronous: does not wait for the step.
      tokens += int((batch.segment_ids_BT > 0).sum())
      if pending is not None:
        finish(step - 1, pending)
      pending = metrics
      if (step + 1) % c.save_every == 0 or step + 1 == c.steps or supervisor.stopping:
        finish(step, pending, to_save=state)
        pending = None
        parts = {"iterator": batches.get_state(), "tokens": tokens, "supervisor": supervisor.record()}
        store.save(step + 1, state, parts)
        supervisor.end(store.path_of(step + 1))
    bar.close()
  store.wait()
  return Outcome(state.params, str(store.path_of(c.steps)), c.steps, tokens, time.time() - began)


def main(c: ConfigDict, workdir: Path) -> None:
  check(c)
  check_owner(c, workdir)
  p = parts.build(c, workdir, own_tokenizer(c, workdir / "sft", c.init_from))
  check_start("init_from", c.init_from, p.text.tokenizer, p.programs.template)
  program(c, p.programs)
  check_documents(c, p)
  p = dataclasses.replace(p, text=claim(c, workdir, p.text))
  run(c, workdir / "sft", p, c.init_from)


if __name__ == "__main__":
  launch(main, several=True)
