"""Prefill once a prompt, then one jitted loop that decodes all rows until each is done."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from nemocascade.errors import UserError
from nemocascade.mesh import by_rows, constrain_batch, make_mesh, whole
from nemocascade.rollout.sampling import row_keys, sample
from nemocascade.types import Params


@struct.dataclass
class Decoding:
  """B rows on their way. A token is known when given or sampled, taken in when the model saw it."""

  state: Any  # The model's decode state.
  logits_BV: jax.Array  # fp32; of the token after the last one taken in.
  tokens_BT: jax.Array  # int32
  sampled_BT: jax.Array  # bool; chosen by the policy.
  behaviour_logprobs_BT: jax.Array  # fp32; of softmax(logits / temperature), 0 on given tokens.
  known_B: jax.Array  # int32
  taken_B: jax.Array  # int32
  limit_B: jax.Array  # int32; tokens that may be known at most.
  done_B: jax.Array  # bool
  row_id_B: jax.Array  # int32; names the row's random numbers.
  drawn_logprobs_BT: jax.Array | None = None  # fp32; of the nucleus drawn from, only if asked for at the start.


class Engine:
  """Programs for prompts of at most P tokens and sequences of at most T.

  Args:
    prefill_fn: (params, tokens_BP, length_B, capacity) -> (logits_BV, state).
    step_fn: (params, state, tokens_B, active_B) -> (state, logits_BV).
    repeat_fn: (state, G) -> state of each row G times, side by side.
    mesh: whose devices share the rows; one device by default.
    params_places: the parameters' sharding in it, or a tree of theirs; whole on every device by default.

  Attributes: start_fn and decode_fn, the two jitted programs. JAX compiles a program again for arguments that lie
  elsewhere, or that are not bound to a device yet: so parameters and rows are put where they belong before
  each call, which copies nothing that lies there.
  """

  def __init__(
    self,
    prefill_fn: Callable,
    step_fn: Callable,
    repeat_fn: Callable,
    *,
    prompt_tokens: int,
    total_tokens: int,
    stop_ids: Sequence[int] = (11, 2),
    mesh: Mesh | None = None,
    params_places: Any = None,
  ):
    if not 0 < prompt_tokens < total_tokens:
      raise UserError(f"{prompt_tokens=} must be positive and less than {total_tokens=}")
    self.P, self.T, self.stop_ids = prompt_tokens, total_tokens, tuple(stop_ids)
    self._mesh = mesh or make_mesh(1, 1)
    self._params_places = params_places or whole(self._mesh)
    place_fn = functools.partial(constrain_batch, mesh=self._mesh)
    self.start_fn = jax.jit(
      functools.partial(_start, prefill_fn, repeat_fn, place_fn, self.T), static_argnums=(3, 4)
    )
    self.decode_fn = jax.jit(
      functools.partial(_decode, step_fn, place_fn, self.stop_ids), donate_argnums=1
    )

  def start(
    self, params: Params, prompts: Sequence[Sequence[int]], G: int, *, width: int | None = None,
    drawn: bool = False,
  ) -> Decoding:  # fmt: skip
    """Takes in each prompt once, for G rows of it.

    Args:
      width: what prompts are padded to where that is less than P; each width compiles once.
      drawn: record drawn_logprobs_BT too, which differ from behaviour_logprobs_BT where top_p < 1.

    Raises:
      UserError: a prompt is empty or too long.
    """
    width = self.P if width is None else min(width, self.P)
    tokens_QP = np.zeros((len(prompts), width), np.int32)
    for q, prompt in enumerate(prompts):
      if not 0 < len(prompt) <= width:
        raise UserError(
          f"prompt {q} has {len(prompt)} tokens: allowed are 1 to prompt_tokens={width}"
        )
      tokens_QP[q, : len(prompt)] = prompt
    length_Q = np.array([len(prompt) for prompt in prompts], np.int32)
    return self.start_fn(self._placed(params), tokens_QP, length_Q, G, drawn)

  def _placed(self, params: Params) -> Params:
    return jax.device_put(params, self._params_places)

  def decode(self, params: Params, d: Decoding, key: jax.Array, temperature: float, top_p: float):
    """Every row goes on until it stops or meets its limit. `d` is used up; its arrays may be the host's."""
    d = jax.device_put(d, by_rows(d, d.known_B.shape[0], self._mesh))
    return self.decode_fn(self._placed(params), d, key, np.float32(temperature), np.float32(top_p))

  def extend(self, d: Decoding, given: Mapping[int, Sequence[int]]) -> Decoding:
    """Gives tokens to rows (tool results) and opens them again; all rows not named stay done.

    A row without room for its tokens and one more stays done, as it was.
    """
    tokens_BT, known_B = np.array(d.tokens_BT), np.array(d.known_B)
    done_B, limit_B = np.array(d.done_B), np.asarray(d.limit_B)
    for b, tokens in given.items():
      end = known_B[b] + len(tokens)
      if end < limit_B[b]:
        tokens_BT[b, known_B[b] : end] = tokens
        known_B[b], done_B[b] = end, False
    return d.replace(tokens_BT=tokens_BT, known_B=known_B, done_B=done_B)


