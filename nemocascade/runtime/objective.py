"""The objective of an RL stage: the functions that its config names, and the programs built from them."""

import functools
import inspect
import json
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade import advantage, own_code
from nemocascade import mesh as mesh_lib
from nemocascade.errors import UserError
from nemocascade.model.sequence_parallel import check_rows
from nemocascade.rollout import rewards
from nemocascade.runtime.exact import compiler_options
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import abstract_state, jit_step
from nemocascade.step import loss, placement
from nemocascade.step.balance import RouterBalance
from nemocascade.step.optimizer import make_optimizer, remembering
from nemocascade.step.policy_gradient import (
  policy_gradient_step,
  proximal_logprobs,
  rollout_metrics,
)
from nemocascade.step.rows import rows_needed, to_rows

SLOTS = dict(
  advantage=advantage.ADVANTAGES,
  ratio=loss.RATIOS,
  correction=loss.CORRECTIONS,
  aggregation=loss.AGGREGATIONS,
  kl=loss.KLS,
  distillation=loss.DISTILLATIONS,
  overlong=rewards.OVERLONG,
)


def named(c: ConfigDict, slot: str) -> Callable:
  """The function that the field `slot` names: one of SLOTS, or a user's own (`FILE.py:NAME`)."""
  word = c[slot]
  return own_code.load(word, field=slot) if own_code.is_own(word) else SLOTS[slot][word]


def needs(c: ConfigDict) -> advantage.Needs:
  """What the stage's advantage needs of the run."""
  return advantage.needs_of(named(c, "advantage"))


def taught(c: ConfigDict) -> list[str]:
  """The settings of a stage that need teachers, such as "advantage='mopd'", for messages."""
  of_advantage = [f"advantage={c.advantage!r}"] if needs(c).teachers else []
  return of_advantage + ([f"distillation={c.distillation!r}"] if c.distillation_weight else [])


def topk(c: ConfigDict) -> int | None:
  """The number of the teacher's likeliest tokens that the distillation reads; None if it reads states.

  It is the setting `k`, which only functions have that read such tokens.
  """
  k = inspect.signature(chosen(c, "distillation")).parameters.get("k")
  return k.default if k else None


def settings_of(function: Callable) -> list[str]:
  """The names of a slot's keyword-only arguments."""
  parameters = inspect.signature(function).parameters.values()
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def settings(c: ConfigDict, *names: str) -> str:
  """The named fields of `c`, and the options of the functions that they name, as JSON.

  A user's own functions are there with the version of their files, so that a changed file makes other programs.
  """
  fields = {name: json.loads(c.to_json_best_effort())[name] for name in (*names, "options")}
  words = [fields[name] for name in names if name in SLOTS]
  fields["options"] = {n: o for n, o in fields["options"].items() if n in map(own_code.name_of, words)}
  fields["own"] = [(word, own_code.version(word)) for word in words if own_code.is_own(word)]
  return json.dumps(fields, sort_keys=True)


# Stored in the optimizer's state, so that the step's program does not depend on them.
SCHEDULED = ("peak_lr", "warmup_steps", "final_fraction")


def step_settings(c: ConfigDict) -> str:
  """The settings that a step depends on, as JSON. Stages with equal settings share a compiled program."""
  c = ConfigDict(c)
  c.optimizer = {name: value for name, value in c.optimizer.items() if name not in SCHEDULED}
  with c.unlocked():
    c.replay, c.lag, c.exact = bool(c.rollout.replay), c.rollout.lag, bool(c.rollout.exact)
  return settings(
    c, "ratio", "correction", "kl", "kl_weight", "entropy_weight", "distillation", "distillation_weight",
    "optimizer", "packing", "router_balance", "replay", "lag", "exact",
  )  # fmt: skip


def chosen(c: ConfigDict, slot: str) -> Callable:
  """The function that the field `slot` names, with its options bound."""
  return functools.partial(named(c, slot), **c.options.get(own_code.name_of(c[slot]), {}))


