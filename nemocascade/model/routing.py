"""Joins what the routers of a model's blocks report, and divides records of experts among the blocks.

A record has number + 1 of each expert that a token's routers chose, and 0 where nothing was recorded, so that padding
and tokens that were not recorded need no mask.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nemocascade.types import Routing


def as_record(expert: jax.Array, E: int) -> jax.Array:
  """Numbers of experts as entries of a record, in the smallest type that holds E; -1 becomes 0."""
  return (expert + 1).astype(jnp.uint8 if E < 256 else jnp.uint16)


def _total(losses: list[jax.Array | None]) -> jax.Array | None:
  """The sum; None if the routers compute no loss."""
  computed = [loss for loss in losses if loss is not None]
  return functools.reduce(jnp.add, computed) if computed else None


def _deep(parts: Sequence[jax.Array], rank: int) -> jax.Array:
  """Joins the arrays of a unit's blocks in the order of the layers: [L, ...] with `rank` more axes.

  Args:
    parts: an array for each block, [1, ...], or [repeats, 1, ...] if the unit is scanned.
  """
  shape = parts[0].shape[parts[0].ndim - rank :]
  return jnp.stack([part.reshape(-1, *shape) for part in parts], axis=1).reshape(-1, *shape)


def _in_depth_order(blocks: list[Routing]) -> Routing:
  """Joins the Routings of a unit's blocks ([repeats, ...] each if it is scanned) in the order of the layers."""

  def join(name: str, rank: int) -> jax.Array | None:
    parts = [getattr(b, name) for b in blocks]
    return None if parts[0] is None else _deep(parts, rank)

  return Routing(
    load_LE=_deep([b.load_LE for b in blocks], 1),
    dropped_L=_deep([b.dropped_L for b in blocks], 0),
    loss=_total([None if b.loss is None else jnp.sum(b.loss) for b in blocks]),
    recorded_L=join("recorded_L", 0),
    agreed_L=join("agreed_L", 0),
    experts_LBTX=join("experts_LBTX", 3),
  )


def all_blocks(of_units: list[tuple[Routing | None, ...]]) -> Routing | None:
  """Joins the Routings of all units; None if there is no MoE block."""
  routed = [[block for block in blocks if block is not None] for blocks in of_units]
  units = [_in_depth_order(blocks) for blocks in routed if blocks]
  if not units:
    return None
  bare = [unit.replace(loss=None) for unit in units]
  joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *bare)
  return joined.replace(loss=_total([unit.loss for unit in units]))


def by_token(experts_LBTX: jax.Array) -> jax.Array:
  """experts_BTY of the blocks' records."""
  experts_BTLX = jnp.moveaxis(experts_LBTX, 0, 2)
  return experts_BTLX.reshape(*experts_BTLX.shape[:2], -1)


def record_of(routing: Routing | None, length_B: jax.Array, T: int) -> jax.Array | None:
  """experts_BTY of each row's first length_B tokens, 0 after them; None if they are not recorded."""
  if routing is None or routing.experts_LBTX is None:
    return None
  experts_BTY = by_token(routing.experts_LBTX)
  return jnp.where((jnp.arange(T)[None] < length_B[:, None])[..., None], experts_BTY[:, :T], 0)


def of_units(experts_BTY: jax.Array | None, plan: Sequence[tuple[str, int]], X: int) -> list:
  """A record for the blocks of each unit: a tuple of [B, T, X], or [repeats, B, T, X] if it is scanned.

  None stands for a block without a router, and for a unit if there is no record.

  Args:
    plan: (letters, repeats) of the units.
  """
  if experts_BTY is None:
    return [None] * len(plan)
  B, T, _ = experts_BTY.shape
  experts_LBTX = jnp.moveaxis(experts_BTY.reshape(B, T, -1, X), 2, 0)
  found, start = [], 0
  for letters, n in plan:
    routers = letters.count("E")
    own = experts_LBTX[start : start + n * routers].reshape(n, routers, B, T, X)
    start += n * routers
    parts = iter([own[:, i] if n > 1 else own[0, i] for i in range(routers)])
    found.append(tuple(next(parts) if letter == "E" else None for letter in letters))
  return found


def experts_of(units: Sequence[tuple]) -> jax.Array:
  """experts_BY of the last token that each row took in, from the states of the units of a model that records."""
  found = []
  for unit in units:
    parts = [block["experts_BX"] for block in unit if isinstance(block, dict) and "experts_BX" in block]
    if parts:
      found.append(_deep(parts, 2))
  return by_token(jnp.concatenate(found)[:, :, None])[:, 0]
