"""Checks the functions of an RL stage's objective and their options, a user's own by a trial call.

A user's own function is called once with small arrays, as the training step would call it: under `jax.jit`
where the step does so. It must return arrays of the right shapes and dtypes with finite values.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nemocascade import advantage, own_code
from nemocascade.errors import UserError, unknown
from nemocascade.fields import shown
from nemocascade.runtime.objective import SLOTS, settings_of, topk
from nemocascade.segments import document_mean
from nemocascade.step import loss
from nemocascade.types import Rollout

Q, T, D, V = 3, 6, 4, 8  # Sizes of the trial's arrays.
# Slot -> number of its function's arguments.
ARGUMENTS = dict(advantage=1, ratio=4, correction=3, aggregation=1, kl=2, distillation=6, overlong=3)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
  """A call of a slot's function.

  Attributes:
    arrays: its arguments that are arrays, or pytrees of them.
    more: the arguments after them.
    returns: (name, dtype, shape) of each result.
    learned: the entries of a result that must be finite, or None for all.
    traced: whether the training step calls it under `jax.jit`.
  """

  arrays: tuple
  returns: tuple[tuple[str, type, Shape], ...]
  more: tuple = ()
  learned: np.ndarray | None = None
  traced: bool = True


def check_functions(c: ConfigDict) -> None:
  """Checks the fields of SLOTS and `options` of an RL stage. Nothing of the run is compiled.

  A file of a user's that has changed since it was executed is executed again.

  Raises:
    UserError: an option is not a setting of its function; or a user's function cannot be loaded, has another
      signature, raises, or returns something else than its slot allows.
  """
  own = {slot: own_code.load(c[slot], field=slot, renew=True) for slot in SLOTS if own_code.is_own(c[slot])}
  functions = {name: fn for choices in SLOTS.values() for name, fn in choices.items()}
  functions |= {own_code.name_of(c[slot]): fn for slot, fn in own.items()}
  for slot, function in own.items():
    _check_signature(f"{slot}={c[slot]!r}", function, ARGUMENTS[slot])
  for name, fields in c.options.items():
    if name not in functions:
      raise unknown("function in options", name, functions)
    for field in fields:
      if field not in (allowed := settings_of(functions[name])):
        raise unknown(f"setting in options.{name}", field, allowed)
    if functions[name] in loss.CORRECTIONS.values() and (low := fields.get("low", 0)) > (
      high := fields.get("high", low)
    ):
      raise UserError(f"options.{name}.low={low}: must be at most options.{name}.high={high}")
  for slot, function in own.items():
    _try(slot, c, function)


def _check_signature(where: str, function: Callable, count: int) -> None:
  """Raises UserError if the function cannot be called with `count` arguments and no setting."""
  try:
    inspect.signature(function).bind(*range(count))
  except TypeError as error:
    raise UserError(
      f"{where}: must take {count} argument{'s' * (count > 1)}, and settings as keyword-only arguments with"
      f" defaults ({error})"
    ) from error


def _try(slot: str, c: ConfigDict, function: Callable) -> None:
  """Calls a user's function once. Raises UserError if it raises, or returns something else than allowed."""
  options = c.options.get(own_code.name_of(c[slot]), {})
  trial, where = _trial(slot, c, function), f"{slot}={c[slot]!r}"
  bound = lambda *arrays: function(*arrays, *trial.more, **options)
  try:
    found = (jax.jit(bound) if trial.traced else bound)(*trial.arrays)
  except Exception as error:
    raise UserError(f"{where}: raises {own_code.raised(error)}{_hint(slot, function, trial)}") from error
  results = found if isinstance(found, tuple) and len(trial.returns) > 1 else (found,)
  names = ", ".join(name for name, _, _ in trial.returns)
  if len(results) != len(trial.returns):
    raise UserError(f"{where}: must return ({names}), not {shown(found)}")
  for result, (name, dtype, shape) in zip(results, trial.returns, strict=True):
    _check_result(f"{where}: returns {name}", result, dtype, shape, trial.learned)


def _check_result(what: str, result: Any, dtype: type, shape: Shape, learned: np.ndarray | None) -> None:
  allowed = f"{np.dtype(dtype).name} of shape {shape} for a batch of {Q} prompts and rows of {T} tokens"
  if not isinstance(result, jax.Array | np.ndarray):
    raise UserError(f"{what} as {type(result).__name__} {shown(result)}: must be an array, {allowed}")
  if result.shape != shape or result.dtype != dtype:
    raise UserError(f"{what} as {result.dtype} of shape {result.shape}: must be {allowed}")
  values = np.asarray(result)
  values = values[learned] if learned is not None and values.shape == learned.shape else values
  if not np.all(np.isfinite(values)):
    raise UserError(f"{what} with a value that is not finite: {shown(values[~np.isfinite(values)][0])}")


