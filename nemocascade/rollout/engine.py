"""The rollout engine: prefills each prompt once, then decodes all rows in one jitted loop."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from nemocascade.errors import UserError
from nemocascade.mesh import by_rows, constrain_batch, make_mesh, own_rows, put_own, read_own, whole
from nemocascade.rollout.sampling import row_keys, sample
from nemocascade.types import Params


class Decoding(struct.PyTreeNode):
  """The state of decoding B rows.

  A token is known once it was given or sampled. It is taken in once the model has processed it.
  """

  state: Any  # The model's decode state.
  logits_BV: jax.Array  # fp32; for the token after the last one taken in.
  tokens_BT: jax.Array  # int32
  sampled_BT: jax.Array  # bool; true on tokens that the policy sampled.
  behaviour_logprobs_BT: jax.Array  # fp32; under softmax(logits / temperature), 0 on given tokens.
  known_B: jax.Array  # int32; number of known tokens.
  taken_B: jax.Array  # int32; number of tokens taken in.
  limit_B: jax.Array  # int32; sampling stops at this number of known tokens.
  done_B: jax.Array  # bool; the row has stopped or met its limit.
  row_id_B: jax.Array  # int32; selects the row's random numbers.
  drawn_logprobs_BT: jax.Array | None = None  # fp32; under the top_p nucleus; None unless start(drawn=True).


class Engine:
  """Prefill and decoding programs for prompts of at most P tokens and sequences of at most T tokens.

  JAX compiles a program again if its arguments have another sharding or none. So parameters and rows are put to
  their shardings before each call; this copies only what is not there yet.

  In several processes all of them make the same calls with the same arguments; only the tokens given to `extend`
  differ. A process reads the rows of its own devices alone (mesh.read_own).

  Args:
    prefill_fn: (params, tokens_BP, length_B, capacity) -> (logits_BV, state).
    step_fn: (params, state, tokens_B, active_B) -> (state, logits_BV).
    repeat_fn: (state, G) -> the state with each row G times, the copies adjacent.
    prompt_tokens: P.
    total_tokens: T.
    stop_ids: a row is done when it samples one of these tokens.
    mesh: the rows are sharded over its devices; one device by default.
    params_places: the parameters' sharding, or a tree of shardings; replicated by default.

  Attributes:
    start_fn, decode_fn: the two jitted programs.
    mesh: the mesh of the rows.

  Raises:
    UserError: not 0 < prompt_tokens < total_tokens.
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
    self.mesh = mesh or make_mesh(1, 1)
    self._params_places = params_places or whole(self.mesh)
    place_fn = functools.partial(constrain_batch, mesh=self.mesh)
    self.start_fn = jax.jit(functools.partial(_start, prefill_fn, repeat_fn, place_fn, self.T), static_argnums=(3, 4))
    self.decode_fn = jax.jit(functools.partial(_decode, step_fn, place_fn, self.stop_ids), donate_argnums=1)

  def start(
    self, params: Params, prompts: Sequence[Sequence[int]], G: int, *, width: int | None = None,
    drawn: bool = False,
  ) -> Decoding:  # fmt: skip
    """Prefills each prompt once and returns a Decoding with G rows for each prompt.

    Args:
      width: the prompts' padded length, at most P (the default); each width compiles once.
      drawn: whether to record drawn_logprobs_BT, which differ from behaviour_logprobs_BT if top_p < 1.

    Raises:
      UserError: a prompt is empty or longer than `width`.
    """
    width = self.P if width is None else min(width, self.P)
    tokens_QP = np.zeros((len(prompts), width), np.int32)
    for q, prompt in enumerate(prompts):
      if not 0 < len(prompt) <= width:
        raise UserError(f"prompt {q} has {len(prompt)} tokens: allowed are 1 to prompt_tokens={width}")
      tokens_QP[q, : len(prompt)] = prompt
    length_Q = np.array([len(prompt) for prompt in prompts], np.int32)
    return self.start_fn(self._placed(params), tokens_QP, length_Q, G, drawn)

  def _placed(self, params: Params) -> Params:
    return jax.device_put(params, self._params_places)

  def decode(self, params: Params, d: Decoding, key: jax.Array, temperature: float, top_p: float):
    """Decodes every row until it stops or meets its limit. `d` is donated.

    Arrays of `d` may be numpy arrays of all rows, the same in every process.
    """
    d = jax.tree.map(_put, d, by_rows(d, d.known_B.shape[0], self.mesh))
    return self.decode_fn(self._placed(params), d, key, np.float32(temperature), np.float32(top_p))

  def extend(self, d: Decoding, given: Mapping[int, Sequence[int]]) -> Decoding:
    """Appends tokens (tool results) to rows and marks these rows as not done; other rows are unchanged.

    A row is left unchanged if its limit does not leave room for the tokens and one more.

    Args:
      given: row number -> tokens; only rows of this process's devices. A row that several processes hold gets the
        same tokens in all of them.
    """
    B = d.known_B.shape[0]
    own = own_rows(self.mesh, B)
    tokens_BT, known_B, done_B, limit_B = (
      a[own] if isinstance(a, np.ndarray) else read_own(a)[1] for a in (d.tokens_BT, d.known_B, d.done_B, d.limit_B)
    )
    place = {b: i for i, b in enumerate(own)}
    for b, tokens in given.items():
      i = place[b]
      end = known_B[i] + len(tokens)
      if end < limit_B[i]:
        tokens_BT[i, known_B[i] : end] = tokens
        known_B[i], done_B[i] = end, False
    tokens_BT, known_B, done_B = put_own((tokens_BT, known_B, done_B), self.mesh, B)
    return d.replace(tokens_BT=tokens_BT, known_B=known_B, done_B=done_B)


def _put(array: jax.Array | np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
  """The array on the mesh. A numpy array has all rows in every process; each process copies those of its devices."""
  if isinstance(array, jax.Array):
    return jax.device_put(array, place)
  return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def _start(prefill_fn, repeat_fn, place_fn, T: int, params, tokens_QP, length_Q, G: int, drawn: bool) -> Decoding:
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
    # The addition makes a copy: known_B and taken_B are donated later and must not share a buffer.
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
    """Each row that is not done takes in one more token: the next given one, or one that it samples now."""
    place_B = d.taken_B
    new_B = ~d.done_B & (place_B == d.known_B)
    key_B = row_keys(key, d.row_id_B, place_B)
    token_B, logprobs_B, drawn_B = sample(key_B, d.logits_BV, temperature=temperature, top_p=top_p)

    def put(a_BT, value_B):  # Rows that did not sample a token get the index T, which mode="drop" ignores.
      return put_row(a_BT, jnp.where(new_B, place_B, a_BT.shape[1]), value_B)

    tokens_BT = put(d.tokens_BT, token_B)
    known_B = d.known_B + new_B.astype(jnp.int32)
    here_B = jnp.take_along_axis(tokens_BT, jnp.minimum(place_B, tokens_BT.shape[1] - 1)[:, None], axis=1)[:, 0]
    stop_B = new_B & jnp.any(here_B[:, None] == jnp.array(stop_ids)[None], axis=1)
    active_B = ~d.done_B
    # A sampled stop token is taken in too, because a tool's result may follow it.
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
