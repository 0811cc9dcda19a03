"""Makes the sampler's weights from the trainer's, and measures what that costs a step."""

import time

import jax

from nemocascade.mesh import device_bytes
from nemocascade.runtime.programs import Programs
from nemocascade.types import Params


def for_sampling(
  programs: Programs, params: Params, *, own: bool = False
) -> tuple[Params, dict[str, float]]:  # fmt: skip
  """(Programs.sampling_weights, metrics: the milliseconds that they take and the bytes that a device writes).

  Args:
    own: whether no array may be one of `params`, because these are donated before the weights are used.
  """
  jax.block_until_ready(params)  # An update that is still running is not a part of it.
  began = time.perf_counter()
  weights = programs.sampling_weights(params)
  if own:
    copied = lambda new, old: jax.device_put(new, new.sharding, may_alias=False) if new is old else new  # noqa: E731
    weights = jax.tree.map(copied, weights, params)
  weights = jax.block_until_ready(weights)
  took = time.perf_counter() - began
  return weights, {
    "time/reshard_ms": 1e3 * took,
    "rollout/reshard_bytes": float(device_bytes(list(programs.resharded.values()))),
  }