def _start(
  prefill_fn, repeat_fn, place_fn, T: int, params, tokens_QP, length_Q, G: int, drawn: bool
) -> Decoding:
  logits_QV, state = prefill_fn(params, tokens_QP, length_Q, T)
  B = tokens_QP.shape[0] * G
  repeat = lambda a: jnp.repeat(a, G, axis=0)  # noqa: E731
  tokens_BT = jnp.pad(repeat(tokens_QP), ((0, 0), (0, T - tokens_QP.shape[1])))
  d = Decoding(
    state=repeat_fn(state, G),
    logits_BV=repeat(logits_QV),
    tokens_BT=tokens_BT,
    sampled_BT=jnp.zeros((B, T), bool),
    behaviour_logprobs_BT=jnp.zeros((B, T), jnp.float32),
    known_B=repeat(length_Q),
    # A copy: the two are donated together later.
    taken_B=repeat(length_Q) + 0,
    limit_B=jnp.full((B,), T, jnp.int32),
    done_B=jnp.zeros((B,), bool),
    row_id_B=jnp.arange(B, dtype=jnp.int32),
    drawn_logprobs_BT=jnp.zeros((B, T), jnp.float32) if drawn else None,
  )
  return place_fn(d, B)


def _decode(step_fn, place_fn, stop_ids, params, d: Decoding, key, temperature, top_p) -> Decoding:
  B = d.known_B.shape[0]
  put_row = jax.vmap(lambda a_T, place, value: a_T.at[place].set(value, mode="drop"))

  def tick(d: Decoding) -> Decoding:
    """Every open row takes in one more token: the next given one, or else one it samples now."""
    place_B = d.taken_B
    new_B = ~d.done_B & (place_B == d.known_B)
    key_B = row_keys(key, d.row_id_B, place_B)
    token_B, logprobs_B, drawn_B = sample(key_B, d.logits_BV, temperature=temperature, top_p=top_p)

    def put(a_BT, value_B):  # Where a token was sampled; out of range is dropped.
      return put_row(a_BT, jnp.where(new_B, place_B, a_BT.shape[1]), value_B)

    tokens_BT = put(d.tokens_BT, token_B)
    known_B = d.known_B + new_B.astype(jnp.int32)
    here_B = jnp.take_along_axis(
      tokens_BT, jnp.minimum(place_B, tokens_BT.shape[1] - 1)[:, None], axis=1
    )[:, 0]
    stop_B = new_B & jnp.any(here_B[:, None] == jnp.array(stop_ids)[None], axis=1)
    active_B = ~d.done_B
    # A sampled stop token is taken in too: a tool's result may follow it.
    state, logits_BV = step_fn(params, d.state, here_B, active_B)
    d = d.replace(
      state=state,
      logits_BV=jnp.where(active_B[:, None], logits_BV, d.logits_BV),
      tokens_BT=tokens_BT,
      sampled_BT=put(d.sampled_BT, new_B),
      behaviour_logprobs_BT=put(d.behaviour_logprobs_BT, logprobs_B),
      known_B=known_B,
      taken_B=d.taken_B + active_B.astype(jnp.int32),
      done_B=d.done_B | stop_B | (new_B & (known_B >= d.limit_B)),
      drawn_logprobs_BT=None if d.drawn_logprobs_BT is None else put(d.drawn_logprobs_BT, drawn_B),
    )
    return place_fn(d, B)

  return jax.lax.while_loop(lambda d: jnp.any(~d.done_B), tick, d)
