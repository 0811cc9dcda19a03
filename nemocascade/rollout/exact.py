"""Sampling whose tokens and log-probabilities are those of the trainer's own program.

The engine drafts and the trainer's forward pass verifies, as in speculative decoding (Leviathan et al., 2023, arXiv
2211.17192). The random numbers of a token depend on the key, the request and the token's place alone, so the token that
the trainer's logits draw is a function of these logits. At the first place of a request where it is not the drafted one
it is put in, and the request is drafted again from there, until no token differs. The result is what a sampler would
have drawn that ran the trainer's forward pass for every token; what the draft was changes nothing of it.

A request of several turns is verified at the end of each turn, before tools answer it. Their results are given tokens:
they are neither drawn nor verified.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemocascade.kernels.product import product
from nemocascade.kernels.token_chunks import over_wanted
from nemocascade.rollout.decoding import Decoding, fields
from nemocascade.rollout.engine import NEVER, Engine
from nemocascade.rollout.sampling import Options, row_keys, sample
from nemocascade.types import Params

READ = (
  "tokens_BT", "sampled_BT", "behaviour_logprobs_BT", "known_B", "limit_B", "done_B", "failed_B", "row_id_B", "options",
  "drawn_logprobs_BT", "experts_BTY",
)  # fmt: skip
KEPT = ("held_B", "limit_B", "row_id_B", "tokens_BT", "sampled_BT", "behaviour_logprobs_BT", "known_B", "done_B",
  "failed_B", "drawn_logprobs_BT", "counts")  # fmt: skip


class Weights(NamedTuple):
  """The parameters of an ExactEngine."""

  sampler: Params  # Those that draft.
  trainer: Params  # Those that verify.


def draw(x_BTD, head_DV, wanted_BT, key, row_id_B, options: Options):
  """(tokens_BT int32, drawn_logprobs_BT fp32) that the logits x @ head draw at wanted places; 0 elsewhere.

  Args:
    x_BTD: the state from which token t is predicted.
    key, row_id_B, options: as in decoding; options are arrays [B].
  """
  of_token = lambda a_B: jnp.broadcast_to(a_B[:, None], wanted_BT.shape)
  place_BT = jax.lax.broadcasted_iota(jnp.int32, wanted_BT.shape, 1)
  leaves, tree = jax.tree.flatten(options)

  def part(x_ND, row_id_N, place_N, *options_N):
    logits_NV = product(x_ND, head_DV, 1, jnp.float32)
    chosen = jax.tree.unflatten(tree, options_N)
    tokens_N, _, drawn_N = sample(row_keys(key, row_id_N, place_N), logits_NV, chosen)
    return tokens_N, drawn_N

  return over_wanted(part, (x_BTD, of_token(row_id_B), place_BT, *map(of_token, leaves)), wanted_BT)


def accept(verify: Callable, stop_ids: tuple[int, ...], params: Params, f: dict[str, Any], key):
  """Accepts each request's tokens up to the first one that the trainer draws otherwise, and puts the trainer's there.

  Args:
    verify: see ExactEngine.
    f: the fields READ of a Decoding whose requests are all done.

  Returns:
    (the fields that change, int32 [3]: requests with another token, sampled tokens, tokens that are no longer accepted)
  """
  tokens_BT, known_B = f["tokens_BT"], f["known_B"]
  place_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
  real_BT = place_BT < known_B[:, None]
  wanted_BT = f["sampled_BT"] & real_BT
  logprobs_BT, own_BT, drawn_BT = verify(
    params, jnp.where(real_BT, tokens_BT, 0), real_BT.astype(jnp.int32), wanted_BT, f.get("experts_BTY"), key,
    f["row_id_B"], f["options"],
  )  # fmt: skip
  lost_BT = wanted_BT & ~jnp.isfinite(logprobs_BT)
  other_BT = lost_BT | (wanted_BT & (own_BT != tokens_BT))
  changed_B, first_B = jnp.any(other_BT, axis=1), jnp.argmax(other_BT, axis=1).astype(jnp.int32)
  at_first = lambda a_BT: jnp.take_along_axis(a_BT, first_B[:, None], axis=1)[:, 0]
  token_B, lost_B = at_first(own_BT), changed_B & at_first(lost_BT)
  kept_B = jnp.where(changed_B, first_B + ~lost_B, known_B)
  stop_B = jnp.any(token_B[:, None] == jnp.array(stop_ids, jnp.int32)[None], axis=1) | (kept_B >= f["limit_B"])
  kept_BT = wanted_BT & (place_BT < kept_B[:, None])
  found = dict(
    tokens_BT=jnp.where(changed_B[:, None] & (place_BT == first_B[:, None]), token_B[:, None], tokens_BT),
    sampled_BT=kept_BT,
    behaviour_logprobs_BT=jnp.where(kept_BT, logprobs_BT, 0.0),
    known_B=kept_B,
    done_B=jnp.where(changed_B, stop_B | lost_B, f["done_B"]),
    failed_B=jnp.where(changed_B, lost_B, f["failed_B"]),
  )
  if "drawn_logprobs_BT" in f:
    found["drawn_logprobs_BT"] = jnp.where(kept_BT, drawn_BT, 0.0)
  count = lambda a: jnp.sum(a, dtype=jnp.int32)
  return found, jnp.stack([count(changed_B), count(kept_BT), count(jnp.where(changed_B, known_B - first_B, 0))])


class ExactEngine(Engine):
  """An Engine whose samples are those of the trainer's program. Its methods take Weights as their parameters.

  All requests have a slot of their own.

  Args:
    verify_fn: (trainer's params, tokens_BT, segment_ids_BT, wanted_BT, experts_BTY or None, key, row_id_B, options) ->
      (logprobs_BT of the wanted tokens, tokens_BT that the logits draw there, their drawn_logprobs_BT). Results at a
      token must depend on the tokens of its row up to it alone, to the bit.
    compiler_options: those that the trainer's step is compiled with.
  """

  whole_turns = True

  def __init__(self, *args: Any, verify_fn: Callable, compiler_options: Mapping[str, Any] | None = None, **how: Any):
    super().__init__(*args, **how)

    def accepts(params: Params, f: dict[str, Any], key):
      found, counts_3 = accept(verify_fn, self.stop_ids, params, f, key)
      layout = self.layout(len(f["known_B"]))
      return layout.by_request(found), layout.everywhere(counts_3)

    self.accept_fn = jax.jit(accepts, compiler_options=dict(compiler_options or {}))
    self._spent = dict.fromkeys(("rounds", "changed", "again", "sampled", "seconds"), 0.0)

  def decode(
    self, params: Any, d: Decoding, key: jax.Array, ticks: int = NEVER, *, shrinks: bool = True
  ) -> Decoding:  # fmt: skip
    """Decodes until the turn of every request has ended with the trainer's tokens, whatever `ticks` is. `d` is donated.

    Raises:
      RuntimeError: the trainer's program gives a token other results when later tokens change.
    """
    before = int(d.counts.ticks)
    d = super().decode(params, d, key, shrinks=shrinks)
    if int(d.counts.ticks) == before:  # Nothing new was sampled.
      return d
    began, spent = time.monotonic(), self._spent
    for _ in range(self.T):  # A round accepts at least one token more of each request that it drafts.
      found, counts_3 = self.accept_fn(params.trainer, fields(d, READ), key)
      d = d.replace(**found)
      changed, sampled, again = np.asarray(counts_3).tolist()
      spent["rounds"], spent["sampled"] = spent["rounds"] + 1, sampled
      spent["changed"], spent["again"] = spent["changed"] + changed, spent["again"] + again
      if not changed:
        spent["seconds"] += time.monotonic() - began
        return d
      d = super().decode(params, self._from_tokens(params, d), key, shrinks=shrinks)
    raise RuntimeError(f"sampling with rollout.exact=True does not settle in {self.T} rounds")

  def _from_tokens(self, params: Any, d: Decoding) -> Decoding:
    """`d` with the states of all requests made anew from their tokens."""
    B, k = d.known_B.shape[0], 0 if d.likeliest_tokens_BTK is None else d.likeliest_tokens_BTK.shape[2]
    drawn = d.drawn_logprobs_BT is not None
    fresh = self.start_fn(self._placed(params), d.tokens_BT, d.known_B, d.options, d.held_B, 1, B, drawn, k, 0)
    return fresh.replace(**fields(d, KEPT))

  def _placed(self, params: Any) -> Params:
    return super()._placed(params.sampler if isinstance(params, Weights) else params)

  def metrics(self) -> dict[str, float]:
    """What verification has cost since the last call."""
    s, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
    share = lambda part: part / max(s["sampled"], 1.0)
    return {
      "exact/rounds": s["rounds"],
      "exact/changed": share(s["changed"]),
      "exact/again": share(s["again"]),
      "time/exact": s["seconds"],
    }
