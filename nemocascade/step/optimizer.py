"""AdamW or Muon with a learning-rate schedule; parameters can be frozen by path."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from nemocascade.errors import UserError
from nemocascade.field_check import check_values
from nemocascade.mesh import put
from nemocascade.types import Params, TrainState

# The router's bias is updated by expert load, not by gradient (DeepSeek-V3, arXiv 2412.19437, section 2.1.2;
# RouterBalance). The optimizer never changes it.
NEVER = ("e_score_correction_bias$",)

# Parameters without weight decay. They are named, because scanned units stack vectors to matrices and the rank
# cannot tell.
NOT_DECAYED = ("bias$", "(^|/)norm(_f)?(/weight)?$", "(^|/)(A_log|D)$")


# Matrices that Muon orthogonalizes: name -> (summed axes, axes of the output). Axes before them are of a stack: repeats
# of a unit, experts. Embedding, head and router have Adam's update, as in Moonlight (arXiv 2502.16982).
MATRICES = {
  "in_proj": (1, 1), "out_proj": (1, 1), "q_proj": (1, 3), "k_proj": (1, 2), "v_proj": (1, 2), "o_proj": (3, 1),
  "up_proj": (1, 1), "down_proj": (1, 1), "shared_up_proj": (1, 1), "shared_down_proj": (1, 1),
  "fc1_latent_proj": (1, 1), "fc2_latent_proj": (1, 1),
}  # fmt: skip
MUON_RMS = 0.2  # Root mean square of Muon's updates, about that of Adam's, so that both share a learning rate.

# Decay after warm-up: (progress t in [0, 1], fraction at the end, jnp or np) -> fraction of the peak learning rate.
SCHEDULES = dict(
  constant=lambda t, final, xp: xp.ones_like(t),
  linear=lambda t, final, xp: 1.0 - (1.0 - final) * t,
  cosine=lambda t, final, xp: final + (1.0 - final) * 0.5 * (1.0 + xp.cos(xp.pi * t)),
)


def path_name(path) -> str:
  """A parameter's path as text, such as "units_0/blocks_1/mixer/gate"."""
  return "/".join(str(getattr(key, "key", key)) for key in path)


def matches(path, patterns: tuple[str, ...]) -> bool:
  """Whether one of the regular expressions matches a part of the parameter's path."""
  return any(re.search(pattern, path_name(path)) for pattern in patterns)


def decayed(params):
  """Tree of bool: true for parameters with weight decay, which are the matrices outside NOT_DECAYED."""
  shrinks = lambda path, p: jnp.ndim(p) > 1 and not matches(path, NOT_DECAYED)  # noqa: E731
  return jax.tree_util.tree_map_with_path(shrinks, params)


def norm(tree) -> jax.Array:
  """The L2 norm over all numbers of the tree, computed in fp32."""
  return optax.tree.norm(jax.tree.map(lambda a: a.astype(jnp.float32), tree))


def clip_by_norm(most: float) -> optax.GradientTransformation:
  """optax.clip_by_global_norm that computes in fp32, for bf16 gradients too; dtypes are kept.

  Gradients are multiplied by one number, where optax divides each of them: XLA on CPUs would write the quotients.

  Args:
    most: the largest norm of the gradient.
  """

  def update(updates, state, params=None):
    del params
    scale = jnp.minimum(1.0, most / norm(updates))
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), updates), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def matrix_axes(params):
  """Tree of optax's MuonDimensionNumbers for MATRICES; None for other parameters."""

  def axes(path, p):
    if (name := path_name(path).rpartition("/")[2]) not in MATRICES:
      return None
    (summed, out), n = MATRICES[name], jnp.ndim(p)
    return optax.contrib.MuonDimensionNumbers(tuple(range(n - summed - out, n - out)), tuple(range(n - out, n)))

  return jax.tree_util.tree_map_with_path(axes, params)


