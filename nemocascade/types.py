"""The pytrees that cross file borders, and the letters their shapes are spelt in.

  B rows       T tokens     S key tokens   D width       V vocabulary
  K kv heads   R queries per kv head       H head width
  M ssm heads  P channels per ssm head     N ssm state   U ssm groups   W conv taps
  E experts    X experts per token         F hidden width of an expert or MLP
  Q prompts    G completions of a prompt   L blocks of one kind

A name ends in the shape it holds: `logprobs_QGT[q, g, t]`. A `1` is a kept axis.
Entry t of anything per token concerns token t itself: `logprobs_BT[b, t]` is
log p(token t | tokens before t), and the first token of a document has none.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct

Params = Any  # A pytree of arrays, unboxed (no partitioning metadata).
Metrics = dict[str, jax.Array]  # "part/quantity" -> scalar.


@struct.dataclass
class Batch:
  """Documents packed into rows, for SFT and for scoring."""

  tokens_BT: jax.Array  # int32
  segment_ids_BT: jax.Array  # int32; documents of a row are 1, 2, ...; 0 is padding.
  loss_mask_BT: jax.Array  # bool; true on the tokens that are learned.


@struct.dataclass
class Prompts:
  """What rows go on from: B rows, B // Q side by side from each of Q prompts."""

  tokens_QP: jax.Array  # int32; padded at their end.
  length_Q: jax.Array  # int32; 0 where no row goes on from it.


@struct.dataclass
class Prefix:
  """What a model keeps of Prompts for the rows that go on from them: gradients flow through it."""

  last_QD: jax.Array  # What the token after the prompt is predicted from.
  units: tuple  # The state of each unit of blocks.


@struct.dataclass
class Routing:
  """What the routers of L blocks did with a batch: sums, so that those of its parts add up."""

  load_LE: jax.Array  # fp32; real tokens sent to each expert.
  dropped_L: jax.Array  # fp32; choices, padding's too, that no expert worked on: 0 if all is well.
  loss: jax.Array | None = None  # fp32; the auxiliary loss of each block and real token; if asked for.


@struct.dataclass
class Scores:
  """What a model says of given tokens."""

  logprobs_BT: jax.Array  # fp32; 0 on padding and on the first token of a document.
  entropy_BT: jax.Array  # fp32, nats; of the distribution that logprobs_BT[b, t] is of.
  routing: Routing | None = None  # None where nothing is routed.
  distance_BT: jax.Array | None = None  # fp32, nats; from a teacher, only where it is asked for.


# What the policy predicts tokens from and with (x_BTD, head_DV), and which are wanted -> distance_BT.
DistanceFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# (params, tokens_BT, segment_ids_BT, wanted_BT or None[, DistanceFn or None[, (Prefix, length_Q)]], *,
# temperature=1.0) -> Scores of softmax(logits / temperature); tokens not wanted get 0.
ScoreFn = Callable[..., Scores]
# (params, Prompts) -> (Prefix, Routing or None)
TakeInFn = Callable[[Params, Prompts], tuple[Prefix, Routing | None]]


@struct.dataclass
class Rollout:
  """G completions of each of Q prompts, as sampled and as judged."""

  tokens_QGT: jax.Array  # int32; prompt, completion, tool responses, then padding.
  segment_ids_QGT: jax.Array  # int32; 1 on tokens, 0 on padding.
  loss_mask_QGT: jax.Array  # bool; true on the tokens that the policy chose.
  behaviour_logprobs_QGT: jax.Array  # fp32; under the policy that sampled, of softmax(logits / temperature).
  rewards_QG: jax.Array  # fp32
  valid_QG: jax.Array  # bool; false where there is no verdict, or the sample is filtered out.
  drawn_logprobs_QGT: jax.Array | None = None  # fp32; of the nucleus that was drawn from, where top_p < 1.
  teacher_logprobs_QGT: jax.Array | None = None  # fp32; only when an advantage reads them.
  reference_logprobs_QGT: jax.Array | None = None  # fp32; only when a stage pays a KL.
  # Only when a stage pays its distance from teachers: what they predict each token from, and whose
  # head goes with it; or the tokens that they find likeliest, and how likely.
  teacher_states_QGTD: jax.Array | None = None
  teacher_Q: jax.Array | None = None  # int32
  top_tokens_QGTK: jax.Array | None = None  # int32
  top_logprobs_QGTK: jax.Array | None = None  # fp32


@struct.dataclass
class TrainState:
  """All that an update changes. `step` counts updates of this stage."""

  step: jax.Array  # int32, scalar.
  params: Params
  opt_state: Any
