"""The state of rows that are being decoded, and what is done to it between tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

CACHES = ("k_BKSH", "v_BKSH")  # Leaves with a place for every token of a row; all others have a fixed size.


class DecodeState(struct.PyTreeNode):
  """The state of decoding B rows."""

  length_B: jax.Array  # int32; number of tokens processed.
  units: tuple  # The state of each unit of the pattern.
  stacked: tuple[bool, ...] = struct.field(pytree_node=False)  # For each unit: whether its leaves are [n, B, ...].


def row_axes(state: DecodeState) -> DecodeState:
  """A tree like the state, with each array's axis of rows."""
  units = tuple(
    jax.tree.map(lambda _, axis=int(stacked): axis, unit)
    for unit, stacked in zip(state.units, state.stacked, strict=True)
  )
  return state.replace(length_B=0, units=units)


def repeat_state(state: DecodeState, G: int) -> DecodeState:
  """Repeats each row G times, copies next to each other: [B, ...] -> [B * G, ...]."""
  units = tuple(
    jax.tree.map(lambda a, axis=int(stacked): jnp.repeat(a, G, axis=axis), unit)
    for unit, stacked in zip(state.units, state.stacked, strict=True)
  )
  return state.replace(length_B=jnp.repeat(state.length_B, G), units=units)


def grow(state: DecodeState, places: int) -> DecodeState:
  """Gives the key-value caches this many places for tokens; those of fewer lose their last ones."""

  def resized(path, leaf):
    if path[-1].key not in CACHES:
      return leaf
    leaf = leaf[..., :places, :]
    room = [(0, 0)] * (leaf.ndim - 2) + [(0, places - leaf.shape[-2]), (0, 0)]
    return jnp.pad(leaf, room)

  return state.replace(units=jax.tree_util.tree_map_with_path(resized, state.units))


def at_repeat(method: Callable, carry, i, *shared, stacked_caches: bool = False):
  """`method` of repeat i of a unit, which replaces its part of the stacked state: ((x, stacked state), Routings).

  Args:
    method: (x, state, *shared) -> (x, new state, Routings).
    carry: (x, stacked state).
    stacked_caches: whether the method takes and returns the caches of all repeats.
  """
  own = lambda path: not (stacked_caches and getattr(path[-1], "key", None) in CACHES)
  over, (x, stacked) = jax.tree_util.tree_map_with_path, carry
  x, state, routings = method(x, over(lambda path, a: a[i] if own(path) else a, stacked), *shared)
  put = lambda path, a, new: jax.lax.dynamic_update_index_in_dim(a, new, i, 0) if own(path) else new
  return (x, over(put, stacked, state)), routings