@functools.cache
def rows_program(fields: str, mesh: Mesh | None = None):
  """The jitted function rollout -> (training rows, the loss's count, metrics).

  Args:
    fields: the result of `settings` for advantage and aggregation.
    mesh: the rows are sharded over it like the rollout's prompts, so that no array moves.
  """
  c = ConfigDict(json.loads(fields))
  advantage_fn, aggregation = chosen(c, "advantage"), chosen(c, "aggregation")

  def rows(rollout):
    rows, count = to_rows(rollout, advantage_fn(rollout), aggregation)
    found = rows, count, rollout_metrics(rollout)
    if mesh is None:
      return found
    held = mesh_lib.rows(mesh, len(rollout.tokens_QGT))
    return jax.lax.with_sharding_constraint(found, (held, mesh_lib.whole(mesh), mesh_lib.whole(mesh)))

  return jax.jit(rows)


def program(c: ConfigDict, programs: Programs):
  """(optimizer, `step_program`) of a stage."""
  tx = make_optimizer(total_steps=c.steps * c.updates, **c.optimizer)
  return _lagging(tx, c.rollout.lag), step_program(c, programs)


def _lagging(tx: optax.GradientTransformation, lag: int) -> optax.GradientTransformation:
  """The optimizer of a stage whose batches are sampled with the parameters of `lag` updates before."""
  return remembering(tx) if lag else tx


def step_program(c: ConfigDict, programs: Programs):
  """(abstract state, jitted step, jitted log-probabilities before the updates); made once by `programs`.

  Raises:
    UserError: prompts or rows do not divide over the mesh, or a device has too few rows for its prompts.
  """
  r, p, mesh = c.rollout, c.packing, programs.mesh
  if p.shared_prompts or r.exact:  # Each device has whole prompts and the rows that continue them.
    mesh_lib.check_rows("rollout.prompts", r.prompts, mesh)
  check_rows("packing.rows / packing.pieces", p.rows // p.pieces, programs.config, mesh)
  if not p.shared_prompts and not r.exact:
    check_room(c, mesh)
  fields = step_settings(c)
  return programs.once(("rl step", fields), lambda: _step_program(programs, fields))


def check_room(c: ConfigDict, mesh: Mesh) -> None:
  """Raises UserError unless the rows of each device hold the completions of its own prompts, whatever their lengths.

  Completions stay on the device that sampled them, so that rows of other devices don't help.
  """
  r, p = c.rollout, c.packing
  parts = len(placement.parts(mesh, r.prompts, p.rows // p.pieces))
  completions, there = r.prompts * r.completions // parts, p.rows // parts
  needed = rows_needed(completions, r.total_tokens, p.row_tokens)
  if there < needed:
    raise UserError(
      f"packing.rows={p.rows}: must be at least {needed * parts} on {mesh.size} devices, which pack their own prompts in"
      f" {parts} parts: {completions} completions of {r.total_tokens} tokens need {needed} rows of {p.row_tokens},"
      f" and a part has {there}"
    )


def _step_program(programs: Programs, fields: str):
  c = ConfigDict(json.loads(fields))
  tx = _lagging(make_optimizer(peak_lr=1.0, warmup_steps=0, total_steps=1, **c.optimizer), c.lag)
  balance = RouterBalance(**c.router_balance)
  take_in_fn = programs.take_in_fn_under(replay=c.replay)
  step = policy_gradient_step(
    programs.score_fn_under(balance, replay=c.replay), tx, ratio=chosen(c, "ratio"), correction=chosen(c, "correction"),
    kl=chosen(c, "kl"), kl_weight=c.kl_weight, entropy_weight=c.entropy_weight,
    distillation=chosen(c, "distillation"), distillation_weight=c.distillation_weight,
    accumulate=c.packing.pieces, balance=balance, add_to_bias=programs.add_to_bias, take_in_fn=take_in_fn,
  )  # fmt: skip
  state = abstract_state(tx, programs.template, programs.mesh)
  score_fn = programs.score_fn_under(RouterBalance(), replay=c.replay)
  proximal = functools.partial(proximal_logprobs, score_fn, accumulate=c.packing.pieces, take_in_fn=take_in_fn)
  how = dict(compiler_options=compiler_options(programs.mesh)) if c.exact else {}
  return state, jit_step(step, state, programs.mesh, **how), jax.jit(proximal, **how)
