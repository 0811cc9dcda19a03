"""The rollout engine: prefills each prompt once, and decodes all requests in a fixed number of slots."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh, put, whole
from nemocascade.rollout import intake, loop
from nemocascade.rollout.decoding import Decoding, Layout
from nemocascade.rollout.sampling import Options
from nemocascade.types import Params

NEVER = 2**31 - 1  # Ticks.
CHUNK = 32  # Given tokens that a call of the model takes in for a row; fewer are padded.
TOGETHER = 8  # Rows of a device that take in given tokens together.
PIECE = 8192  # Tokens of a prompt that are prefilled at a time.
NARROWEST = 64  # The smallest width that prompts of any length are padded to.
PLAIN = Options()
# When requests run out, decoding goes on with one slot of SHRINK, but not with fewer than FEWEST on a device. A program
# is compiled for each of these sizes.
SHRINK, FEWEST = 4, 32


class Engine:
  """Prefill and decoding programs for prompts of at most P tokens and sequences of at most T tokens.

  A Decoding serves B requests, G for each prompt, in S slots. A slot that is free takes the next request in the
  jitted loop; the prompt's state is copied into it. The tokens of a request depend on the parameters, the key, its
  row_id and its options alone: not on its slot, nor on the other requests.

  JAX compiles a program again if its arguments have another sharding or none. So parameters and rows are put to
  their shardings before each call; this copies only what is not there yet.

  In several processes all of them make the same calls with the same arguments; only the tokens given to `extend`
  differ. A process reads the rows of its own devices alone (mesh.read_own).

  Args:
    prefill_fn: (params, tokens_BP, length_B, capacity) -> (logits_BV, state).
    step_fn: (weights, state, tokens_B, active_B) -> (state, logits_BV).
    extend_fn: (params, state, tokens_BT, length_B) -> (state, logits_BV): takes in each row's first length_B tokens;
      rows of length 0 stay as they are. By default it calls step_fn for one token after the other.
    axes_fn: state -> a tree like it, with each array's axis of rows; by default all first axes.
    weights_fn: (params, requests of a device) -> the weights of step_fn, made once for all tokens of a call of
      `decode`; by default the params.
    experts_fn: state after a step -> experts_BY of the token that was taken in, to be recorded; prefill_fn and
      extend_fn then also return experts_BTY of theirs. None records nothing.
    prompt_tokens: P.
    total_tokens: T.
    stop_ids: a request is done when it samples one of these tokens.
    piece: longer prompts are prefilled in pieces of so many tokens: the first by prefill_fn, the others by extend_fn.
    mesh: the rows are sharded over its devices; one device by default.
    params_places: the parameters' sharding, or a tree of shardings; replicated by default.

  Attributes:
    start_fn, decode_fn, extend_fn, admit_fn, shrink_fn: the jitted programs; see loop.py and intake.py.
    mesh: the mesh of the rows.
    whole_turns: whether `decode` returns only when the turn of every request has ended.

  Raises:
    UserError: not 0 < prompt_tokens < total_tokens.
  """

  whole_turns = False

  def __init__(
    self,
    prefill_fn: Callable,
    step_fn: Callable,
    extend_fn: Callable | None = None,
    axes_fn: Callable | None = None,
    experts_fn: Callable | None = None,
    *,
    weights_fn: Callable | None = None,
    prompt_tokens: int,
    total_tokens: int,
    stop_ids: Sequence[int] = (11, 2),
    piece: int = PIECE,
    mesh: Mesh | None = None,
    params_places: Any = None,
  ):
    if not 0 < prompt_tokens < total_tokens:
      raise UserError(f"{prompt_tokens=} must be positive and less than {total_tokens=}")
    self.P, self.T, self.stop_ids = prompt_tokens, total_tokens, tuple(stop_ids)
    self.mesh = mesh or make_mesh(1, 1)
    self._params_places = params_places or whole(self.mesh)
    axes = axes_fn or (lambda state: jax.tree.map(lambda _: 0, state))
    weights_fn = weights_fn or (lambda params, rows: params)
    extend_fn = extend_fn or intake.by_steps(step_fn, weights_fn)
    model = loop.Model(intake.by_pieces(prefill_fn, extend_fn, piece), step_fn, extend_fn, axes, experts_fn, weights_fn)
    self.layout = functools.cache(lambda B: Layout(self.mesh, B, axes))
    self.chunk = min(CHUNK, total_tokens)
    self._ready: set = set()  # Decodings whose programs with fewer slots are compiled: (shapes, extends).
    self._extends: set = set()  # Shapes of Decodings for which extend_fn is compiled.
    of = lambda fn, *more: functools.partial(fn, model, self.layout, *more)  # noqa: E731
    self.start_fn = jax.jit(of(loop.start, self.T), static_argnums=(5, 6, 7, 8, 9))
    self.decode_fn = jax.jit(of(loop.decode, self.stop_ids), donate_argnums=1)
    self.extend_fn = jax.jit(of(intake.extend), donate_argnums=1)
    self.admit_fn = jax.jit(of(intake.admit, self.P), donate_argnums=1)
    self.shrink_fn = jax.jit(of(loop.shrink), static_argnums=(3, 4))

  def start(
    self, params: Params, prompts: Sequence[Sequence[int]], G: int, *, width: int | None = None,
    options: Options = PLAIN, slots: int = 0, parked: int = 0, held: bool | np.ndarray = False, likeliest: int = 0,
  ) -> Decoding:  # fmt: skip
    """Prefills each prompt once and returns a Decoding with G requests for each prompt.

    Args:
      width: the prompts' padded length, at most P (the default); each width compiles once.
      options: scalars or arrays [B]. Where they cut off tokens, drawn_logprobs_BT are recorded.
      slots: requests that are decoded at a time; 0 takes as many as requests. It is raised to the next number that
        is sharded like the requests.
      parked: held requests that may give up their slots while they are done and others wait; 0 takes as many as slots.
        It is raised like `slots`.
      held: whether requests keep their state when they are done, to be continued by `extend`; a scalar or [B].
      likeliest: number of likeliest tokens to record for each sampled one.

    Raises:
      UserError: a prompt is empty or longer than `width`.
    """
    width = self.P if width is None else min(width, self.P)
    tokens_QP = np.zeros((len(prompts), width), np.int32)
    for q, prompt in enumerate(prompts):
      if not 0 < len(prompt) <= width:
        raise UserError(f"prompt {q} has {len(prompt)} tokens: allowed are 1 to prompt_tokens={width}")
      tokens_QP[q, : len(prompt)] = prompt
    length_Q, B = np.array([len(prompt) for prompt in prompts], np.int32), len(prompts) * G
    S, options = self.slots_of(B, slots), options.by_row(B)
    held_B = np.array(np.broadcast_to(held, (B,)), bool)
    places, drawn = self.slots_of(B, parked or S) if S < B and held_B.any() else 0, bool(options.cuts.any())
    return self.start_fn(self._placed(params), tokens_QP, length_Q, options, held_B, G, S, drawn, likeliest, places)

  def metrics(self) -> dict[str, float]:
    """What the engine has done beside decoding since the last call."""
    return {}

  def slots_of(self, B: int, wanted: int) -> int:
    """The number of slots of a Decoding of B requests, or of places beside them."""
    layout = self.layout(B)
    return next((S for S in range(wanted or B, B) if layout.divides(S)), B)

  def _placed(self, params: Params) -> Params:
    return jax.device_put(params, self._params_places)

  def decode(
    self, params: Params, d: Decoding, key: jax.Array, ticks: int = NEVER, *, shrinks: bool = True
  ) -> Decoding:
    """Decodes until every request is done, for at most `ticks` tokens each. `d` is donated.

    When few requests are left, the Decoding goes on with fewer slots, if it `shrinks`.

    Arrays of `d` may be numpy arrays of all rows; each process copies those of its own devices.
    """
    params, d, B = self._placed(params), self._put(d), d.known_B.shape[0]
    shards = self.layout(B).shards
    if shrinks:
      self._compile_smaller(params, d, key)
    while True:
      fewer = self._smaller(d) if shrinks else 0
      d, ran_3 = self.decode_fn(params, d, key, np.int32(ticks), np.int32(fewer // shards if fewer else -1))
      if not fewer:
        return d
      ran, live, busy = np.asarray(ran_3).tolist()
      ticks -= ran
      if not busy or ticks == 0:
        return d
      while fewer and fewer // shards >= live:
        d = self._shrunk(d, fewer)
        fewer = self._smaller(d)

  def empty(self, params: Params, requests: int, slots: int, likeliest: int = 0) -> Decoding:
    """A Decoding whose requests are all over, to be replaced by `admit`. It must have fewer slots than requests."""
    options = Options(top_p=0.5)  # So that drawn_logprobs_BT are recorded.
    d = self.start(params, [[0]] * requests, 1, options=options, slots=slots, likeliest=likeliest)
    if d.prompts is None:
      raise UserError(f"{requests} requests need fewer slots than {len(d.row_S)}")
    return d.replace(waiting_B=np.zeros(requests, bool), done_B=np.ones(requests, bool))

  def admit(
    self, params: Params, d: Decoding, prompts: Mapping[int, Sequence[int]], width: int, **fields: Any
  ) -> Decoding:
    """Puts new requests in the place of requests that are over. `d` is donated.

    It is one of `empty`, whose requests are not divided among devices.

    Args:
      prompts: number of the request that is replaced -> its prompt, of 1 to `width` tokens; at most TOGETHER.
      width: each width compiles once.
      fields: limit_B, held_B, row_id_B, order_B and options: arrays with a value for each prompt, in their order.
    """
    R, B = TOGETHER, d.known_B.shape[0]
    tokens_RP, length_R, row_R = np.zeros((R, width), np.int32), np.ones(R, np.int32), np.full(R, B, np.int32)
    for i, (b, prompt) in enumerate(prompts.items()):
      tokens_RP[i, : len(prompt)], length_R[i], row_R[i] = prompt, len(prompt), b
    filled = jax.tree.map(lambda a: np.pad(a, (0, R - len(a))), fields)
    return self.admit_fn(self._placed(params), self._put(d), tokens_RP, length_R, row_R, filled)

  def _smaller(self, d: Decoding) -> int:
    """The next smaller number of slots that the Decoding may go on with, or 0."""
    part, layout = d.row_S.shape[0] // SHRINK, self.layout(d.known_B.shape[0])
    return part if part >= FEWEST * layout.shards and layout.divides(part) else 0

  def _shrunk(self, d: Decoding, S: int) -> Decoding:
    """`d` with S slots. The arrays of its requests are those of `d`."""
    row_S, logits_SV, state = self.shrink_fn(d.row_S, d.logits_SV, d.state, d.known_B.shape[0], S)
    return d.replace(row_S=row_S, logits_SV=logits_SV, state=state)

  def _compile_smaller(self, params: Params, d: Decoding, key: jax.Array) -> None:
    """Compiles the programs with fewer slots at the first call with these shapes, so that none compiles later."""
    extends = (shapes := _shapes(d)) in self._extends
    if (shapes, extends) in self._ready:
      return
    self._ready.add((shapes, extends))
    places = self.layout(d.known_B.shape[0]).places(d)
    while fewer := self._smaller(d):
      own = jax.device_put(self._shrunk(d, fewer), places, may_alias=False)  # A copy, because it is donated.
      d, _ = self.decode_fn(params, own, key, np.int32(0), np.int32(-1))
      if extends:
        d = self.extend(params, d, {})

  def extend(self, params: Params, d: Decoding, given: Mapping[int, Sequence[int]]) -> Decoding:
    """Appends tokens (tool results) to requests that are done and held, and lets them go on. `d` is donated.

    A request is left unchanged if its limit does not leave room for the tokens and one more.

    Args:
      given: number of the request -> tokens. All processes give the same requests and numbers of tokens; which
        tokens matters only for the rows of a process's own devices. If it is empty, the program is compiled, and
        nothing changes; called before the first `decode`, this compiles it for fewer slots too.
    """
    layout, params, d = self.layout(d.known_B.shape[0]), self._placed(params), self._put(d)
    own, r = d.known_B.shape[0] // layout.shards, min(TOGETHER, d.known_B.shape[0] // layout.shards)
    left: list[list[tuple[int, list[int]]]] = [[] for _ in range(layout.shards)]
    for b, tokens in given.items():
      left[b // own].append((b % own, list(tokens)))
    place, compiled = NamedSharding(self.mesh, layout.cut), _shapes(d) in self._extends
    self._extends.add(_shapes(d))
    while any(left) or not compiled:
      compiled = True
      row_R = np.full((layout.shards, r), own, np.int32)
      tokens_RW = np.zeros((layout.shards, r, self.chunk), np.int32)
      length_R, total_R = np.zeros_like(row_R), np.zeros_like(row_R)
      for shard, rows in enumerate(left):
        for i, (b, tokens) in enumerate(rows[:r]):
          now = tokens[: self.chunk]
          row_R[shard, i], length_R[shard, i], total_R[shard, i] = b, len(now), len(tokens)
          tokens_RW[shard, i, : len(now)] = now
        rest = [(b, tokens[self.chunk :]) for b, tokens in rows[:r]]
        left[shard] = [(b, tokens) for b, tokens in rest if tokens] + rows[r:]
      args = (a.reshape(layout.shards * r, *a.shape[2:]) for a in (row_R, tokens_RW, length_R, total_R))
      d = self.extend_fn(params, d, *(put(a, place) for a in args))
    return d

  def _put(self, d: Decoding) -> Decoding:
    return jax.tree.map(put, d, self.layout(d.known_B.shape[0]).places(d))


def width_of(tokens: int) -> int:
  """A width for a prompt of so many tokens: a power of 2, so that few widths are compiled."""
  return max(NARROWEST, 1 << (tokens - 1).bit_length())


def _shapes(d: Decoding) -> tuple:
  return jax.tree.structure(d), tuple((a.shape, a.dtype) for a in jax.tree.leaves(d))
