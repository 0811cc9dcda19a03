"""Runs in several processes, one per host: how they connect, and what only the first one does.

The processes share the work directory. Each runs the same program on the rows of its own devices. Orbax writes
checkpoints from all processes; only the first process writes other files.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nemocascade.errors import UserError


def join(where: str) -> None:
  """Connects to the other processes. Call it before any computation.

  Args:
    where: "auto" on a TPU pod, or "HOST:PORT,PROCESSES,INDEX" with the host of process 0.

  Raises:
    UserError: `where` has another form.
  """
  if where == "auto":
    jax.distributed.initialize()
    return
  try:
    address, count, index = where.split(",")
    count, index = int(count), int(index)
  except ValueError as error:
    raise UserError(f"--distributed={where!r}: give 'auto', or HOST:PORT,PROCESSES,INDEX") from error
  if not 0 <= index < count:
    raise UserError(f"--distributed={where!r}: INDEX is from 0 to {count - 1}")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, count, index)


def first_alone(make: Callable[[], object]) -> None:
  """Calls `make` in the first process only. The others wait until it is done."""
  if jax.process_index() == 0:
    make()
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("first_alone")


def exchange(value: Any, what: str) -> list[Any]:
  """The JSON values of all processes, in their order. All processes must call it, in the same order of calls.

  Args:
    what: names the exchange, for errors; the same in every process.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(data)] = data
  return [json.loads(bytes(row[:size])) for row, size in zip(multihost_utils.process_allgather(padded), sizes)]


def refuse_several(what: str) -> None:
  """Raises UserError if there is more than one process. `what` is the subject of the message."""
  if jax.process_count() > 1:
    raise UserError(
      f"{what} runs in one process, and there are {jax.process_count()}: verdicts and tools' results"
      " are not shared between processes yet"
    )