def _adamw(learning_rate, b1, b2, eps, weight_decay) -> optax.GradientTransformation:
  return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def _muon(learning_rate, b1, b2, eps, weight_decay) -> optax.GradientTransformation:
  """Muon for MATRICES, Adam for the rest; weight decay as in AdamW (arXiv 2502.16982)."""

  def rescale(updates, params=None):
    def scaled(u, axes):
      fans = [np.prod([u.shape[axis] for axis in of]) for of in axes]
      return u * (MUON_RMS * max(fans) ** 0.5)

    return jax.tree.map(scaled, updates, matrix_axes(updates))

  kinds = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
    lambda path, _: "muon" if path_name(path).rpartition("/")[2] in MATRICES else "adam", params
  )
  muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=matrix_axes), optax.stateless(rescale))
  return optax.chain(
    optax.multi_transform({"muon": muon, "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, kinds),
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.scale_by_learning_rate(learning_rate),
  )


KINDS = dict(adamw=_adamw, muon=_muon)


def make_schedule(peak_lr, warmup_steps, total_steps, final_fraction, *, schedule: str, xp=jnp):
  """Linear warm-up from 1 / warmup_steps of the peak, then decay to `final_fraction` of the peak.

  The arguments may be traced arrays, so that a compiled step serves any values; optax's own schedules
  need Python numbers.

  Args:
    schedule: a key of SCHEDULES.
    xp: jnp, or np for numbers on the host.
  """

  def learning_rate(step):
    warmup = (step + 1.0) / xp.maximum(warmup_steps, 1.0)
    after = (step - warmup_steps) / xp.maximum(total_steps - warmup_steps, 1.0)
    decay = SCHEDULES[schedule](xp.clip(after, 0.0, 1.0), final_fraction, xp)
    return peak_lr * xp.where(step < warmup_steps, warmup, decay)

  return learning_rate


def host_schedule(c: Mapping[str, Any], total_steps: int) -> Callable[[int], float]:
  """Updates done -> the learning rate of the next one, computed on the host.

  Args:
    c: the settings of make_optimizer, without total_steps.
  """
  names = ("peak_lr", "warmup_steps", "final_fraction", "schedule")
  schedule = make_schedule(total_steps=total_steps, **{name: c[name] for name in names}, xp=np)
  return lambda updates: float(schedule(updates))


def make_optimizer(
  *,
  peak_lr: float,
  warmup_steps: int,
  total_steps: int,
  kind: str = "adamw",
  schedule: str = "constant",
  final_fraction: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
  frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """AdamW or Muon with gradient clipping and a schedule; parameters that match `frozen` keep their values.

  The clipped norm is that of the trained parameters alone. Vectors and scalars have no weight decay.
  The schedule's numbers are kept in the optimizer state. So stages that differ only in these numbers share
  one compiled step.

  Args:
    kind: a key of KINDS.
    frozen: regular expressions, each searched in the parameters' paths.

  Raises:
    UserError: a setting outside the ranges of nemocascade/field_table.py, or an invalid regular expression.
      `init` raises it for a pattern of `frozen` that matches no parameter.
  """
  check_values(
    "optimizer", peak_lr=peak_lr, warmup_steps=warmup_steps, kind=kind, schedule=schedule,
    final_fraction=final_fraction, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, frozen=frozen,
  )  # fmt: skip

  for pattern in frozen:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"optimizer.frozen: {pattern!r} is not a regular expression ({error}); give one such as '/gate$'"
      ) from error

  @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
  def scheduled(peak_lr, warmup_steps, total_steps, final_fraction):
    learning_rate = make_schedule(peak_lr, warmup_steps, total_steps, final_fraction, schedule=schedule)
    return optax.chain(
      clip_by_norm(clip_norm),
      KINDS[kind](learning_rate, b1, b2, eps, weight_decay),
    )

  def labels(params):
    _check_frozen(frozen, [path for path, _ in jax.tree_util.tree_leaves_with_path(params)])
    label = lambda path, _: "frozen" if matches(path, (*frozen, *NEVER)) else "trained"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)

  trained = scheduled(peak_lr, warmup_steps, total_steps, final_fraction)
  return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _check_frozen(frozen: tuple[str, ...], paths: list) -> None:
  """Raises UserError if a pattern matches no parameter, or if all parameters match."""
  for pattern in frozen:
    if not any(matches(path, (pattern,)) for path in paths):
      raise UserError(f"optimizer.frozen: no parameter matches {pattern!r}; there is {path_name(paths[0])!r}")
  if frozen and all(matches(path, (*frozen, *NEVER)) for path in paths):
    raise UserError(
      f"optimizer.frozen={frozen}: matches all parameters, so that nothing is trained; give fewer patterns"
    )


class Remembered(NamedTuple):
  """The state of an optimizer, and the parameters before the last update."""

  inner: Any
  before: Params


def remembering(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx`, whose state is a Remembered."""

  def update(updates, state, params=None):
    updates, inner = tx.update(updates, state.inner, params)
    return updates, Remembered(inner, params)

  return optax.GradientTransformation(lambda params: Remembered(tx.init(params), params), update)


def new_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
  """A training state at step 0 with these parameters and a fresh optimizer state."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def with_schedule_of(tx: optax.GradientTransformation, state: TrainState) -> TrainState:
  """The state with the schedule's numbers of `tx`, for one that was restored and whose config has changed since."""
  # The numbers do not depend on the parameters' sizes. Their ranks select the weight decay.
  empty = jax.tree.map(lambda p: jnp.zeros((0,) * jnp.ndim(p), p.dtype), state.params)
  fresh = tx.init(empty)

  def chosen(path, old, new):
    of_schedule = any(getattr(key, "name", None) == "hyperparams" for key in path)
    return put(np.asarray(new, old.dtype), old.sharding) if of_schedule and hasattr(old, "sharding") else old

  return state.replace(opt_state=jax.tree_util.tree_map_with_path(chosen, state.opt_state, fresh))
