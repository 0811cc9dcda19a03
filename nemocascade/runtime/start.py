"""How a training stage starts: its state, anew, from a checkpoint, or resumed with its record."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.errors import UserError
from nemocascade.mesh import alike, placed, whole
from nemocascade.runtime import loading, meter, origin, parts
from nemocascade.runtime.hosts import exchange, first_alone
from nemocascade.runtime.outcome import Spent
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.text import Text
from nemocascade.state_files import check_shape, write_json
from nemocascade.step.optimizer import new_state, with_schedule_of
from nemocascade.store import checksums
from nemocascade.store.checkpoint import Store
from nemocascade.types import Params, TrainState


def abstract_state(tx: optax.GradientTransformation, template: Params, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of a stage's state. Adam's moments are sharded as their parameters."""
  shapes = jax.eval_shape(functools.partial(new_state, tx), template)
  return placed(shapes, alike(shapes, template, mesh))


def jit_step(step: Callable, state: TrainState, mesh: Mesh, **how: Any) -> Callable:
  """The jitted step. It donates its state and keeps the state's shardings; metrics are replicated.

  Args:
    state: the result of abstract_state.
    how: more arguments of jax.jit.
  """
  places = jax.tree.map(lambda a: a.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, whole(mesh)), **how)


COUNT = {"type": "integer", "minimum": 0}
COUNTS = {"type": "object", "additionalProperties": COUNT}
RECORD = {  # JSON schema of the record that a stage saves with its state.
  "type": "object",
  "properties": {
    "iterator": {"type": "object"},
    "tokens": COUNT,
    "lineage": origin.SHAPE,
    "mixture": {  # Mixture.get_state.
      "type": "object",
      "properties": {
        "frontier": COUNTS,
        "given": COUNTS,
        "rows": {"type": "object", "additionalProperties": {"type": "string"}},
      },
      "additionalProperties": False,
    },
    "supervisor": {
      "type": "object",
      "properties": {
        "histories": {"type": "object"},
        "warned": {"type": "array", "items": {"type": "string"}},
        "nonfinite": COUNT,
        "applied": COUNT,
        "steps": COUNTS,
      },
    },
    "meter": meter.RECORD,
    "spent": {
      "type": "object",
      "properties": {field.name: COUNT for field in dataclasses.fields(Spent)},
      "additionalProperties": False,
    },
  },
}


def check_start(field: str, checkpoint: str, tokenizer: Tokenizer | None, template: Params) -> None:
  """Checks that a stage can use a checkpoint, without reading its weights. "" passes.

  Args:
    field: the config field or flag that names it, for errors.
    tokenizer: the run's, which the checkpoint must share.
    template: the shapes that its parameters must have.

  Raises:
    UserError: it does not exist, or has another model or tokenizer.
  """
  if not checkpoint:
    return
  found = loading.find(checkpoint, field)
  loading.same_tokenizer(field, checkpoint, tokenizer)
  found.check(template)


def save_model_files(c: ConfigDict, stage_dir: Path, tokenizer: Tokenizer) -> None:
  """Writes the model's config and tokenizer, so that the stage's checkpoints can be used on their own."""

  def write():
    write_json(stage_dir / "model" / "config.json", c.model.to_dict())
    tokenizer.save(stage_dir / "model")
    checksums.write(stage_dir / "model")

  first_alone(write, "files of the model")


def start(
  c: ConfigDict, stage_dir: Path, parts: Parts, tx: optax.GradientTransformation, init_from: str, init_params=None,
  template=None, load=loading.load, teachers: Mapping[str, str] | None = None,
) -> tuple[TrainState, dict, Store]:  # fmt: skip
  """(state to train from, record, checkpoint store). The state is the first of these that exists:

  1. This stage's last checkpoint. Only then the record, with the data position, is not empty.
  2. The parameters of `init_from` (a checkpoint of ours, or hf:DIR) with a new optimizer state.
  3. Freshly initialized parameters.

  Args:
    init_params, template: used instead of those of `parts.programs`, for another model.
    load: (checkpoint, template) -> its parameters.
    teachers: domain -> checkpoint of its teacher.

  Raises:
    UserError: the checkpoint cannot be read, has another tokenizer, or a value is not finite; or the stage began with
      other teachers.
  """
  programs, tokenizer = parts.programs, parts.text.tokenizer
  init_params, template = init_params or programs.fresh_params, template or programs.template
  state = abstract_state(tx, template, programs.mesh)
  # Each device computes only its own shards.
  make = functools.partial(jax.jit, out_shardings=jax.tree.map(lambda s: s.sharding, state))
  made_from = origin.stamp(c, stage_dir, init_from, teachers or {})
  store = Store(stage_dir / "checkpoints", stamp={"lineage": made_from})
  newest = exchange(store.latest(), "the newest checkpoint")[0]
  if newest is not None:
    latest = store.path_of(newest)
    remedy = f"restore {stage_dir.parent / 'tokenizer'}, or choose another --workdir"
    loading.same_tokenizer("--workdir", str(latest), tokenizer, remedy)
    state, record = store.restore(state, exchange=exchange)
    check_shape(record, RECORD, f"{latest}/record", remedy="restore another checkpoint")
    if jax.process_index() == 0:
      done = store.latest()  # Without those that were damaged.
      print(f"{stage_dir.name}: goes on after {done} steps, from {store.path_of(done)}", file=sys.stderr)
    origin.check_same_teachers(record.get("lineage", {}), made_from)
    state = with_schedule_of(tx, state)  # The stage may have been given more steps.
    return loading.finite(state, f"{store.directory}, after {int(state.step)} updates"), record, store
  if init_from:
    loading.same_tokenizer("init_from", init_from, tokenizer)
  save_model_files(c, stage_dir, tokenizer)
  under_new_optimizer = functools.partial(new_state, tx)
  if init_from:
    make = functools.partial(make, donate_argnums=0)  # Avoids a second copy of the parameters.
    return make(under_new_optimizer)(load(init_from, template)), {}, store
  key = jax.random.key(c.seed)
  state = make(lambda key: under_new_optimizer(init_params(key)))(key)
  return loading.finite(state, "fresh parameters"), {}, store


def trained_parts(c: ConfigDict, checkpoint: str, judge: str, mesh: Mesh) -> tuple[Parts, Params]:
  """The parts of a run that scores a checkpoint on the config's domains, and the checkpoint's parameters.

  Args:
    judge: a checkpoint of a reward model; "" for none.

  Raises:
    UserError: the checkpoint has no tokenizer, or it and the judge or the domains do not fit together.
  """
  domains = parts.build_domains(c)
  programs, tokenizer, params = parts.from_checkpoint(checkpoint, mesh)
  if tokenizer is None:
    raise UserError(f"--checkpoint={checkpoint}: has no tokenizer (tokenizer.json or tokenizer.model)")
  found = Parts(programs, Text(tokenizer), domains)
  if judge:
    check_start("--judge", judge, tokenizer, programs.reward_template)
    found = parts.with_judge(c, found, judge)
  return found, params