def _hint(slot: str, function: Callable, trial: Trial) -> str:
  """Advice where an advantage reads teachers, and does not state it."""
  if slot != "advantage" or trial.arrays[0].teacher_logprobs_QGT is not None:
    return ""
  logprobs_QGT = trial.arrays[0].behaviour_logprobs_QGT
  try:
    jax.eval_shape(function, trial.arrays[0].replace(teacher_logprobs_QGT=logprobs_QGT))
  except Exception:  # It fails for another reason.
    return ""
  return "; if it reads teachers, decorate it with nemocascade.advantage.needs(teachers=True)"


def _trial(slot: str, c: ConfigDict, function: Callable) -> Trial:
  """The trial call of a slot's function."""
  rng = np.random.default_rng(0)
  random = lambda *shape: -rng.exponential(size=shape).astype(np.float32)
  G = min(c.rollout.completions, 4)
  logprobs_BT, others_BT, a_BT, mask_BT = random(Q, T), random(Q, T), random(Q, T), np.arange(T) > np.ones((Q, 1))
  mean_of = lambda x_BT: document_mean(x_BT, mask_BT, np.ones((Q, T), np.int32))
  f32, BT = np.float32, (Q, T)
  if slot == "advantage":
    rollout = small_rollout(c, G, random, advantage.needs_of(function).teachers)
    learned = np.asarray(rollout.loss_mask_QGT & rollout.valid_QG[..., None])
    return Trial((rollout,), (("advantages_QGT", f32, (Q, G, T)),), learned=learned)
  if slot == "overlong":
    rewards_QG, finished_QG, room_QG = random(Q, G), rng.random((Q, G)) > 0.5, rng.integers(0, T, (Q, G))
    returns = (("rewards_QG", f32, (Q, G)), ("kept_QG", np.bool_, (Q, G)))
    return Trial((rewards_QG, finished_QG, room_QG), returns, traced=False)
  if slot == "ratio":
    returns = (("gain_BT", f32, BT), ("clipped_BT", np.bool_, BT))
    return Trial((logprobs_BT, others_BT, a_BT), returns, more=(mean_of,))
  if slot == "correction":
    return Trial((others_BT, a_BT), (("weights_BT", f32, BT),), more=(mean_of,))
  if slot == "aggregation":
    return Trial((mask_BT,), (("weights_BT", f32, BT), ("count", f32, ())))
  if slot == "kl":
    return Trial((logprobs_BT, others_BT), (("kl_BT", f32, BT),))
  k = topk(c)
  sent = {"teacher_states": random(*BT, D), "teacher": np.zeros(BT, np.int32)}
  if k:
    sent = {"top_tokens": np.zeros((*BT, k), np.int32), "top_logprobs": random(*BT, k)}
  heads_ZDV = None if k else random(1, D, V)
  arrays = (random(*BT, D), random(D, V), mask_BT, sent, heads_ZDV, np.float32(c.rollout.temperature))
  return Trial(arrays, (("kl_BT", f32, BT),))


def small_rollout(c: ConfigDict, G: int, random: Callable[..., np.ndarray], taught: bool) -> Rollout:
  """A rollout with a group of equal rewards, an invalid sample, and what the stage's config annotates.

  Args:
    random: shape -> fp32 log-probabilities.
    taught: whether it has a teacher's log-probabilities.
  """
  valid_QG = np.ones((Q, G), bool)
  valid_QG[-1, 0] = False
  rewards_QG = (np.arange(Q * G).reshape(Q, G) % 2).astype(np.float32)
  rewards_QG[0] = 1.0
  return jax.tree.map(
    jnp.asarray,
    Rollout(
      tokens_QGT=np.zeros((Q, G, T), np.int32),
      segment_ids_QGT=np.ones((Q, G, T), np.int32),
      loss_mask_QGT=np.broadcast_to(np.arange(T) > 1, (Q, G, T)),
      behaviour_logprobs_QGT=random(Q, G, T),
      rewards_QG=rewards_QG,
      valid_QG=valid_QG,
      drawn_logprobs_QGT=random(Q, G, T) if c.rollout.top_p < 1 else None,
      teacher_logprobs_QGT=random(Q, G, T) if taught else None,
      reference_logprobs_QGT=random(Q, G, T) if c.kl_weight else None,
    ),
  )
