"""Runs in several processes, one per host: how they connect, exchange values, and end together.

The processes share the work directory. Each runs the same program on the rows of its own devices. All of them write
their part of a checkpoint, the bad rows of their data, and traces; the first process alone writes the other files.

Values are exchanged over TCP through process 0 (`hub`, `link`). Nothing that decides what a process does next may
come from anything that was not exchanged.
"""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax

from nemocascade.errors import LOST, UserError
from nemocascade.runtime import meeting, termination
from nemocascade.runtime.ending import Ending, NotAdmitted
from nemocascade.runtime.link import Link

CONNECT_S, WAIT_S = 50.0, 600.0
NEVER = 30 * 24 * 3600  # Seconds without a heartbeat until JAX aborts all processes. The hub is earlier.


class ProcessesDiffer(Exception):
  """Processes decided differently where all must decide alike."""


@dataclasses.dataclass
class _Run:
  """What this process knows of the others."""

  link: Link | None = None
  place: meeting.Place | None = None
  wait_s: float = WAIT_S
  check: bool = False  # Whether decisions are compared.
  decided: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # Since the last exchange: name, checksum.
  spent: dict[str, float] = dataclasses.field(default_factory=dict)


_run = _Run()


def connect(where: str, connect_s: float = CONNECT_S, grace_s: float = termination.GRACE_S) -> None:
  """Meets the other processes. JAX is not started yet.

  Args:
    where: see `meeting.parse`.
    connect_s: time limit until all processes have connected.
    grace_s: time limit from SIGTERM to the end of a step, after which the run ends without saving.

  Raises:
    UserError: `where` has another form, its index or count can't be, or "auto" finds no job.
    ending.NotAdmitted: they did not all come, or this process is not admitted.
  """
  place = meeting.parse(where, connect_s)
  wrong = meeting.misplaced(place)
  if wrong and place.index == 0:
    raise UserError(f"--distributed={where!r}: {wrong}")
  try:
    link = Link(place, connect_s=connect_s, grace_s=grace_s)
  except NotAdmitted as error:
    if wrong and error.ending.code == LOST:  # Nobody is there who could refuse this process, and the others with it.
      raise UserError(f"--distributed={where!r}: {wrong}") from error
    raise
  _run.place, _run.link = place, link
  termination.tell(_run.link)


def start_jax() -> None:
  """Starts JAX in all processes. Call it after `connect`, and before any computation."""
  link, place = _run.link, _run.place
  assert link is not None and place is not None
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    f"127.0.0.1:{link.forward()}", place.count, place.index, place.local_devices,
    coordinator_bind_address=f"127.0.0.1:{link.jax_port}",
    heartbeat_timeout_seconds=NEVER, shutdown_timeout_seconds=60,
  )  # fmt: skip
  termination.take_back()


def join(where: str) -> None:
  """Meets the other processes and starts JAX (`connect`, `start_jax`)."""
  connect(where)
  start_jax()


def leave() -> None:
  """Waits until all processes have come to their end, and disconnects. Does nothing in a run of one process."""
  if _run.link is not None:
    _run.link.leave()
    jax.distributed.shutdown()


def configure(*, wait_s: float, check: bool) -> None:
  """Sets the time limit of exchanges, and whether they compare what was `decided`."""
  _run.wait_s, _run.check = wait_s, check


def exchange(value: Any, what: str, *, limited: bool = True) -> list[Any]:
  """The JSON values of all processes, in their order. All processes must call it, in the same order of calls.

  If a process does not come within the time limit, all end with a line that names it and `what`.

  Args:
    what: names the exchange, for errors; the same in every process.
    limited: whether the time limit holds. A process that is gone ends the wait in any case.

  Raises:
    ProcessesDiffer: what was `decided` since the last exchange differs.
  """
  body = json.dumps({"value": value, "decided": _run.decided}).encode()
  _run.decided = []
  if _run.link is None:
    if jax.process_count() > 1:
      raise RuntimeError("several processes exchange values only if JAX was started by hosts.join")
    return [json.loads(body)["value"]]
  began = time.monotonic()
  bodies, waited = _run.link.exchange(body, what, _run.wait_s if limited else None)
  for name, more in (
    ("exchange/bytes", len(body) + sum(map(len, bodies))),
    ("exchange/ms", 1000 * (time.monotonic() - began - waited)),
    ("exchange/wait_ms", 1000 * waited),
  ):
    _run.spent[name] = _run.spent.get(name, 0.0) + more
  parts = [json.loads(body) for body in bodies]
  _compare([part["decided"] for part in parts], before=what)
  return [part["value"] for part in parts]


def decided(value: Any, what: str) -> None:
  """Notes a decision, as JSON, on which the course of the program depends. The next exchange compares it, if asked to."""
  if _run.check:
    _run.decided.append((what, zlib.crc32(json.dumps(value, sort_keys=True).encode())))


def _compare(notes: list[list[list]], before: str) -> None:
  """Raises ProcessesDiffer if the decisions of some process are not those of process 0."""
  for index, other in enumerate(notes):
    for number in range(max(len(notes[0]), len(other))):
      one, two = (side[number : number + 1] for side in (notes[0], other))
      if one != two:
        raise ProcessesDiffer(
          f"process {index} decided differently from process 0: {(one or two)[0][0]} (decision {number + 1} before the"
          f" exchange of {before})"
        )


def spent() -> dict[str, float]:
  """Bytes and milliseconds of the exchanges since the last call, as metrics; empty in a run of one process.

  exchange/ms is without the wait for the slowest process, which is exchange/wait_ms.
  """
  found, _run.spent = _run.spent, {}
  return found


def first_alone(make: Callable[[], object], what: str) -> None:
  """Calls `make` in the first process only. The others wait until it is done, however long; `what` as in `exchange`."""
  if jax.process_index() == 0:
    make()
  exchange(None, what, limited=False)


def index() -> int:
  """The number of this process, also before JAX has started."""
  return _run.place.index if _run.place is not None else 0


def fail(line: str, code: int, *, user: bool) -> Ending | None:
  """Reports that this process has failed. Returns what all processes end with; None in a run of one process.

  Args:
    line, code: what this process would print, and exit with.
    user: whether it is a bad request.
  """
  return _run.link.fail(line, code, user) if _run.link is not None else None
