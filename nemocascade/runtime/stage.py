"""What all training stages share: the start, the state, the resumption record and the outcome."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.mesh import alike, placed, whole
from nemocascade.rollout.episode import Samples
from nemocascade.runtime import loading
from nemocascade.runtime.assembly import Assembly
from nemocascade.state_files import check_shape
from nemocascade.step.optimizer import new_state
from nemocascade.store.checkpoint import Store
from nemocascade.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Spent:
  """Tokens that an RL stage has processed so far, by the kind of processing."""

  sampled: int = 0  # Decoded one at a time.
  prefilled: int = 0  # Prompts, once each.
  scored: int = 0  # By a teacher or a reference.
  trained: int = 0  # Forward and backward. Samples with no token to learn are not in a row.

  def plus(self, **more: int) -> "Spent":
    return dataclasses.replace(self, **{name: getattr(self, name) + n for name, n in more.items()})

  def plus_rollout(self, samples: Samples) -> "Spent":
    given_QG = ((samples.segment_ids_QGT > 0) & ~samples.loss_mask_QGT).sum(-1)
    return self.plus(sampled=int(samples.loss_mask_QGT.sum()), prefilled=int(given_QG[:, 0].sum()))

  def flops(self, matmul_params: int) -> int:
    """FLOPs: 2 per parameter and token forward, 6 with the backward pass.

    Products of the attention and the scan themselves are left out; they are few at these lengths.

    Args:
      matmul_params: the result of model.size.matmul_params for the model.
    """
    return matmul_params * (2 * (self.sampled + self.prefilled + self.scored) + 6 * self.trained)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a finished stage."""

  params: Params
  checkpoint: str
  steps: int
  tokens: int  # Trained on or sampled, all steps.
  wall_s: float  # Seconds in this process. The caller adds those before a resumption.


def abstract_state(tx: optax.GradientTransformation, template: Params, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of a stage's state. Adam's moments are sharded as their parameters."""
  shapes = jax.eval_shape(functools.partial(new_state, tx), template)
  return placed(shapes, alike(shapes, template, mesh))


def jit_step(step: Callable, state: TrainState, mesh: Mesh) -> Callable:
  """The jitted step. It donates its state and keeps the state's shardings; metrics are replicated.

  Args:
    state: the result of abstract_state.
  """
  places = jax.tree.map(lambda a: a.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, whole(mesh)))


COUNT = {"type": "integer", "minimum": 0}
COUNTS = {"type": "object", "additionalProperties": COUNT}
RECORD = {  # JSON schema of the record that a stage saves with its state.
  "type": "object",
  "properties": {
    "iterator": {"type": "object"},
    "tokens": COUNT,
    "mixture": {"type": "object", "additionalProperties": COUNTS},  # Mixture.get_state.
    "supervisor": {
      "type": "object",
      "properties": {
        "histories": {"type": "object"},
        "warned": {"type": "array", "items": {"type": "string"}},
        "nonfinite": COUNT,
      },
    },
    "spent": {
      "type": "object",
      "properties": {field.name: COUNT for field in dataclasses.fields(Spent)},
      "additionalProperties": False,
    },
  },
}


def own_tokenizer(c: ConfigDict, stage_dir: Path, init_from: str) -> Tokenizer | None:
  """The tokenizer of a stage that runs outside a cascade: the config's, else that of `init_from`.

  None if there is neither: the assembly then trains one.

  Raises:
    UserError: the config's tokenizer differs from that of `init_from`.
  """
  if c.tokenizer.path:
    tokenizer = load_tokenizer(c.tokenizer.path)
    if init_from:
      loading.same_tokenizer("init_from", init_from, tokenizer)
    return tokenizer
  if not init_from:
    return None
  begun = stage_dir / "model"  # A resumed stage keeps its tokenizer, even if init_from has moved.
  return load_tokenizer(begun) if loading.has_tokenizer(begun) else loading.tokenizer_beside(init_from, "init_from")


def check_start(a: Assembly, field: str, checkpoint: str, template: Params | None = None) -> None:
  """Checks that a stage can use a checkpoint, without reading its weights. "" passes.

  Args:
    field: the config field or flag that names it, for errors.
    template: the shapes that its parameters must have; by default those of the assembly's model.

  Raises:
    UserError: it does not exist, or has another model or tokenizer.
  """
  if not checkpoint:
    return
  found = loading.find(checkpoint, field)
  loading.same_tokenizer(field, checkpoint, a.tokenizer)
  found.check(template or a.template)


def start(
  a: Assembly, stage_dir: Path, tx: optax.GradientTransformation, init_from: str, init_params=None, template=None,
  load=loading.load,
) -> tuple[TrainState, dict, Store]:  # fmt: skip
  """(state to train from, record, checkpoint store). The state is the first of these that exists:

  1. This stage's last checkpoint. Only then the record, with the data position, is not empty.
  2. The parameters of `init_from` (a checkpoint of ours, or hf:DIR) with a new optimizer state.
  3. Freshly initialized parameters.

  Args:
    init_params, template: used instead of the assembly's, for another model.
    load: (checkpoint, template) -> its parameters.

  Raises:
    UserError: the checkpoint cannot be read, has another tokenizer, or a value is not finite.
  """
  init_params, template = init_params or a.fresh_params, template or a.template
  state = abstract_state(tx, template, a.mesh)
  # Each device computes only its own shards.
  make = functools.partial(jax.jit, out_shardings=jax.tree.map(lambda s: s.sharding, state))
  store = Store(stage_dir / "checkpoints")
  if store.latest() is not None:
    latest = store.path_of(store.latest())
    remedy = f"restore {a.workdir / 'tokenizer'}, or choose another --workdir"
    loading.same_tokenizer("--workdir", str(latest), a.tokenizer, remedy)
    state, record = store.restore(state)
    check_shape(record, RECORD, f"{latest}/record", remedy="restore another checkpoint")
    return loading.finite(state, f"{store.directory}, after {int(state.step)} updates"), record, store
  if init_from:
    loading.same_tokenizer("init_from", init_from, a.tokenizer)
  a.save_model_files(stage_dir)
  under_new_optimizer = functools.partial(new_state, tx)
  if init_from:
    make = functools.partial(make, donate_argnums=0)  # Avoids a second copy of the parameters.
    return make(under_new_optimizer)(load(init_from, template)), {}, store
  key = jax.random.key(a.c.seed)
  state = make(lambda key: under_new_optimizer(init_params(key)))(key)
  return loading.finite(state, "fresh parameters"), {}, store
