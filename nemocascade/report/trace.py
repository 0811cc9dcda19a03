"""A trace of some steps of a stage by JAX's profiler, for TensorBoard's profile page or Perfetto."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax


def traced(steps: Iterable[int], asked: tuple[int, int] | None, directory: Path) -> Iterator[int]:
  """Yields `steps`. The profiler runs from the beginning of step asked[0] to the end of step asked[1].

  Every process writes the trace of its devices into `directory`.
  """
  first, last = asked or (1, 0)
  running = done = False
  try:
    for step in steps:
      if first <= step <= last and not running:
        jax.profiler.start_trace(str(directory))
        running = True
      yield step
      if running and step == last:
        running, done = False, True
        _stop(directory)
  finally:
    if running:
      done = True
      _stop(directory)
    if asked and not done and jax.process_index() == 0:
      print(f"--trace={first}:{last}: no such step was done, no trace is written", file=sys.stderr)


def _stop(directory: Path) -> None:
  for array in jax.live_arrays():  # Steps are dispatched ahead: waits for the work of those that are traced.
    array.block_until_ready()
  said = f"trace written: {directory}"
  try:
    jax.profiler.stop_trace()
  except (OSError, RuntimeError) as error:  # The run is worth more than its trace.
    said = f"trace {directory}: cannot be written ({' '.join(str(error).split())[:100]})"
  if jax.process_index() == 0:
    print(said, file=sys.stderr)
