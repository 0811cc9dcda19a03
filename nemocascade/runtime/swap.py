"""Parameters that take turns on the devices: those of teachers, reference and judge. They wait in the host's memory.

Each process copies the shards of its own devices, so that a host needs a teacher's bytes divided by the number of
hosts. The copies are plain numpy arrays and not arrays in pinned memory, because every platform has them. A swap
moves one device's share of the parameters, at 30B on 64 chips about a GiB, once a step.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from nemocascade.types import Params


@dataclasses.dataclass(frozen=True)
class _Waiting:
  """An array in the host's memory: the shards of this process's devices, each once."""

  shape: tuple[int, ...]
  sharding: jax.sharding.Sharding
  shards: dict[tuple, np.ndarray]  # The shard's bounds -> its values.

  def put(self) -> jax.Array:
    return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.shards[_bounds(index)])


def _bounds(index: tuple[slice, ...]) -> tuple:
  return tuple((part.start, part.stop) for part in index)


@dataclasses.dataclass(frozen=True)
class HostParams:
  """Parameters that wait in the host's memory."""

  _waiting: Any  # The tree of parameters with _Waiting as leaves.

  @classmethod
  def of(cls, params: Params) -> "HostParams":
    """Copies parameters from the devices. The caller drops its own reference to free their memory there."""

    def copy(array: jax.Array) -> _Waiting:
      shards = {_bounds(shard.index): shard.data for shard in array.addressable_shards}
      return _Waiting(array.shape, array.sharding, {at: np.asarray(data) for at, data in shards.items()})

    return cls(jax.tree.map(copy, params))

  def put(self) -> Params:
    """The parameters on the devices, with the shardings that they had."""
    return jax.tree.map(_Waiting.put, self._waiting)
