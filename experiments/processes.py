"""Several processes of one run, one a host: how they meet, and what only the first of them does.

They share the work directory. All compute the same, each on its own devices' rows; files other than
checkpoints, which Orbax writes from all, are the first process's.
"""

from collections.abc import Callable

import jax

from nemocascade.errors import UserError


def join(where: str) -> None:
  """Meets the other processes, before anything is computed.

  Args:
    where: "auto" on a TPU pod, or "HOST:PORT,PROCESSES,INDEX", where HOST is that of process 0.
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
  """The first process does it, and the others wait until it is done."""
  if jax.process_index() == 0:
    make()
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("first_alone")


def refuse_several(what: str) -> None:
  """Raises UserError where there are more processes than one."""
  if jax.process_count() > 1:
    raise UserError(
      f"{what} runs in one process, and there are {jax.process_count()}: verdicts and tools' results"
      " are not shared between processes yet"
    )
