"""AdamW under a schedule, with frozen parameters by path."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from nemocascade.errors import UserError
from nemocascade.field_table import check_values
from nemocascade.types import Params, TrainState

# Moved by load, not by gradient (paper.md 1.4): no optimizer ever touches it.
NEVER = ("e_score_correction_bias$",)

# Not decayed, whatever their rank: where units are scanned, vectors are stacked to matrices.
NOT_DECAYED = ("bias$", "(^|/)norm(_f)?(/weight)?$", "(^|/)(A_log|D)$")


# Decay after warm-up: progress t from 0 to 1, and the fraction at the end -> fraction of the peak.
SCHEDULES = dict(
  constant=lambda t, final: jnp.ones_like(t),
  linear=lambda t, final: 1.0 - (1.0 - final) * t,
  cosine=lambda t, final: final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
)


def path_name(path) -> str:
  """A parameter's path as "units_0/blocks_1/mixer/gate"."""
  return "/".join(str(getattr(key, "key", key)) for key in path)


def matches(path, patterns: tuple[str, ...]) -> bool:
  """Whether a pattern is found in the parameter's path."""
  return any(re.search(pattern, path_name(path)) for pattern in patterns)


def decayed(params):
  """Tree of bool: true on the matrices that weight decay shrinks."""
  shrinks = lambda path, p: jnp.ndim(p) > 1 and not matches(path, NOT_DECAYED)  # noqa: E731
  return jax.tree_util.tree_map_with_path(shrinks, params)


def norm(tree) -> jax.Array:
  """Of all numbers of the tree together; fp32, whatever their dtype."""
  return optax.tree.norm(jax.tree.map(lambda a: a.astype(jnp.float32), tree))


def clip_by_norm(most: float) -> optax.GradientTransformation:
  """optax.clip_by_global_norm with the norm and the division in fp32, also of bf16 gradients."""
  clip = optax.clip_by_global_norm(most)

  def update(updates, state, params=None):
    clipped, state = clip.update(jax.tree.map(lambda g: g.astype(jnp.float32), updates), state, params)
    return jax.tree.map(lambda c, g: c.astype(g.dtype), clipped, updates), state

  return optax.GradientTransformation(clip.init, update)


def make_schedule(peak_lr, warmup_steps, total_steps, final_fraction, *, schedule: str):
  """Linear warm-up from 1 / warmup_steps of the peak, then the named decay to its fraction.

  optax's schedules want numbers; these may be traced, so that they need not be compiled in.
  """

  def learning_rate(step):
    warmup = (step + 1.0) / jnp.maximum(warmup_steps, 1.0)
    after = (step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1.0)
    decay = SCHEDULES[schedule](jnp.clip(after, 0.0, 1.0), final_fraction)
    return peak_lr * jnp.where(step < warmup_steps, warmup, decay)

  return learning_rate


def make_optimizer(
  *,
  peak_lr: float,
  warmup_steps: int,
  total_steps: int,
  schedule: str = "constant",
  final_fraction: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
  frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """AdamW; parameters whose path matches a pattern of `frozen` keep their values.

  The gradient is clipped by the norm of what is trained. Weight decay spares vectors and scalars.
  The numbers of the schedule are kept in the state: optimizers that differ in them alone have the
  same update, so that stages share a compiled step.

  Raises:
    UserError: a setting that nemocascade/field_table.py does not allow and, at `init`, a pattern of `frozen`
      that no parameter matches.
  """
  check_values(
    "optimizer", peak_lr=peak_lr, warmup_steps=warmup_steps, schedule=schedule, final_fraction=final_fraction,
    b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, frozen=frozen,
  )  # fmt: skip

  for pattern in frozen:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f"optimizer.frozen: {pattern!r} is not a regular expression ({error}); give one such as '/gate$'") from error

  @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
  def adam(peak_lr, warmup_steps, total_steps, final_fraction):
    learning_rate = make_schedule(
      peak_lr, warmup_steps, total_steps, final_fraction, schedule=schedule
    )
    return optax.chain(
      clip_by_norm(clip_norm),
      optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )

  def labels(params):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in frozen:
      if not any(matches(path, (pattern,)) for path in paths):
        raise UserError(
          f"optimizer.frozen: no parameter matches {pattern!r}; there is {path_name(paths[0])!r}"
        )
    label = lambda path, _: "frozen" if matches(path, (*frozen, *NEVER)) else "trained"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)

  trained = adam(peak_lr, warmup_steps, total_steps, final_fraction)
  return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def new_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
  """Parameters under a new optimizer."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))
