"""The programs of the engine that decode, as pure functions. See decoding.py for the letters."""

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
  at,
  copy_row,
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
  experts: Callable | None
  weights: Callable


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
    counts=Counts(*(scalar() for _ in range(5))),
    drawn_logprobs_BT=zeros(B, T) if drawn else None,
    likeliest_tokens_BTK=zeros(B, T, k, dtype=jnp.int32) if k else None,
    likeliest_logprobs_BTK=zeros(B, T, k) if k else None,
    experts_BTY=whole(experts[0]) if experts else None,
    prompts=None if S == B else pool,
    parked=empty(K) if K else None,
  )
  return layout.constrain(d)


# What each device does with its own slots. The arguments are dicts of fields of a Decoding.


class Load(NamedTuple):
  """What all devices know of each one, int32 [devices]. One array, so that a tick exchanges only one."""

  live: Any  # Requests that are in slots, parked or waiting.
  waiting: Any
  busy: Any  # Slots that decode.
  cuts: Any  # Of these, slots whose options leave out tokens.


def _settle(axes: Any, f: dict) -> tuple[dict, Any, Any]:
  """Frees, parks and refills slots: (fields, busy_S, this device's row of a Load)."""
  B = f["known_B"].shape[0]
  over_B = f["done_B"] & (f["failed_B"] | ~f["held_B"])
  f = f | {
    "row_S": jnp.where(at(over_B, f["row_S"], True), B, f["row_S"]),
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
  busy_S = ~at(f["done_B"], f["row_S"], True)
  busy, cuts = (jnp.sum(a_S, dtype=jnp.int32) for a_S in (busy_S, busy_S & at(f["options"].cuts, f["row_S"], False)))
  return f, busy_S, jnp.stack(Load(live, waiting, busy, cuts))[None]


def _park(axes: Any, f: dict) -> dict:
  """Moves requests whose turn has ended out of their slots, while others wait and there are places."""
  B, K = f["known_B"].shape[0], f["parked"].logits_KV.shape[0]

  def choice(c):
    row_S, parked_B, _ = c
    idle_S = at(f["done_B"], row_S, False)
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
  here = lambda a_B: a_B.at[f["row_S"]].get(mode="clip")
  return (f, *map(here, (f["known_B"], f["row_id_B"], *jax.tree.leaves(f["options"]))))


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


SETTLED = (
  "row_S", "done_B", "failed_B", "held_B", "waiting_B", "parked_B", "prompt_B", "order_B", "known_B", "options",
)  # fmt: skip
MOVED = ("state", "logits_SV", "prompts", "parked")


def decode(
  model: Model, layout_of: Callable[[int], Layout], stop_ids: tuple[int, ...], params: Params, d: Decoding, key, ticks,
  least,
) -> tuple[Decoding, jax.Array]:  # fmt: skip
  """Decodes until no slot is busy, for at most `ticks` tokens, or until no device has more than `least` requests left.

  Returns:
    (d, ran_3): ran_3 are the ticks, the most requests left on a device, and the busy slots.
  """
  B, S = d.known_B.shape[0], d.row_S.shape[0]
  layout, axes = layout_of(B), model.axes(d.state)
  # They may set how products are rounded. So the requests decide, whose number stays, and not the slots that are left.
  cut, weights = layout.cut, model.weights(params, B // layout.shards)
  names = SETTLED if d.prompts is None and d.parked is None else SETTLED + MOVED
  settle_own = layout.own(lambda f: _settle(axes, f), d, names, more=(cut, cut))

  def settle(d):
    f, busy_S, load_D4 = settle_own(d)
    return layout.constrain(d.replace(**f)), busy_S, Load(*layout.everywhere(load_D4).T)

  def tick(carry):
    i, d, busy_S, load = carry
    options = len(jax.tree.leaves(d.options))
    look = layout.own(_look, d, ("row_S", "known_B", "row_id_B", "options"), more=(cut,) * (2 + options))
    _, place_S, row_id_S, *options_S = look(d)
    options = jax.tree.unflatten(jax.tree.structure(d.options), options_S)
    token_S, logprobs_S, drawn_S = sample(
      row_keys(key, row_id_S, place_S), d.logits_SV, options, jnp.any(load.cuts > 0)
    )
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
    state, logits_SV = model.step(weights, d.state, token_S, new_S)
    if model.experts is not None:
      note = layout.own(_note, d, ("row_S", "experts_BTY"), given=(cut,) * 3)
      (noted,) = note(d.replace(**f), new_S, place_S, model.experts(state))
      f = f | noted
    busy, waits = jnp.sum(load.busy), jnp.any(load.waiting > 0)
    count = lambda now: jnp.where(waits, now, 0)
    c = d.counts
    counts = Counts(
      c.ticks + 1, c.slots + S, c.busy + busy, c.queued_slots + count(S), c.queued_busy + count(busy)
    )  # fmt: skip
    logits_SV = jnp.where(new_S[:, None], logits_SV, d.logits_SV)
    return (i + 1, *settle(d.replace(**f, state=state, logits_SV=logits_SV, counts=counts)))

  def goes_on(carry):
    i, _, _, load = carry
    return jnp.any(load.busy > 0) & (i < ticks) & (jnp.max(load.live) > least)

  i, d, _, load = jax.lax.while_loop(goes_on, tick, (jnp.int32(0), *settle(d)))
  return d, jnp.stack([i, jnp.max(load.live), jnp.sum(load.busy)])


def shrink(
  model: Model, layout_of: Callable[[int], Layout], row_S, logits_SV, state, B: int, S: int
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
  """(row_S, logits_SV, state) of a Decoding of B requests that goes on with S slots.

  No device may have more requests left than slots afterwards. What is not a part of a slot takes no part, so that it
  is not copied.
  """
  layout = layout_of(B)

  def move(row_S, logits_SV, state):
    kept_S = jnp.argsort(row_S, stable=True)[: S // layout.shards]  # Free slots come last.
    return row_S[kept_S], logits_SV[kept_S], take_rows(state, kept_S, model.axes(state))

  specs = layout.cut, layout.cut, layout.of_state(state)
  return layout.apart(move, specs, specs)(row_S, logits_SV, state)
