"""Where the processes of a run meet: the word after --distributed."""

import dataclasses

from nemocascade.errors import UserError

MOST = 1 << 16  # Processes of a run. Process 0 has a connection to each.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where process 0 listens, how many processes there are, and which of them this one is.

  `local_devices` are those of this process, where several share a machine; None for all.
  """

  host: str
  port: int
  count: int
  index: int
  local_devices: list[int] | None = None


def parse(where: str, connect_s: float) -> Place:
  """The place that the word means, which may be `misplaced`.

  Args:
    where: "auto" on a TPU pod or in a Slurm, Kubernetes or Open MPI job, or "HOST:PORT,PROCESSES,INDEX" with the host
      of process 0.
    connect_s: time limit for the names of hosts to become known.

  Raises:
    UserError: it has another form, or "auto" finds no such job.
  """
  if where == "auto":
    return _detected(connect_s)
  try:
    address, count, index = where.split(",")
    host, port = address.rsplit(":", 1)
    found = Place(host.strip("[]"), int(port), int(count), int(index))
  except ValueError as error:
    raise UserError(f"--distributed={where!r}: give 'auto', or HOST:PORT,PROCESSES,INDEX") from error
  if not 0 < found.port < 1 << 16:
    raise UserError(f"--distributed={where!r}: PORT is from 1 to {(1 << 16) - 1}")
  return found


def misplaced(place: Place) -> str:
  """Why no run has this place; "" if one may have it."""
  if not 0 < place.count <= MOST:
    return f"PROCESSES must be from 1 to {MOST}"
  return "" if 0 <= place.index < place.count else f"INDEX is from 0 to {place.count - 1}"


def _detected(connect_s: float) -> Place:
  """The job around this process. Raises UserError if JAX finds none.

  JAX detects jobs only inside jax.distributed.initialize, which would start its service before the processes have
  met and been compared. So a function of its own is used, here alone, that may change with JAX's version.
  """
  from jax._src import clusters

  try:
    address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(connect_s)
    )
  except Exception as error:
    raise UserError(f"--distributed=auto: {type(error).__name__}: {' '.join(str(error).split())}") from error
  if address is None or count is None or index is None:
    raise UserError(
      "--distributed=auto: this is no TPU pod, nor a Slurm, Kubernetes or Open MPI job; give HOST:PORT,PROCESSES,INDEX"
    )
  host, port = address.rsplit(":", 1)
  return Place(host.strip("[]"), int(port), count, index, None if devices is None else list(devices))
