"""The meeting point of the processes of a run, a part of process 0: who is there, what they exchange, why they end.

Every process, process 0 too, has one connection to the hub (`link`). The hub decides alone when the run ends before
its time, and tells all processes the same line and exit code:

  - a process is gone (its connection ended), or silent for SILENCE seconds (stopped, hung, unreachable);
  - some processes have not come to an exchange within its time limit, or are in another exchange;
  - a process reports an error. The hub waits a moment for the others: if all report the same, it is printed once;
  - SIGTERM reached a process, and no step ended within the grace.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

from nemocascade.errors import LOST, TERMINATED
from nemocascade.runtime import wire
from nemocascade.runtime.ending import RESUME, guarded

TICK = 0.25  # Seconds between two looks at the clock.
PING = 2.0  # Seconds between two signs of life.
SILENCE = 20.0  # Seconds after which a process counts as lost. Gloo's own time limit is 30 s, and prints less.
HELD = 5.0  # Seconds that a tick may be late. If it is later, this process itself was stopped.
ALIKE = 10.0  # Seconds that a bad request waits for the same one in processes that still compute.


async def ticks(over: Callable[[], bool]) -> AsyncIterator[tuple[float, bool, bool]]:
  """Yields (time now, whether this process itself was stopped since the last tick, whether to give a sign of life).

  It yields every TICK seconds until `over` is true.
  """
  pinged = 0.0
  while not over():
    before = time.monotonic()
    await asyncio.sleep(TICK)
    now = time.monotonic()
    ping = now - pinged >= PING
    if ping:
      pinged = now
    yield now, now - before > TICK + HELD, ping


@dataclasses.dataclass
class Error:
  """What a process failed with."""

  line: str
  code: int
  user: bool  # A bad request (UserError).
  at: float


@dataclasses.dataclass
class Member:
  """A process, as the hub knows it."""

  index: int
  host: str
  pid: int
  writer: asyncio.StreamWriter
  heard: float
  failed: Error | None = None
  done: bool = False
  saving: bool = False  # Has come to the step at which it saves after SIGTERM.
  passed: int | None = None  # Steps that it had passed when it was asked to stop.
  arrived: tuple[wire.Header, bytes, float] | None = None  # Its part of the exchange that goes on, and when it came.

  @property
  def name(self) -> str:
    return f"process {self.index} ({self.host}, pid {self.pid})"

  def send(self, kind: str, body: bytes = b"", **fields) -> None:
    self.write(wire.packed(kind, body, **fields))

  def write(self, message: bytes) -> None:
    if not self.writer.is_closing():
      self.writer.write(message)


class Hub:
  """Serves the processes of one run. All its methods run in one event loop."""

  def __init__(self, count: int, connect_s: float, grace_s: float, jax_port: int):
    """
    Args:
      count: the processes.
      connect_s: time limit until all have connected.
      grace_s: time limit from SIGTERM to the end of a step.
      jax_port: the port on this machine at which JAX's coordination service will listen.
    """
    self._count, self._connect_s, self._grace_s, self._jax_port = count, connect_s, grace_s, jax_port
    self._members: dict[int, Member] = {}
    self._began = time.monotonic()
    self._complete = self._over = False
    self._asked: tuple[str, float] | None = None  # Who got SIGTERM, and when.
    self._arrived: list[Member] = []  # The processes that have come to the exchange that goes on.
    self._last: dict = {}  # Why the run has ended.

  async def serve(self, port: int) -> None:
    """Starts to serve. Raises OSError if the port is taken."""
    try:
      self._server = await asyncio.start_server(self._connected, port=port, limit=1 << 20)
    except OSError:  # Perhaps a machine without IPv6.
      self._server = await asyncio.start_server(self._connected, host="0.0.0.0", port=port, limit=1 << 20)
    self._clock = asyncio.create_task(guarded(self._watch()))

  async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
      wire.prepare(writer)
      try:
        first = await asyncio.wait_for(wire.received(reader), 10)
      except TimeoutError:
        first = None
      if first is not None and first[0]["kind"] == "hello":
        await self._serve_member(first[0], reader, writer)
      elif first is not None and first[0]["kind"] == "forward":
        other = await asyncio.open_connection("127.0.0.1", self._jax_port)
        await wire.copy_both((reader, writer), other)
        other[1].close()
    writer.close()

  async def _serve_member(self, hello: wire.Header, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    new = Member(hello["index"], hello["host"], hello["pid"], writer, time.monotonic())
    if self._over:  # The newcomer of a whole run tries again, and meets the next one.
      if not self._complete:
        self._tell(new)
      return
    if not await self._admitted(new, hello["count"]):
      return
    self._members[new.index] = new
    if len(self._members) == self._count:
      self._complete = True
      for member in self._members.values():
        member.send("welcome", jax_port=self._jax_port, zero=self._members[0].name)
    while message := await wire.received(reader):
      new.heard = time.monotonic()
      await self._take(new, *message)
    new.writer.close()
    if not self._over and not new.failed:
      await self._end(
        f"stopped: {new.name} is gone without a word (killed, out of memory, or crashed); {RESUME}", LOST, cause=new
      )

  async def _admitted(self, new: Member, count: int) -> bool:
    """Whether the process may take part. If not, it is told why; before all are there, so are the others."""
    there = self._members.get(new.index)
    if count != self._count:
      line = f"--distributed: {new.name} says {count} processes, and process 0 says {self._count}"
    elif not 0 <= new.index < count:
      line = f"--distributed: {new.name}: INDEX is from 0 to {count - 1}"
    elif there is not None and self._complete:
      line = f"--distributed: index {new.index} is taken by pid {there.pid} on {there.host}, in a run that goes on"
    elif there is not None:
      line = (
        f"--distributed: index {new.index} is given twice, to pid {there.pid} on {there.host}"
        f" and to pid {new.pid} on {new.host}"
      )
    else:
      return True
    new.send("end", line=f"error: {line}", code=2, quiet=not self._complete and new.index != 0, cause=None)
    with contextlib.suppress(OSError, TimeoutError):
      await asyncio.wait_for(new.writer.drain(), 2)
    if not self._complete:
      await self._end(f"error: {line}", 2, quiet=True)
    return False

  async def _take(self, member: Member, header: wire.Header, body: bytes) -> None:
    """Acts on a message of a process."""
    kind = header["kind"]
    if kind == "value":
      member.arrived = header, body, time.monotonic()
      await self._exchange(member)
    elif kind == "failed":
      member.failed = Error(header["line"], header["code"], header["user"], time.monotonic())
      await self._judge()
    elif kind == "done":
      member.done = True
      if self._complete and all(m.done for m in self._members.values()):
        self._over = True
        for one in self._members.values():
          one.send("bye")
    elif kind == "terminated" and self._asked is None:
      self._asked = member.name, time.monotonic()
      for one in self._members.values():
        one.send("passed?")
    elif kind == "passed":
      member.passed = header["steps"]
      if not header["saves"]:
        await self._terminate("before its first step")
      elif all(m.passed is not None for m in self._members.values()):
        last = max(m.passed or 0 for m in self._members.values())
        for one in self._members.values():
          one.send("stop at", step=last + 1)
    elif kind == "saving":
      member.saving = True

  async def _exchange(self, member: Member) -> None:
    """Takes a process's part of an exchange, and answers once all have come to it. The work for one does not grow with
    the number of processes."""
    self._arrived.append(member)
    first, (header, _, _) = self._arrived[0], member.arrived
    if header["what"] != first.arrived[0]["what"]:
      said = " and ".join(f"{m.name} is at {m.arrived[0]['what']!r}" for m in (first, member))
      await self._end(f"error: the processes went different ways: {said}", 1)
    elif len(self._arrived) == self._count:
      everyone, self._arrived = sorted(self._arrived, key=lambda m: m.index), []
      bodies, times = [m.arrived[1] for m in everyone], [m.arrived[2] for m in everyone]
      waited = [round(max(times) - at, 6) for at in times]
      message = wire.packed("values", b"".join(bodies), sizes=[len(body) for body in bodies], waited=waited)
      for m in everyone:
        m.arrived = None
        m.write(message)

  async def _watch(self) -> None:
    """Looks at the clock until the run is over."""
    async for now, held, ping in ticks(lambda: self._over):
      for member in self._members.values():
        if held:  # The others are heard anew.
          member.heard = now
        if ping:
          member.send("ping")
      await self._judge()

  async def _judge(self) -> None:
    """Ends the run if there is a reason for it now."""
    now, members = time.monotonic(), list(self._members.values())
    absent = [str(i) for i in range(self._count) if i not in self._members]
    if absent and now - self._began > self._connect_s:
      who = f"process{'es' * (len(absent) > 1)} {', '.join(absent)} of {self._count}"
      await self._end(f"error: {self._connect_s:g} s passed without {who} (--connect_s)", LOST, quiet=True)
    for member in members:
      if now - member.heard > SILENCE:
        why = f"has not answered for {SILENCE:g} s (stopped, hung, or unreachable)"
        await self._end(f"stopped: {member.name} {why}; {RESUME}", LOST, cause=member)
    waiting = [m for m in members if m.arrived is not None]
    if waiting:
      header, _, since = min((m.arrived for m in waiting if m.arrived), key=lambda a: a[2])
      if header["limit"] and now - since > header["limit"]:
        late = ", ".join(m.name for m in members if m.arrived is None)
        await self._end(
          f"stopped: {late} did not come to the exchange of {header['what']} in {header['limit']:g} s (--wait_s);"
          f" {RESUME}", LOST,
        )  # fmt: skip
    if self._asked and now - self._asked[1] > self._grace_s and not all(m.saving for m in members):
      await self._terminate(f"and no step ended within {self._grace_s:g} s (--grace_s)")
    await self._judge_errors(now, members)

  async def _judge_errors(self, now: float, members: list[Member]) -> None:
    """Ends the run for an error that a process reported, once it is known whether all have it."""
    failed = sorted((m for m in members if m.failed), key=lambda m: m.failed.at if m.failed else 0.0)
    if not failed:
      return
    first, error = failed[0], failed[0].failed
    assert error is not None
    # Others can fail alike while they compute. Of a failure that comes from the death of a process, that death is
    # the reason: each other process must have been heard since.
    alike = (m.arrived or m.done or now - error.at > ALIKE for m in members if not m.failed)
    heard = (m.heard > error.at + PING / 2 for m in members if not m.failed)
    if len(failed) < self._count and not all(alike if error.user else heard):
      return
    if len({m.failed.line for m in failed if m.failed}) == 1 and len(failed) == self._count:
      await self._end(error.line, error.code, quiet=True)
    else:
      await self._end(
        f"stopped: {first.name}: {error.line}", error.code, cause=first, quiet=error.user and first.index == 0
      )

  async def _terminate(self, why: str) -> None:
    assert self._asked is not None
    await self._end(f"stopped: {self._asked[0]} got SIGTERM {why}; {RESUME}", TERMINATED)

  async def _end(self, line: str, code: int, cause: Member | None = None, quiet: bool = False) -> None:
    """Tells all processes to end, process 0 last, since the hub ends with it.

    Args:
      cause: the process that the line is about.
      quiet: only process 0 prints the line.
    """
    if self._over:
      return
    self._over = True
    self._last = {"line": line, "code": code, "quiet": quiet, "cause": cause.index if cause else None}
    for member in sorted(self._members.values(), key=lambda m: -m.index):
      if member.index == 0:
        drains = [m.writer.drain() for m in self._members.values() if m.index]
        with contextlib.suppress(TimeoutError):
          await asyncio.wait_for(asyncio.gather(*drains, return_exceptions=True), 2)
      self._tell(member)

  def _tell(self, member: Member) -> None:
    """Sends the end of the run."""
    member.send("end", **self._last | {"quiet": self._last["quiet"] and member.index > 0})
