"""The programs of the engine, as pure functions: start, decode, extend, shrink. See decoding.py for the letters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nemocascade.rollout.decoding import (
  BY_ROW,
  Counts,
  Decoding,
  Layout,
  Pool,
  copy_row,
  put_rows,
  repeat_rows,
  take_rows,
)
from nemocascade.rollout.sampling import Options, likeliest, row_keys, sample
from nemocascade.types import Params


class Model(NamedTuple):
  """What the engine needs of a model; see Engine."""

  prefill: Callable
  step: Callable
  extend: Callable
  axes: Callable
  experts: Callable | None = None


def by_steps(step_fn: Callable) -> Callable:
  """An `extend` function that takes in the tokens one by one."""

  def extend(params, state, tokens_BT, length_B):
    def step(carry, x):
      (state, logits_BV), (t, tokens_B) = carry, x
      active_B = t < length_B
      state, new_BV = step_fn(params, state, tokens_B, active_B)
      return (state, jnp.where(active_B[:, None], new_BV, logits_BV)), None

    shape = jax.eval_shape(step_fn, params, state, tokens_BT[:, 0], length_B > 0)[1]
    places_T = jnp.arange(tokens_BT.shape[1])
    return jax.lax.scan(step, (state, jnp.zeros(shape.shape, shape.dtype)), (places_T, tokens_BT.T))[0]

  return extend


def _at(a_B, row_N, otherwise):
  """a_B[row_N], and `otherwise` at rows that do not exist."""
  return a_B.at[row_N].get(mode="fill", fill_value=otherwise)


def start(
  model: Model, layout_of: Callable[[int], Layout], T: int, params: Params, tokens_QP, length_Q, options: Options,
  held_B, G: int, S: int, drawn: bool, k: int, K: int,
) -> Decoding:  # fmt: skip
  """A Decoding of G requests for each prompt. If S < Q * G, all of them wait for a slot.

  Args:
    options: arrays [B].
    drawn: whether to record drawn_logprobs_BT.
    k: number of likeliest tokens to record.
    K: places for parked requests.
  """
  Q, P = tokens_QP.shape
  B, layout = Q * G, layout_of(Q * G)
  # Copies of a prompt's state: as many as it takes for a request and its prompt to lie on one device.
  copies = G if S == B else next(n for n in range(1, G + 1) if G % n == 0 and layout.divides(Q * n))
  own_B = jnp.arange(B, dtype=jnp.int32) % (B // layout.shards)
  logits_QV, state, *experts = model.prefill(params, tokens_QP, length_Q, T if S == B else P)
  axes = model.axes(state)
  pool = Pool(repeat_rows(state, copies, axes), jnp.repeat(logits_QV, copies, axis=0))

  def empty(N: int) -> Pool:
    shapes = jax.eval_shape(lambda: model.prefill(params, tokens_QP, length_Q, T)[1])
    of = lambda a, axis: jnp.zeros((*a.shape[:axis], N, *a.shape[axis + 1 :]), a.dtype)
    return Pool(jax.tree.map(of, shapes, axes), jnp.zeros((N, logits_QV.shape[1]), logits_QV.dtype))

  slots = pool if S == B else empty(S)
  repeat, zeros = lambda a: jnp.repeat(a, G, axis=0), lambda *shape, dtype=jnp.float32: jnp.zeros(shape, dtype)
  whole = lambda a: jnp.pad(repeat(a), ((0, 0), (0, T - P)) + ((0, 0),) * (a.ndim - 2))
  scalar = lambda: jnp.zeros((), jnp.int32)
  d = Decoding(
    state=slots.state,
    logits_SV=slots.logits_KV,
    row_S=own_B if S == B else jnp.full((S,), B // layout.shards, jnp.int32),
    tokens_BT=whole(tokens_QP),
    sampled_BT=zeros(B, T, dtype=bool),
    behaviour_logprobs_BT=zeros(B, T),
    known_B=repeat(length_Q),
    limit_B=jnp.full((B,), T, jnp.int32),
    done_B=zeros(B, dtype=bool),
    failed_B=zeros(B, dtype=bool),
    held_B=held_B,
    waiting_B=jnp.full((B,), S < B),
    parked_B=jnp.full((B,), -1, jnp.int32),
    prompt_B=own_B // (G // copies),
    row_id_B=jnp.arange(B, dtype=jnp.int32),
    order_B=own_B,
    options=options,
    counts=Counts(scalar(), scalar(), scalar(), scalar()),
    drawn_logprobs_BT=zeros(B, T) if drawn else None,
    likeliest_tokens_BTK=zeros(B, T, k, dtype=jnp.int32) if k else None,
    likeliest_logprobs_BTK=zeros(B, T, k) if k else None,
    experts_BTY=whole(experts[0]) if experts else None,
    prompts=None if S == B else pool,
    parked=empty(K) if K else None,
  )
  return layout.constrain(d)


# What each device does with its own slots. The arguments are dicts of fields of a Decoding.


def _settle(axes: Any, f: dict) -> tuple[dict, Any, Any]:
  """Frees, parks and refills slots: (fields, busy_S, load_12: this device's live and waiting requests)."""
  B = f["known_B"].shape[0]
  over_B = f["done_B"] & (f["failed_B"] | ~f["held_B"])
  f = f | {
    "row_S": jnp.where(_at(over_B, f["row_S"], True), B, f["row_S"]),
    "parked_B": jnp.where(over_B, -1, f["parked_B"]),
  }
  if "parked" in f:
    f = _park(axes, f)
    place_B = f["parked_B"]
    f = _refill(axes, f, f["parked"], place_B, f["waiting_B"] & (place_B >= 0))
    f["parked_B"] = jnp.where(f["waiting_B"] | f["done_B"], place_B, -1)
  if "prompts" in f:
    f = _refill(axes, f, f["prompts"], f["prompt_B"], f["waiting_B"] & (f["parked_B"] < 0))
  waiting = jnp.sum(f["waiting_B"], dtype=jnp.int32)
  away = jnp.sum((f["parked_B"] >= 0) & ~f["waiting_B"], dtype=jnp.int32)
  live = jnp.sum(f["row_S"] < B, dtype=jnp.int32) + away + waiting
  return f, ~_at(f["done_B"], f["row_S"], True), jnp.stack([live, waiting])[None]


def _park(axes: Any, f: dict) -> dict:
  """Moves requests whose turn has ended out of their slots, while others wait and there are places."""
  B, K = f["known_B"].shape[0], f["parked"].logits_KV.shape[0]

  def choice(c):
    row_S, parked_B, _ = c
    idle_S = _at(f["done_B"], row_S, False)
    used_K = jnp.zeros(K, bool).at[jnp.where(parked_B < 0, K, parked_B)].set(True, mode="drop")
    return idle_S, used_K

  def more(c):
    idle_S, used_K = choice(c)
    return jnp.any(idle_S) & ~jnp.all(used_K)

  def one(c):
    (row_S, parked_B, parked), (idle_S, used_K) = c, choice(c)
    s, k = jnp.argmax(idle_S), jnp.argmin(used_K)
    state = copy_row(f["state"], s, parked.state, k, axes)
    parked = Pool(state, parked.logits_KV.at[k].set(f["logits_SV"][s]))
    return row_S.at[s].set(B), parked_B.at[row_S[s]].set(k.astype(jnp.int32)), parked

  begin = lambda c: jnp.any(f["waiting_B"]) & more(c)
  row_S, parked_B, parked = jax.lax.while_loop(begin, one, (f["row_S"], f["parked_B"], f["parked"]))
  return f | dict(row_S=row_S, parked_B=parked_B, parked=parked)


def _refill(axes: Any, f: dict, pool: Pool, place_B, ready_B) -> dict:
  """Gives free slots to requests that are ready, in their order, with their states of the pool."""
  B, order_B = ready_B.shape[0], f["order_B"]
  last = jnp.iinfo(order_B.dtype).max

  def one(c):
    row_S, state, logits_SV, ready_B = c
    s, b = jnp.argmax(row_S >= B), jnp.argmin(jnp.where(ready_B, order_B, last))
    state = copy_row(pool.state, place_B[b], state, s, axes)
    logits_SV = logits_SV.at[s].set(pool.logits_KV[place_B[b]])
    return row_S.at[s].set(b.astype(jnp.int32)), state, logits_SV, ready_B.at[b].set(False)

  more = lambda c: jnp.any(c[0] >= B) & jnp.any(c[3])
  row_S, state, logits_SV, left_B = jax.lax.while_loop(more, one, (f["row_S"], f["state"], f["logits_SV"], ready_B))
  return f | dict(row_S=row_S, state=state, logits_SV=logits_SV, waiting_B=f["waiting_B"] & ~(ready_B & ~left_B))


def _look(f: dict):
  """(fields, places of the next tokens, ids, then the options) of the requests in the slots."""
  at = lambda a_B: a_B.at[f["row_S"]].get(mode="clip")
  return (f, *map(at, (f["known_B"], f["row_id_B"], *jax.tree.leaves(f["options"]))))


def _write(stop_ids: tuple[int, ...], f: dict, busy_S, new_S, token_S, found: dict[str, Any]) -> tuple[dict]:
  """Adds the sampled tokens and ends the requests that have met a stop token or their limit, or have failed.

  Args:
    new_S: whether the slot has sampled a token.
    found: name of a field [B, T] -> its values for these tokens, [S].
  """
  B, row_S = f["known_B"].shape[0], f["row_S"]
  row_of = lambda chosen_S: jnp.where(chosen_S, row_S, B)  # Row B is ignored.
  place_S = f["known_B"].at[row_S].get(mode="clip")
  stop_S = jnp.any(token_S[:, None] == jnp.array(stop_ids, jnp.int32)[None], axis=1)
  stop_S |= place_S + 1 >= f["limit_B"].at[row_S].get(mode="clip")
  failed_S = busy_S & ~new_S
  f = f | {
    "known_B": f["known_B"].at[row_of(new_S)].add(1, mode="drop"),
    "done_B": f["done_B"].at[row_of(failed_S | (new_S & stop_S))].set(True, mode="drop"),
    "failed_B": f["failed_B"].at[row_of(failed_S)].set(True, mode="drop"),
  }
  for name, value in found.items():
    f[name] = f[name].at[row_of(new_S), place_S].set(value, mode="drop")
  return (f,)


def _note(f: dict, new_S, place_S, experts_SY) -> tuple[dict]:
  """Records the experts of the tokens that the slots have taken in."""
  row_S = jnp.where(new_S, f["row_S"], f["experts_BTY"].shape[0])
  return (f | {"experts_BTY": f["experts_BTY"].at[row_S, place_S].set(experts_SY, mode="drop")},)


SETTLED = ("row_S", "done_B", "failed_B", "held_B", "waiting_B", "parked_B", "prompt_B", "order_B", "known_B")
MOVED = ("state", "logits_SV", "prompts", "parked")


def decode(
  model: Model, layout_of: Callable[[int], Layout], stop_ids: tuple[int, ...], params: Params, d: Decoding, key, ticks,
  least,
) -> tuple[Decoding, jax.Array]:  # fmt: skip
  """Decodes until no slot is busy, for at most `ticks` tokens, or until no device has more than `least` requests left.

  Returns:
    (d, ran_3): ran_3 are the ticks, the most requests left on a device, and the busy slots.
  """
  layout, axes = layout_of(d.known_B.shape[0]), model.axes(d.state)
  cut = layout.cut
  names = SETTLED if d.prompts is None and d.parked is None else SETTLED + MOVED
  settle_own = layout.own(lambda f: _settle(axes, f), d, names, more=(cut, cut))

  def settle(d):
    f, busy_S, load_D2 = settle_own(d)
    return layout.constrain(d.replace(**f)), busy_S, jnp.max(load_D2, axis=0)

  def tick(carry):
    i, d, busy_S, load_2 = carry
    options = len(jax.tree.leaves(d.options))
    look = layout.own(_look, d, ("row_S", "known_B", "row_id_B", "options"), more=(cut,) * (2 + options))
    _, place_S, row_id_S, *options_S = look(d)
    options = jax.tree.unflatten(jax.tree.structure(d.options), options_S)
    token_S, logprobs_S, drawn_S = sample(row_keys(key, row_id_S, place_S), d.logits_SV, options)
    new_S = busy_S & jnp.isfinite(logprobs_S)
    found = {"tokens_BT": token_S, "sampled_BT": new_S, "behaviour_logprobs_BT": logprobs_S}
    if d.drawn_logprobs_BT is not None:
      found["drawn_logprobs_BT"] = drawn_S
    if d.likeliest_tokens_BTK is not None:
      of = likeliest(d.logits_SV, options, d.likeliest_tokens_BTK.shape[-1])
      found |= dict(zip(("likeliest_tokens_BTK", "likeliest_logprobs_BTK"), of, strict=True))
    write = lambda f, *args: _write(stop_ids, f, *args)
    given = (cut, cut, cut, dict.fromkeys(found, cut))
    (f,) = layout.own(write, d, ("row_S", *BY_ROW), given=given)(d, busy_S, new_S, token_S, found)
    # A stop token is taken in too, because a tool's result may follow it.
    state, logits_SV = model.step(params, d.state, token_S, new_S)
    if model.experts is not None:
      note = layout.own(_note, d, ("row_S", "experts_BTY"), given=(cut,) * 3)
      (noted,) = note(d.replace(**f), new_S, place_S, model.experts(state))
      f = f | noted
    busy, waits = jnp.sum(busy_S, dtype=jnp.int32), load_2[1] > 0
    count = lambda now: jnp.where(waits, now, 0)
    c = d.counts
    counts = Counts(c.ticks + 1, c.busy + busy, c.queued_ticks + count(1), c.queued_busy + count(busy))
    logits_SV = jnp.where(new_S[:, None], logits_SV, d.logits_SV)
    return (i + 1, *settle(d.replace(**f, state=state, logits_SV=logits_SV, counts=counts)))

  goes_on = lambda carry: jnp.any(carry[2]) & (carry[0] < ticks) & (carry[3][0] > least)
  i, d, busy_S, load_2 = jax.lax.while_loop(goes_on, tick, (jnp.int32(0), *settle(d)))
  return d, jnp.stack([i, load_2[0], jnp.sum(busy_S, dtype=jnp.int32)])


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
  assert d.prompts is not None
  logits_RV, state = model.prefill(params, tokens_RP, length_R, places)
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


def shrink(model: Model, layout_of: Callable[[int], Layout], d: Decoding, S: int) -> Decoding:
  """The Decoding with S slots. No device may have more requests left than slots afterwards."""
  layout = layout_of(d.known_B.shape[0])

  def move(f):
    kept_S = jnp.argsort(f["row_S"], stable=True)[: S // layout.shards]  # Free slots come last.
    axes = model.axes(f["state"])
    return (
      dict(row_S=f["row_S"][kept_S], logits_SV=f["logits_SV"][kept_S], state=take_rows(f["state"], kept_S, axes)),
    )

  (f,) = layout.own(move, d, ("row_S", "logits_SV", "state"))(d)
  return layout.constrain(d.replace(**f))


def extend(
EXTENDED = (
  "row_S", "logits_SV", "state", "parked", "tokens_BT", "known_B", "limit_B", "done_B", "waiting_B", "parked_B",
  "experts_BTY",
)  # fmt: skip


  model: Model, layout_of: Callable[[int], Layout], params: Params, d: Decoding, row_R, tokens_RW, length_R, total_R
) -> Decoding:
  """Adds given tokens to R requests: length_R each now, and total_R in this and the following calls.

  Requests whose limit does not leave room for all of them and one more stay as they are.
  """
  layout, axes = layout_of(d.known_B.shape[0]), model.axes(d.state)
  of_state, cut = layout.of_state(d.state), layout.cut

  def find(f, row_R, length_R, total_R):
    """(fields, the rows' states, their slots, their places among the parked, tokens to add now)."""
    S = f["row_S"].shape[0]
    in_slot_RS = f["row_S"][None] == row_R[:, None]
    slot_R = jnp.where(jnp.any(in_slot_RS, axis=1), jnp.argmax(in_slot_RS, axis=1), S)
    state, place_R = take_rows(f["state"], slot_R, axes), _at(f["parked_B"], row_R, -1)
    if "parked" in f:
      other = take_rows(f["parked"].state, place_R, axes)
      choose = lambda a, b, axis: jnp.where(
        jnp.expand_dims(place_R >= 0, [i for i in range(a.ndim) if i != axis]), b, a
      )
      state = jax.tree.map(choose, state, other, axes)
    room_R = _at(f["known_B"], row_R, 0) + total_R < _at(f["limit_B"], row_R, 0)
    here_R = (slot_R < S) | (place_R >= 0)
    return f, state, slot_R, place_R, jnp.where(room_R & here_R, length_R, 0)

  def put(f, state, logits_RV, slot_R, place_R, row_R, tokens_RW, length_R, total_R, *experts):
    B, moved_R = f["known_B"].shape[0], length_R > 0
    f = dict(f)
    row_R = jnp.where(moved_R, row_R, B)
    slot_R = jnp.where(moved_R, slot_R, f["row_S"].shape[0])
    f["state"] = put_rows(f["state"], slot_R, state, axes)
    f["logits_SV"] = f["logits_SV"].at[slot_R].set(logits_RV, mode="drop")
    if "parked" in f:
      pool = f["parked"]
      place_R = jnp.where(moved_R & (place_R >= 0), place_R, pool.logits_KV.shape[0])
      logits_KV = pool.logits_KV.at[place_R].set(logits_RV, mode="drop")
      f["parked"] = Pool(put_rows(pool.state, place_R, state, axes), logits_KV)
    i_W = jnp.arange(tokens_RW.shape[1])[None]
    at_RW = _at(f["known_B"], row_R, 0)[:, None] + i_W
    at_RW = jnp.where(i_W < length_R[:, None], at_RW, f["tokens_BT"].shape[1])
    f["tokens_BT"] = f["tokens_BT"].at[row_R[:, None], at_RW].set(tokens_RW, mode="drop")
    for experts_RWY in experts:
      f["experts_BTY"] = f["experts_BTY"].at[row_R[:, None], at_RW].set(experts_RWY, mode="drop")
    f["known_B"] = f["known_B"].at[row_R].add(length_R, mode="drop")
    all_R = jnp.where(length_R == total_R, row_R, B)  # The last call for these requests.
    f["done_B"] = f["done_B"].at[all_R].set(False, mode="drop")
    f["waiting_B"] = f["waiting_B"].at[all_R].set(_at(f["parked_B"], all_R, -1) >= 0, mode="drop")
    return (f,)

  found = layout.own(find, d, EXTENDED, given=(cut,) * 3, more=(of_state, cut, cut, cut))
  _, state, slot_R, place_R, length_R = found(d, row_R, length_R, total_R)
  state, logits_RV, *experts = model.extend(params, state, tokens_RW, length_R)
  args = state, logits_RV, slot_R, place_R, row_R, tokens_RW, length_R, total_R, *experts
  (f,) = layout.own(put, d, EXTENDED, given=(of_state, *(cut,) * (len(args) - 1)))(d, *args)
  return layout.constrain(d.replace(**f))
