"""The state of decoding: tokens by request, model states by slot, and the moves of states between them.

Letters: B requests, S slots, Q prompts, K parked requests. On a mesh all of them are sharded alike, so that a
request, its prompt and the slots that may serve it lie on one device. Numbers of rows, slots and places inside a
Decoding count the device's own ones: they run from 0 on each device.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemocascade import mesh as mesh_lib
from nemocascade.kernels.scatter import put
from nemocascade.rollout.sampling import Options


class Pool(struct.PyTreeNode):
  """States of requests or prompts that are not in slots."""

  state: Any
  logits_KV: jax.Array  # fp32; for the token after the last one taken in.


class Counts(struct.PyTreeNode):
  """What decoding has cost so far; int32 scalars, the same on all devices."""

  ticks: jax.Array
  slots: jax.Array  # Slots that there were, summed over the ticks.
  busy: jax.Array  # Slots that decoded a token, summed over the ticks.
  queued_slots: jax.Array  # `slots` of the ticks at which requests waited for one.
  queued_busy: jax.Array  # `busy` of these ticks.


class Decoding(struct.PyTreeNode):
  """The state of decoding B requests in S slots."""

  state: Any  # The model's decode state of the slots.
  logits_SV: jax.Array  # fp32; for the token after the last one taken in.
  row_S: jax.Array  # int32; the request in the slot, or the number of requests if the slot is free.

  tokens_BT: jax.Array  # int32
  sampled_BT: jax.Array  # bool; true on tokens that the policy sampled.
  behaviour_logprobs_BT: jax.Array  # fp32; under softmax(logits / temperature), 0 on given tokens.
  known_B: jax.Array  # int32; number of tokens.
  limit_B: jax.Array  # int32; sampling stops at this number of tokens.
  done_B: jax.Array  # bool; the request has sampled a stop token, met its limit, or failed.
  failed_B: jax.Array  # bool; its logits were not finite. It has no token of these logits.
  held_B: jax.Array  # bool; keeps its state when it is done, so that `Engine.extend` can continue it.
  waiting_B: jax.Array  # bool; waits for a slot.
  parked_B: jax.Array  # int32; its place among the parked, or -1.
  prompt_B: jax.Array  # int32; its place among the prompts.
  row_id_B: jax.Array  # int32; selects the request's random numbers.
  order_B: jax.Array  # int32; of the requests that wait, the lowest gets the next slot.
  options: Options  # Arrays [B].

  counts: Counts
  drawn_logprobs_BT: jax.Array | None = None  # fp32; under what the options' cuts leave; None without cuts.
  likeliest_tokens_BTK: jax.Array | None = None  # int32; the likeliest tokens at sampled places, or None.
  likeliest_logprobs_BTK: jax.Array | None = None  # fp32
  experts_BTY: jax.Array | None = None  # The experts of each token, see Rollout; None without Engine's experts_fn.
  prompts: Pool | None = None  # None if each request has had a slot from the start.
  parked: Pool | None = None


BY_ROW = (
  "tokens_BT", "sampled_BT", "behaviour_logprobs_BT", "known_B", "limit_B", "done_B", "failed_B", "held_B", "waiting_B",
  "parked_B", "prompt_B", "row_id_B", "order_B", "options", "drawn_logprobs_BT", "likeliest_tokens_BTK",
  "likeliest_logprobs_BTK", "experts_BTY",
)  # fmt: skip


def fields(d: Decoding, names: tuple[str, ...]) -> dict[str, Any]:
  """The named fields, without those that are None."""
  return {name: value for name in names if (value := getattr(d, name)) is not None}


def at(a_B, row_N, otherwise):
  """a_B[row_N], and `otherwise` at rows that do not exist."""
  return a_B.at[row_N].get(mode="fill", fill_value=otherwise)


# Model states. `axes` is a tree like the state: for each array, its axis of rows.


def take_rows(state: Any, index_N, axes: Any) -> Any:
  return jax.tree.map(lambda a, axis: jnp.take(a, index_N, axis=axis, mode="clip"), state, axes)


def put_rows(state: Any, index_N, rows: Any, axes: Any) -> Any:
  """Replaces the rows at index_N; an index beyond the last row is ignored."""
  return jax.tree.map(lambda a, new, axis: put(a, (slice(None),) * axis + (index_N,), new), state, rows, axes)


def repeat_rows(state: Any, times: int, axes: Any) -> Any:
  """Each row `times` times, the copies adjacent."""
  return jax.tree.map(lambda a, axis: jnp.repeat(a, times, axis=axis), state, axes)


def copy_row(source: Any, i, target: Any, j, axes: Any) -> Any:
  """Replaces row j of the target by row i of the source, whose key-value caches may be shorter.

  What is beyond them becomes 0, so that nothing of the row before, such as NaN, is left.
  """

  def copy(a, b, axis):
    row = jax.lax.dynamic_slice_in_dim(a, i, 1, axis)
    row = jnp.pad(row, [(0, 0 if k == axis else m - n) for k, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))])
    return jax.lax.dynamic_update_slice_in_dim(b, row, j, axis)

  return jax.tree.map(copy, source, target, axes)


class Layout:
  """How the requests of a Decoding and all that belongs to them lie on the mesh.

  Args:
    B: number of requests.
    axes_fn: state -> a tree like it, with each array's axis of rows.
  """

  def __init__(self, mesh: Mesh, B: int, axes_fn: Callable[[Any], Any]):
    self.mesh, self.axes_fn = mesh, axes_fn
    self.cut = mesh_lib.rows(mesh, B).spec
    axes = self.cut[0] if len(self.cut) else ()
    self.shards = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

  def divides(self, N: int) -> bool:
    """Whether N rows are sharded like the requests."""
    return N > 0 and mesh_lib.rows(self.mesh, N).spec == self.cut

  def of_state(self, state: Any) -> Any:
    """A PartitionSpec for each array of a model state."""
    return jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, *self.cut), self.axes_fn(state))

  def _of_pool(self, pool: Pool | None) -> Any:
    return None if pool is None else pool.replace(state=self.of_state(pool.state), logits_KV=self.cut)

  def specs(self, d: Decoding) -> Decoding:
    """A PartitionSpec for each array of a Decoding."""
    rows = jax.tree.map(lambda _: self.cut, d.replace(state=None, prompts=None, parked=None))
    return rows.replace(
      state=self.of_state(d.state),
      prompts=self._of_pool(d.prompts),
      parked=self._of_pool(d.parked),
      counts=jax.tree.map(lambda _: PartitionSpec(), d.counts),
    )

  def places(self, d: Decoding) -> Decoding:
    """A sharding for each array of a Decoding."""
    return jax.tree.map(
      lambda spec: NamedSharding(self.mesh, spec), self.specs(d), is_leaf=lambda s: isinstance(s, PartitionSpec)
    )

  def constrain(self, d: Decoding) -> Decoding:
    return d if self.mesh.size == 1 else jax.lax.with_sharding_constraint(d, self.places(d))

  def by_request(self, tree: Any) -> Any:
    """The arrays [B, ...] on the devices of their requests."""
    return tree if self.mesh.size == 1 else jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, self.cut))

  def everywhere(self, array: jax.Array) -> jax.Array:
    """The array on every device."""
    return array if self.mesh.size == 1 else jax.lax.with_sharding_constraint(array, mesh_lib.whole(self.mesh))

  def apart(self, fn: Callable, given: tuple, more: tuple) -> Callable:
    """Wraps `fn` so that each device applies it to its own rows; the specs of the arrays that it takes and returns."""
    if self.mesh.size == 1:
      return fn
    # check_vma=False, so that constants inside fn need no pcast to device-varying values.
    return jax.shard_map(fn, mesh=self.mesh, in_specs=given, out_specs=more, check_vma=False)

  def own(self, fn: Callable, d: Decoding, names: tuple[str, ...], *, given: tuple = (), more: tuple = ()) -> Callable:
    """Wraps `fn` so that each device applies it to its own rows.

    Args:
      fn: (dict of fields of d, *others) -> (dict of fields of d, *others).
      names: the fields of `d` that it takes and returns; it does not get those that are None.
      given, more: for each of the others that it takes and returns, the specs of its arrays.
    """
    specs = fields(self.specs(d), names)
    apart = self.apart(fn, (specs, *given), (specs, *more))
    return lambda d, *args: apart(fields(d, names), *args)
