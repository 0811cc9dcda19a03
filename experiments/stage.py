"""What every training stage does alike: where it starts, and what it leaves behind."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import loading
from experiments.assembly import Assembly
from experiments.config_file import shown_path
from nemocascade.checkpoint import Store
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import alike, placed, whole
from nemocascade.model.hybrid import active_params
from nemocascade.rollout.episode import Samples
from nemocascade.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Spent:
  """Tokens that a stage of RL has put through a model so far, by what was done with them."""

  sampled: int = 0  # Decoded one at a time.
  prefilled: int = 0  # Prompts, once each.
  scored: int = 0  # Under a teacher or a reference.
  trained: int = 0  # Forward and backward; documents that teach nothing are never in a row.

  def plus(self, **more: int) -> "Spent":
    return dataclasses.replace(self, **{name: getattr(self, name) + n for name, n in more.items()})

  def plus_rollout(self, samples: Samples) -> "Spent":
    given_QG = ((samples.segment_ids_QGT > 0) & ~samples.loss_mask_QGT).sum(-1)
    return self.plus(sampled=int(samples.loss_mask_QGT.sum()), prefilled=int(given_QG[:, 0].sum()))

  def flops(self, matmul_params: int) -> int:
    """2 a parameter and token forward, 6 with the backward pass.

    Args:
      matmul_params: of the model; the function of this name.

    Attention's and the scan's own products are left out: they are few at these lengths.
    """
    return matmul_params * (2 * (self.sampled + self.prefilled + self.scored) + 6 * self.trained)


def matmul_params(config: ModelConfig) -> int:
  """Parameters that multiply every token: looking a token up in the embedding costs nothing."""
  rows = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
  return active_params(config) - rows


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A finished stage."""

  params: Params
  checkpoint: str
  steps: int
  tokens: int  # Trained on or sampled, all steps.
  wall_s: float  # Of this process; a resumed stage adds what it had.


def new_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
  """Parameters under a new optimizer."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract_state(tx: optax.GradientTransformation, template: Params, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and places of a stage's state: the optimizer's moments lie as their parameters."""
  shapes = jax.eval_shape(functools.partial(new_state, tx), template)
  return placed(shapes, alike(shapes, template, mesh))


def jit_step(step: Callable, state: TrainState, mesh: Mesh) -> Callable:
  """The jitted step, whose next state lies where the state lay (of abstract_state); metrics are everywhere."""
  places = jax.tree.map(lambda a: a.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, whole(mesh)))


def check_start(a: Assembly, field: str, checkpoint: str, template: Params | None = None) -> None:
  """Refuses a checkpoint that a stage could not begin with; none of its weights is read.

  Args:
    field: the field of the config that names it.
    template: the shapes that its parameters must have; the assembly's own by default.

  Raises:
    UserError: it is not there, its model is another, or its tokenizer is.
  """
  if not checkpoint:
    return
  found = loading.find(checkpoint, field)
  found.check(template or a.template)
  if found.tokenizer is not None and a.tokenizer is not None and found.tokenizer.fingerprint != a.tokenizer.fingerprint:
    raise UserError(
      f"{field}={shown_path(checkpoint, 40)}: its tokenizer ({found.tokenizer.vocab_size} tokens) is not this run's"
      f" ({a.tokenizer.vocab_size}): give --config.tokenizer.path={found.files}"
    )


def start(
  a: Assembly, stage_dir: Path, tx: optax.GradientTransformation, init_from: str, init_params=None, template=None,
  load=loading.load,
) -> tuple[TrainState, dict, Store]:  # fmt: skip
  """The state to train from, its record and the store: the first of these that exists.

  1. This stage's own last checkpoint, data position included.
  2. The parameters at `init_from` (a checkpoint of ours, or hf:DIR), under a new optimizer.
  3. Fresh parameters.

  Args:
    init_params, template: in the place of the assembly's own, for another model.
    load: (checkpoint, template) -> its parameters.
  """
  init_params, template = init_params or a.fresh_params, template or a.template
  state = abstract_state(tx, template, a.mesh)
  # Each device makes its own part: no device has to hold all.
  make = functools.partial(jax.jit, out_shardings=jax.tree.map(lambda s: s.sharding, state))
  store = Store(stage_dir / "checkpoints")
  if store.latest() is not None:
    return *store.restore(state), store
  a.save_model_files(stage_dir)
  under_new_optimizer = functools.partial(new_state, tx)
  if init_from:
    make = functools.partial(make, donate_argnums=0)  # The parameters are there once.
    return make(under_new_optimizer)(load(init_from, template)), {}, store
  key = jax.random.key(a.c.seed)
  return make(lambda key: under_new_optimizer(init_params(key)))(key), {}, store
