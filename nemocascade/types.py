"""The pytrees that modules exchange, and the letters of array shapes.

  B rows       T tokens     S key tokens   D width       V vocabulary
  K kv heads   R queries per kv head       H head width
  M ssm heads  P channels per ssm head     N ssm state   U ssm groups   W conv taps
  E experts    X experts per token         F hidden width of an expert or MLP
  Q prompts    G completions of a prompt   L blocks of one kind
  Y = L x X, a token's experts in all MoE blocks, block by block

The name of an array ends in its shape: `logprobs_QGT[q, g, t]`. A `1` is an axis of size 1.
Entry t of a per-token array belongs to token t: `logprobs_BT[b, t]` is log p(token t | tokens before t).
The first token of a document has no log-probability.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray  # On devices, or on the host.
Params = Any  # A pytree of arrays, unboxed (no partitioning metadata).
Metrics = dict[str, jax.Array]  # "part/quantity" -> scalar.


class Batch(struct.PyTreeNode):
  """Documents packed into rows, for SFT and for scoring."""

  tokens_BT: Array  # int32
  segment_ids_BT: Array  # int32; documents of a row are 1, 2, ...; 0 is padding.
  loss_mask_BT: Array  # bool; true on the tokens that are trained on.


class Prompts(struct.PyTreeNode):
  """Q prompts that B rows continue. The B // Q rows of a prompt are adjacent."""

  tokens_QP: Array  # int32; padded at the end.
  length_Q: Array  # int32; 0 if no row continues the prompt.
  experts_QPY: Array | None = None  # The sampler's experts, as in Rollout.


class Prefix(struct.PyTreeNode):
  """The model's state after Prompts, from which the rows continue. Gradients flow through it."""

  last_QD: jax.Array  # The last token's hidden state after the final norm; it predicts the next token.
  units: tuple  # The state of each unit of blocks.


class Routing(struct.PyTreeNode):
  """Statistics of the routers of L blocks over a batch. All but the experts are sums: those of its parts add up."""

  load_LE: jax.Array  # fp32; number of real tokens sent to each expert.
  dropped_L: jax.Array  # fp32; choices, padding's included, that no expert worked on: 0 if all is well.
  loss: jax.Array | None = None  # fp32; balance loss summed over blocks and real tokens, if computed.
  # fp32; choices of real tokens that the sampler recorded, and those of them that this router makes too. None if
  # no record was given.
  recorded_L: jax.Array | None = None
  agreed_L: jax.Array | None = None
  experts_LBTX: jax.Array | None = None  # The choices, as in Rollout; only if the config has router_record.


class Scores(struct.PyTreeNode):
  """A model's scores of given tokens."""

  logprobs_BT: jax.Array  # fp32; 0 on padding and on the first token of a document.
  entropy_BT: jax.Array  # fp32, nats; entropy of the distribution of token t.
  routing: Routing | None = None  # None if the model has no router.
  distance_BT: jax.Array | None = None  # fp32, nats; KL to a teacher; None unless a DistanceFn was given.
  normalizer_BT: jax.Array | None = None  # fp32, nats; logarithm of the softmax's denominator; 0 as logprobs_BT.


# (x_BTD, head_DV, wanted_BT, on_own) -> distance_BT of the rows' own tokens, without those that the model padded them
# with. The policy's logits are x_BTD @ head_DV. on_own(fn, shared=positions of arguments without rows) wraps a function of
# arrays [B, T, ...], so that each device applies it to the tokens that it holds.
DistanceFn = Callable[[jax.Array, jax.Array, jax.Array, Callable[..., Callable]], jax.Array]
# (params, tokens_BT, segment_ids_BT, wanted_BT or None[, DistanceFn or None[, after=(Prefix, length_Q)]], *,
# temperature=1.0[, experts=experts_BTY]) -> Scores under softmax(logits / temperature); tokens that are not wanted
# get 0. `experts` are the sampler's: the routers take them instead of their own choice, or compare both.
ScoreFn = Callable[..., Scores]
# (params, Prompts) -> (Prefix, Routing or None)
TakeInFn = Callable[[Params, Prompts], tuple[Prefix, Routing | None]]


class Rollout(struct.PyTreeNode):
  """G completions of each of Q prompts, with what the sampler recorded and how they were judged."""

  tokens_QGT: Array  # int32; prompt, completion, tool responses, then padding.
  segment_ids_QGT: Array  # int32; 1 on tokens, 0 on padding.
  loss_mask_QGT: Array  # bool; true on the tokens that the policy sampled.
  behaviour_logprobs_QGT: Array  # fp32; the sampler's, under softmax(logits / temperature).
  rewards_QG: Array  # fp32
  valid_QG: Array  # bool; false if the sample has no verdict or is filtered out.
  drawn_logprobs_QGT: Array | None = None  # fp32; the sampler's, under the top_p nucleus, if top_p < 1.
  # uint8 or uint16; number + 1 of each expert that the sampler's routers chose, 0 where there is no record. None
  # unless the sampler records.
  experts_QGTY: Array | None = None
  teacher_logprobs_QGT: Array | None = None  # fp32; only if an advantage reads them.
  reference_logprobs_QGT: Array | None = None  # fp32; only if the loss has a KL term.
  # Only if the loss has a distance from teachers: either the teacher's hidden states (entry t predicts token t)
  # and the index of its head, or its K likeliest tokens at t and their log-probabilities.
  teacher_states_QGTD: Array | None = None
  teacher_Q: Array | None = None  # int32
  top_tokens_QGTK: Array | None = None  # int32
  top_logprobs_QGTK: Array | None = None  # fp32
  # Signals without a field of their own (runtime/signals.py), for advantages: name -> [Q, ...].
  signals: dict[str, Array] = struct.field(default_factory=dict)


class TrainState(struct.PyTreeNode):
  """The training state: all that an update changes."""

  step: jax.Array  # int32, scalar; updates of this stage so far, skipped ones included.
  params: Params
  opt_state: Any
