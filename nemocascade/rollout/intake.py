"""The programs of the engine that take tokens in: results of tools, and prompts of new requests."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nemocascade.rollout.decoding import Decoding, Layout, Pool, at, put_rows, take_rows
from nemocascade.rollout.loop import Model
from nemocascade.types import Params


def by_steps(step_fn: Callable, weights_fn: Callable) -> Callable:
  """An `extend` function that takes in the tokens one by one."""

  def extend(params, state, tokens_BT, length_B):
    weights = weights_fn(params, len(tokens_BT))

    def step(carry, x):
      (state, logits_BV), (t, tokens_B) = carry, x
      active_B = t < length_B
      state, new_BV = step_fn(weights, state, tokens_B, active_B)
      return (state, jnp.where(active_B[:, None], new_BV, logits_BV)), None

    shape = jax.eval_shape(step_fn, weights, state, tokens_BT[:, 0], length_B > 0)[1]
    places_T = jnp.arange(tokens_BT.shape[1])
    return jax.lax.scan(step, (state, jnp.zeros(shape.shape, shape.dtype)), (places_T, tokens_BT.T))[0]

  return extend


def by_pieces(prefill_fn: Callable, extend_fn: Callable, size: int) -> Callable:
  """A `prefill` function that takes in prompts of more than `size` tokens in pieces of so many.

  Its memory beside the state does then not grow with their length. Pieces in which no row has tokens are skipped.
  """

  def prefill(params, tokens_QP, length_Q, capacity):
    P = tokens_QP.shape[1]
    if P <= size:
      return prefill_fn(params, tokens_QP, length_Q, capacity)
    tokens_QP = jnp.pad(tokens_QP, ((0, 0), (0, -P % size)))
    first = prefill_fn(params, tokens_QP[:, :size], jnp.minimum(length_Q, size), capacity)
    room = lambda a_QTY: jnp.pad(a_QTY, ((0, 0), (0, tokens_QP.shape[1] - size), (0, 0)))

    def take_in(i, carry):
      logits_QV, state, *experts = carry
      here_Q = jnp.clip(length_Q - i * size, 0, size)
      piece_QT = jax.lax.dynamic_slice_in_dim(tokens_QP, i * size, size, axis=1)
      state, new_QV, *of_piece = extend_fn(params, state, piece_QT, here_Q)
      put = lambda all_QPY, new_QTY: jax.lax.dynamic_update_slice_in_dim(all_QPY, new_QTY, i * size, axis=1)
      return jnp.where((here_Q > 0)[:, None], new_QV, logits_QV), state, *map(put, experts, of_piece)

    carry = *first[:2], *map(room, first[2:])
    logits_QV, state, *experts = jax.lax.fori_loop(1, -(-jnp.max(length_Q) // size), take_in, carry)
    return logits_QV, state, *(a_QPY[:, :P] for a_QPY in experts)

  return prefill


def admit(
  model: Model, layout_of: Callable[[int], Layout], places: int, params: Params, d: Decoding, tokens_RP, length_R,
  row_R, fields_R,
) -> Decoding:  # fmt: skip
  """Puts R new requests in the place of requests that are over; they wait for a slot.

  Args:
    places: those of the key-value caches of the prompts of `d`.
    row_R: the requests that are replaced; a number that does not exist is ignored.
    fields_R: name of a field of d -> its values for the new requests.
  """
  layout, (R, P) = layout_of(d.known_B.shape[0]), tokens_RP.shape
  assert d.prompts is not None and d.experts_BTY is None  # Requests that come later are not recorded.
  logits_RV, state, *_ = model.prefill(params, tokens_RP, length_R, places)
  axes, of_state, cut = model.axes(state), layout.of_state(state), layout.cut
  fields_R = fields_R | {
    "tokens_BT": jnp.pad(tokens_RP, ((0, 0), (0, d.tokens_BT.shape[1] - P))), "known_B": length_R, "prompt_B": row_R,
    "parked_B": jnp.full(R, -1, jnp.int32), "waiting_B": jnp.ones(R, bool),
  }  # fmt: skip
  reset = (
    "sampled_BT",
    "behaviour_logprobs_BT",
    "done_B",
    "failed_B",
    *(n for n in OPTIONAL if getattr(d, n) is not None),
  )
  fields_R |= {name: jnp.zeros((R, *getattr(d, name).shape[1:]), getattr(d, name).dtype) for name in reset}

  def put(f, state, logits_RV, row_R, fields_R):
    pool, row_S, B = f["prompts"], f["row_S"], f["known_B"].shape[0]
    # A request that was ended between two looks may still have its slot.
    row_S = jnp.where(jnp.any(row_S[:, None] == row_R[None], axis=1), B, row_S)
    f = {name: put_rows(f[name], row_R, new, jax.tree.map(lambda _: 0, new)) for name, new in fields_R.items()}
    logits_KV = pool.logits_KV.at[row_R].set(logits_RV, mode="drop")
    return (f | {"row_S": row_S, "prompts": Pool(put_rows(pool.state, row_R, state, axes), logits_KV)},)

  names = ("prompts", "row_S", *fields_R)
  given = of_state, cut, cut, jax.tree.map(lambda _: cut, fields_R)
  (f,) = layout.own(put, d, names, given=given)(d, state, logits_RV, row_R, fields_R)
  return layout.constrain(d.replace(**f))


OPTIONAL = ("drawn_logprobs_BT", "likeliest_tokens_BTK", "likeliest_logprobs_BTK")


def _find(axes: Any, f: dict, row_R, length_R, total_R):
  """(fields, the rows' states, their slots, their places among the parked, tokens to add now)."""
  S = f["row_S"].shape[0]
  in_slot_RS = f["row_S"][None] == row_R[:, None]
  slot_R = jnp.where(jnp.any(in_slot_RS, axis=1), jnp.argmax(in_slot_RS, axis=1), S)
  state, place_R = take_rows(f["state"], slot_R, axes), at(f["parked_B"], row_R, -1)
  if "parked" in f:
    other, parked_R = take_rows(f["parked"].state, place_R, axes), place_R >= 0
    along = lambda a, axis: jnp.expand_dims(parked_R, [i for i in range(a.ndim) if i != axis])
    state = jax.tree.map(lambda a, b, axis: jnp.where(along(a, axis), b, a), state, other, axes)
  room_R = at(f["known_B"], row_R, 0) + total_R < at(f["limit_B"], row_R, 0)
  here_R = (slot_R < S) | (place_R >= 0)
  return f, state, slot_R, place_R, jnp.where(room_R & here_R, length_R, 0)


def _give(
  axes: Any, f: dict, state, logits_RV, slot_R, place_R, row_R, tokens_RW, length_R, total_R, *experts
) -> tuple[dict]:
  """Adds the tokens, and puts the states that have taken them in back to where `_find` found them."""
  B, moved_R = f["known_B"].shape[0], length_R > 0
  f, row_R = dict(f), jnp.where(moved_R, row_R, B)
  slot_R = jnp.where(moved_R, slot_R, f["row_S"].shape[0])
  f["state"] = put_rows(f["state"], slot_R, state, axes)
  f["logits_SV"] = f["logits_SV"].at[slot_R].set(logits_RV, mode="drop")
  if "parked" in f:
    pool = f["parked"]
    place_R = jnp.where(moved_R & (place_R >= 0), place_R, pool.logits_KV.shape[0])
    logits_KV = pool.logits_KV.at[place_R].set(logits_RV, mode="drop")
    f["parked"] = Pool(put_rows(pool.state, place_R, state, axes), logits_KV)
  i_W = jnp.arange(tokens_RW.shape[1])[None]
  at_RW = at(f["known_B"], row_R, 0)[:, None] + i_W
  at_RW = jnp.where(i_W < length_R[:, None], at_RW, f["tokens_BT"].shape[1])
  f["tokens_BT"] = f["tokens_BT"].at[row_R[:, None], at_RW].set(tokens_RW, mode="drop")
  for experts_RWY in experts:
    f["experts_BTY"] = f["experts_BTY"].at[row_R[:, None], at_RW].set(experts_RWY, mode="drop")
  f["known_B"] = f["known_B"].at[row_R].add(length_R, mode="drop")
  all_R = jnp.where(length_R == total_R, row_R, B)  # The last call for these requests.
  f["done_B"] = f["done_B"].at[all_R].set(False, mode="drop")
  f["waiting_B"] = f["waiting_B"].at[all_R].set(at(f["parked_B"], all_R, -1) >= 0, mode="drop")
  return (f,)


def extend(
  model: Model, layout_of: Callable[[int], Layout], params: Params, d: Decoding, row_R, tokens_RW, length_R, total_R
) -> Decoding:
  """Adds given tokens to R requests: length_R each now, and total_R in this and the following calls.

  Requests whose limit does not leave room for all of them and one more stay as they are.
  """
  layout, axes = layout_of(d.known_B.shape[0]), model.axes(d.state)
  of_state, cut = layout.of_state(d.state), layout.cut
  names = (
    "row_S", "logits_SV", "state", "parked", "tokens_BT", "known_B", "limit_B", "done_B", "waiting_B", "parked_B",
    "experts_BTY",
  )  # fmt: skip
  find = layout.own(lambda f, *args: _find(axes, f, *args), d, names, given=(cut,) * 3, more=(of_state, cut, cut, cut))
  _, state, slot_R, place_R, length_R = find(d, row_R, length_R, total_R)
  state, logits_RV, *experts = model.extend(params, state, tokens_RW, length_R)
  args = state, logits_RV, slot_R, place_R, row_R, tokens_RW, length_R, total_R, *experts
  give = layout.own(lambda f, *args: _give(axes, f, *args), d, names, given=(of_state, *(cut,) * (len(args) - 1)))
  (f,) = give(d, *args)
  return layout.constrain(d.replace(**f))
