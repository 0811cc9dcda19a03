"""Joins the statistics of the routers of a model's blocks."""

import functools

import jax
import jax.numpy as jnp

from nemocascade.types import Routing


def _total(losses: list[jax.Array | None]) -> jax.Array | None:
  """The sum; None if the routers compute no loss."""
  computed = [loss for loss in losses if loss is not None]
  return functools.reduce(jnp.add, computed) if computed else None


def _in_depth_order(blocks: list[Routing]) -> Routing:
  """Joins the Routings of a unit's blocks ([repeats, ...] each if it is scanned) in the order of the layers."""
  E = blocks[0].load_LE.shape[-1]
  return Routing(
    load_LE=jnp.stack([b.load_LE.reshape(-1, E) for b in blocks], axis=1).reshape(-1, E),
    dropped_L=jnp.stack([b.dropped_L.reshape(-1) for b in blocks], axis=1).reshape(-1),
    loss=_total([None if b.loss is None else jnp.sum(b.loss) for b in blocks]),
  )


def all_blocks(of_units: list[tuple[Routing | None, ...]]) -> Routing | None:
  """Joins the Routings of all units; None if there is no MoE block."""
  routed = [[block for block in blocks if block is not None] for blocks in of_units]
  units = [_in_depth_order(blocks) for blocks in routed if blocks]
  if not units:
    return None
  return Routing(
    load_LE=jnp.concatenate([u.load_LE for u in units]),
    dropped_L=jnp.concatenate([u.dropped_L for u in units]),
    loss=_total([unit.loss for unit in units]),
  )
