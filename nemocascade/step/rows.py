"""Turns a rollout into the rows of a policy-gradient step: unpacked, packed, or after shared prompts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nemocascade.data import packing
from nemocascade.step import loss
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


def pack_rows(rows: Rows, *, B: int, T: int, accumulate: int = 1) -> dict[str, np.ndarray]:
  """Packs the documents that have a learned token into B rows of T tokens; all values are copied unchanged.

  Rows are filled in the order in which a step with `accumulate` pieces reads them. So the empty rows fall into
  the last pieces, which the step skips if they have no document.
  """
  rows = {name: np.asarray(a) for name, a in rows.items()}
  kept = np.flatnonzero(rows["mask"].any(axis=1))
  lengths_N = (rows["segment_ids"][kept] > 0).sum(axis=1)
  packed = {name: np.zeros((B, T, *a.shape[2:]), a.dtype) for name, a in rows.items()}
  for i, documents in enumerate(packing.pack(lengths_N, capacity=T)):
    b = i % (B // accumulate) * accumulate + i // (B // accumulate)
    start = 0
    for segment, n in enumerate(documents, start=1):
      place = slice(start, start + lengths_N[n])
      for name, a in rows.items():
        packed[name][b, place] = a[kept[n], : lengths_N[n]]
      packed["segment_ids"][b, place] = segment
      start = place.stop
  return packed


def after_prompts(rows: Rows, Q: int, *, P: int, T: int) -> tuple[dict[str, np.ndarray], Prompts]:
  """Splits the G rows of each prompt into the shared prompt and the completions: (rows, Prompts).

  A prompt ends before the first token that one of its samples learns from. Rows keep their order; rows without
  a learned token become padding.

  Args:
    rows: those of to_rows, [Q * G, T'].
    Q: number of prompts.
    P: most tokens of a prompt.
    T: tokens of a returned row.

  Raises:
    ValueError: a prompt has more than P tokens, or a row has more than T tokens after its prompt.
  """
  rows = {name: np.asarray(a) for name, a in rows.items()}
  B, G = rows["mask"].shape[0], rows["mask"].shape[0] // Q
  taught_B, first_B = np.any(rows["mask"], axis=1), np.argmax(rows["mask"], axis=1)
  cut = {name: np.zeros((B, T, *a.shape[2:]), a.dtype) for name, a in rows.items()}
  tokens_QP, length_Q = np.zeros((Q, P), np.int32), np.zeros(Q, np.int32)
  lengths_B = (rows["segment_ids"] > 0).sum(axis=1)
  for q in range(Q):
    kept = [b for b in range(q * G, q * G + G) if taught_B[b]]
    if not kept:
      continue
    n = min(first_B[b] for b in kept)
    most = max(lengths_B[b] for b in kept)
    if n > P or most - n > T:
      raise ValueError(f"a prompt of {n} tokens and {most - n} behind it: there is room for {P} and {T}")
    tokens_QP[q, :n], length_Q[q] = rows["tokens"][kept[0], :n], n
    for b in kept:
      for name, a in rows.items():
        cut[name][b, : lengths_B[b] - n] = a[b, n : lengths_B[b]]
  return cut, Prompts(tokens_QP, length_Q)
