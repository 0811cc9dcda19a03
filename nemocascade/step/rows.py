"""Turns a rollout into the rows of a policy-gradient step: unpacked, packed, or after shared prompts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemocascade.mesh import put_rows
from nemocascade.step import loss, placement
from nemocascade.types import Prompts, Rollout

# name -> [B, T, ...]. A document in a row is a prompt with one completion.
Rows = dict[str, jax.Array]


def to_rows(r: Rollout, advantages_QGT: jax.Array, aggregation: Callable = loss.token_mean) -> tuple[Rows, jax.Array]:
  """Flattens a rollout to rows of shape [Q * G, T], one document each: (rows, count).

  Advantages and weights are computed here from whole groups and sequences, so the rows may be packed or cut
  afterwards. Factors of a gradient are set to 0 on tokens that are not learned: a NaN there would reach the
  gradient even if the loss masks it.

  Args:
    advantages_QGT: the advantage of each token.
    aggregation: one of loss.AGGREGATIONS; it gives the weights and the count.

  Returns:
    rows: "tokens", "segment_ids", "mask", "weights", "behaviour", "advantages"; further arrays of the rollout
      that are not None.
    count: fp32, the divisor of the summed loss.
  """
  flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
  mask_BT = flat(r.loss_mask_QGT & r.valid_QG[..., None])
  weights_BT, count = aggregation(mask_BT)
  rows = {
    "tokens": flat(r.tokens_QGT),
    "segment_ids": flat(r.segment_ids_QGT),
    "mask": mask_BT,
    "weights": weights_BT,
    "behaviour": flat(r.behaviour_logprobs_QGT),
    "advantages": jnp.where(mask_BT, flat(jax.lax.stop_gradient(advantages_QGT)), 0.0),
  }
  if r.drawn_logprobs_QGT is not None:
    rows["drawn"] = flat(r.drawn_logprobs_QGT)
  if r.experts_QGTY is not None:
    rows["experts"] = flat(r.experts_QGTY)
  if r.reference_logprobs_QGT is not None:
    rows["reference"] = flat(r.reference_logprobs_QGT)
  learned = lambda a: jnp.where(mask_BT[..., None], flat(a), 0)  # noqa: E731
  if r.teacher_states_QGTD is not None and r.teacher_Q is not None:
    rows["teacher_states"] = learned(r.teacher_states_QGTD)
    rows["teacher"] = flat(jnp.broadcast_to(r.teacher_Q[:, None, None], r.tokens_QGT.shape))
  if r.top_tokens_QGTK is not None:
    rows["top_tokens"] = learned(r.top_tokens_QGTK)
    rows["top_logprobs"] = learned(r.top_logprobs_QGTK)
  return rows, count


def rows_needed(documents: int, longest: int, T: int) -> int:
  """Rows of T tokens that always suffice for this many documents of at most `longest` tokens."""
  return -(-documents // (T // longest))


class Lengths(NamedTuple):
  """The documents of a rollout, on the host and the same in every process. A document is a row of `to_rows`."""

  length_QG: np.ndarray  # int32; tokens.
  taught_QG: np.ndarray  # bool; it has a learned token.
  first_QG: np.ndarray  # int32; the place of its first learned token.

  @property
  def prompt_Q(self) -> np.ndarray:
    """Tokens of each prompt: those before the first token that one of its samples learns; 0 if none learns."""
    most = np.iinfo(np.int32).max
    first_Q = np.where(self.taught_QG, self.first_QG, most).min(axis=1)
    return np.where(self.taught_QG.any(axis=1), first_Q, 0).astype(np.int32)


def lengths_of(r: Rollout, mesh: Mesh) -> Lengths:
  """Measures the documents of a rollout on its devices and reads the result, three numbers for each."""
  length_QG, learned_QG, first_QG = jax.device_get(
    placement.measure(r.segment_ids_QGT, r.loss_mask_QGT, r.valid_QG, mesh=mesh)
  )
  return Lengths(length_QG, learned_QG > 0, first_QG)


def pack_rows(rows: Rows, of: Lengths, *, mesh: Mesh, B: int, T: int, accumulate: int = 1) -> Rows:
  """Packs the documents that have a learned token into B rows of T tokens; all values are copied unchanged.

  Every device packs the documents of its own prompts. A step with `accumulate` pieces may skip its last ones, see
  placement.plan_rows, which also lists the errors.

  Args:
    rows: those of to_rows, [Q * G, T'], sharded like the rollout.
  """
  places = placement.plan_rows(mesh, of.length_QG, of.taught_QG, B=B, T=T, pieces=accumulate)
  return placement.pack(
    rows, put_rows(places, mesh), mesh=mesh, Q=len(of.length_QG), B=B, T=T, pieces=accumulate
  )  # fmt: skip


def after_prompts(rows: Rows, of: Lengths, *, mesh: Mesh, P: int, T: int) -> tuple[Rows, Prompts]:
  """Splits the G rows of each prompt into the shared prompt and the completions: (rows, Prompts).

  A prompt ends before the first token that one of its samples learns from. Rows keep their order; rows without
  a learned token become padding.

  Args:
    rows: those of to_rows, [Q * G, T'], sharded like the rollout.
    P: most tokens of a prompt.
    T: tokens of a returned row.

  Raises:
    ValueError: a prompt has more than P tokens, a row has more than T tokens after its prompt, or the prompts do
      not divide over the devices.
  """
  prompt_Q = of.prompt_Q
  behind_Q = np.where(of.taught_QG, of.length_QG, 0).max(axis=1) - prompt_Q
  for n, most in zip(prompt_Q, behind_Q, strict=True):
    if n > P or most > T:
      raise ValueError(f"a prompt of {n} tokens and {most} behind it: there is room for {P} and {T}")
  completions, prompts = placement.plan_prompts(mesh, of.length_QG, of.taught_QG, prompt_Q)
  Q, G = of.length_QG.shape
  cut = placement.pack(rows, put_rows(completions, mesh), mesh=mesh, Q=Q, B=Q * G, T=T)
  read = {name: rows[name] for name in ("tokens", "segment_ids", "experts") if name in rows}
  taken = placement.pack(read, put_rows(prompts, mesh), mesh=mesh, Q=Q, B=Q, T=P)
  return cut, Prompts(taken["tokens"], put_rows(prompt_Q, mesh), taken.get("experts"))
