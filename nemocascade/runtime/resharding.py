"""Makes the sampler's weights from the trainer's, and measures what that costs a step."""

import time

import jax

from nemocascade.runtime.footprint import device_bytes
from nemocascade.runtime.programs import Programs
from nemocascade.types import Params


def for_sampling(programs: Programs, params: Params) -> tuple[Params, dict[str, float]]:
  """(Programs.sampling_weights, metrics: the milliseconds that they take and the bytes that a device writes)."""
  jax.block_until_ready(params)  # An update that is still running is not a part of it.
  began = time.perf_counter()
  weights = jax.block_until_ready(programs.sampling_weights(params))
  took = time.perf_counter() - began
  return weights, {
    "time/reshard_ms": 1e3 * took,
    "rollout/reshard_bytes": float(device_bytes(list(programs.resharded.values()))),
  }
