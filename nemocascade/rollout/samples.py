"""The samples of a step: tokens on the devices, and on the host what decisions are taken from."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from nemocascade.mesh import constrain_rows
from nemocascade.rollout.decoding import Decoding
from nemocascade.rollout.judging import Judging
from nemocascade.verifiers.verdict import Completion, Row

WIDTH = 4096  # Tokens of a prompt's completions that are moved between devices at a time.


@dataclasses.dataclass(frozen=True)
class Samples:
  """G completions of each of Q rows.

  The arrays [Q, G, T] are on the devices, sharded along Q by mesh.rows. All else is on the host and, except for
  `completions`, the same in every process.
  """

  rows: list[Row]
  domains: list[str]  # The domain's name for each row.
  tokens_QGT: jax.Array  # int32; prompt and completion, then 0.
  segment_ids_QGT: jax.Array  # int32; 1 on tokens, 0 on padding.
  loss_mask_QGT: jax.Array  # bool; true on tokens that the policy sampled.
  behaviour_logprobs_QGT: jax.Array  # fp32; under softmax(logits / temperature), 0 on given tokens.
  limit_QG: np.ndarray  # int32; tokens, prompt included, at which the sampler ends a completion.
  length_QG: np.ndarray  # int32; tokens, prompt included.
  sampled_QG: np.ndarray  # int32; tokens that the policy sampled.
  finished_QG: np.ndarray  # bool; whether the model ended the last turn itself, before the limit.
  completions: list[list[Completion | None]]  # [Q][G]; None where another process has it.
  drawn_logprobs_QGT: jax.Array | None = None  # fp32; under the top_p nucleus; None at top_p = 1.
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # What the sampling has cost, in this process.
  judging: Judging | None = None  # Has the verdicts that are given beside decoding.
  experts_QGTY: jax.Array | None = None  # uint8 or uint16; the sampler's experts, see Rollout; None if not recorded.

  @classmethod
  def pick(cls, parts: Sequence["Samples"], places: Sequence[tuple[int, int]]) -> "Samples":
    """The samples of the prompts at `places`, in this order.

    Args:
      parts: of Q prompts each.
      places: Q pairs of (index of the part, index of the prompt in it).
    """
    values: dict[str, Any] = {
      name: [getattr(parts[i], name)[q] for i, q in places] for name in ("rows", "domains", "completions")
    }
    for name in ("limit_QG", "length_QG", "sampled_QG", "finished_QG"):
      values[name] = np.stack([getattr(parts[i], name)[q] for i, q in places])
    names = [name for name in ARRAYS if getattr(parts[0], name) is not None]
    arrays: list[dict[str, Any]] = [{name: getattr(part, name) for name in names} for part in parts]
    picked, of_prompt = arrays[0], arrays[0]["tokens_QGT"].sharding
    part_Q, place_Q = np.array(places, np.int32).T
    # One part after the other, so that any number of parts runs the same program.
    for i, part in enumerate(arrays):
      picked = _replace(picked, part, place_Q, part_Q == i, of_prompt)
    return cls(**values, **picked)


ARRAYS = (
  "tokens_QGT", "segment_ids_QGT", "loss_mask_QGT", "behaviour_logprobs_QGT", "drawn_logprobs_QGT", "experts_QGTY",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames="of_prompt")
def _replace(picked: dict, part: dict, place_Q, here_Q, of_prompt: Sharding) -> dict:
  """`picked` with the prompts where here_Q replaced by the prompts place_Q of `part`.

  Prompts move between devices WIDTH tokens at a time, because a device may get pieces of all prompts on the way.

  Args:
    picked, part: name -> array [Q, G, T, ...].
    of_prompt: the sharding of the arrays.
  """
  T = picked["tokens_QGT"].shape[2]
  width = min(T, WIDTH)

  def body(i, picked):
    start = jnp.minimum(i * width, T - width)

    def one(old_QGT, new_QGT):
      cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=2)  # noqa: E731
      moved = jax.lax.with_sharding_constraint(jnp.take(cut(new_QGT), place_Q, axis=0), of_prompt)
      kept = jnp.where(here_Q.reshape(-1, *[1] * (moved.ndim - 1)), moved, cut(old_QGT))
      return jax.lax.dynamic_update_slice_in_dim(old_QGT, kept, start, axis=2)

    return jax.lax.with_sharding_constraint(jax.tree.map(one, picked, part), of_prompt)

  return jax.lax.fori_loop(0, -(-T // width), body, picked)


def by_groups(d: Decoding, Q: int, mesh: Mesh) -> dict[str, Any]:
  """The arrays [Q, G, T, ...] of Samples by name, from the decoding state of their Q * G rows."""
  recorded = d.behaviour_logprobs_BT, d.drawn_logprobs_BT, d.experts_BTY
  return _by_groups(d.tokens_BT, d.sampled_BT, *recorded, d.known_B, Q=Q, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("Q", "mesh"))
def _by_groups(tokens_BT, sampled_BT, behaviour_BT, drawn_BT, experts_BTY, known_B, *, Q: int, mesh: Mesh) -> dict:
  group = lambda a_BT: constrain_rows(a_BT.reshape(Q, -1, *a_BT.shape[1:]), mesh)  # noqa: E731
  real_BT = jnp.arange(tokens_BT.shape[1])[None] < known_B[:, None]
  return dict(
    tokens_QGT=group(jnp.where(real_BT, tokens_BT, 0)),
    segment_ids_QGT=group(real_BT.astype(jnp.int32)),
    loss_mask_QGT=group(sampled_BT),
    behaviour_logprobs_QGT=group(behaviour_BT),
    drawn_logprobs_QGT=None if drawn_BT is None else group(drawn_BT),
    experts_QGTY=None if experts_BTY is None else group(experts_BTY),
  )
