"""A process's connection to the hub. A thread of its own serves it, also while the main thread computes or compiles.

The thread ends the process when the hub says so, or when the hub is gone: with one line, and without waiting for the
main thread, which may be in a collective that nobody will complete.
"""

import asyncio
import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

from nemocascade.errors import LOST
from nemocascade.runtime import wire
from nemocascade.runtime.ending import RESUME, Ending, NotAdmitted, end, guarded
from nemocascade.runtime.hub import PING, SILENCE, TICK, Hub, ticks
from nemocascade.runtime.meeting import Place


class Link:
  """The connection of one process. Public methods are called from the main thread."""

  def __init__(self, place: Place, *, connect_s: float, grace_s: float):
    """Connects, and waits until all processes have. Starts the hub if this is process 0.

    Args:
      place: where process 0 listens, and who this process is.
      connect_s: time limit until all have connected.
      grace_s: time limit from SIGTERM to the end of a step.

    Raises:
      NotAdmitted: they did not all come, or this process is not admitted.
    """
    self._place = place
    self._connect_s, self._grace_s = connect_s, grace_s
    self._answers: queue.Queue = queue.Queue()  # For the main thread: ("welcome" | "values" | "bye", header, body).
    self._endings: queue.Queue | None = None  # Takes the ending if the main thread waits for it.
    self._lock = threading.Lock()  # Guards the one above, and the next two.
    self._passed, self._stop_asked = 0, False  # Steps passed; whether the hub has been told.
    self._stop_at, self._stop_known = 0, threading.Event()
    self.saves = False  # Whether a loop runs that saves when it is asked to stop.
    self._over = self._left = False  # The run has ended; it has ended in order.
    self._zero, self._heard = f"process 0 ({place.host}:{place.port})", time.monotonic()
    self._loop = asyncio.new_event_loop()
    threading.Thread(target=self._loop.run_forever, name="hosts", daemon=True).start()
    self._endings = queue.Queue()  # Until all are there, the main thread says why they are not.
    if place.index == 0:
      self._start_hub()
    self._spawn(self._connect())
    while True:
      with contextlib.suppress(queue.Empty):
        _, welcome, _ = self._answers.get(timeout=TICK)
        break
      if not self._endings.empty():
        raise NotAdmitted(self._endings.get())
    with self._lock:
      waiting, self._endings, self._zero = self._endings, None, welcome["zero"]
    if not waiting.empty():
      raise NotAdmitted(waiting.get())
    self.jax_port: int = welcome["jax_port"]  # Of JAX's coordination service, on the machine of process 0.

  def exchange(self, body: bytes, what: str, limit: float | None) -> tuple[list[bytes], float]:
    """The bodies of all processes, and the seconds for which this one waited for the last of them."""
    self._send("value", body, what=what, limit=limit)
    _, header, whole = self._answers.get()
    bodies, start = [], 0
    for size in header["sizes"]:
      bodies.append(whole[start : start + size])
      start += size
    return bodies, header["waited"][self._place.index]

  def fail(self, line: str, code: int, user: bool) -> Ending:
    """Reports that this process has failed. Returns what all processes end with."""
    if self._left:
      return Ending(line, code)
    with self._lock:
      self._endings = queue.Queue()
    self._send("failed", line=line, code=code, user=user)
    try:
      return self._endings.get(timeout=2 * SILENCE)
    except queue.Empty:
      return Ending(line, code)

  def leave(self) -> None:
    """Waits until all processes have come to their end."""
    self._send("done")
    self._answers.get()

  def terminated(self) -> None:
    """Reports SIGTERM. May be called from any thread."""
    self._send("terminated")

  def passing(self) -> bool:
    """Whether all processes stop at this end of a step. All call it equally often.

    The step is the first that no process had passed when the hub asked; each answers from the link's thread. So no
    process waits here for one that computes.
    """
    with self._lock:
      if not self._stop_asked:
        self._passed += 1
        return False
    self._stop_known.wait()
    self._passed += 1
    if self._passed >= self._stop_at:
      self._send("saving")
    return self._passed >= self._stop_at

  def forward(self) -> int:
    """The port of this machine at which JAX reaches its coordination service, through process 0's port.

    JAX's client aborts the process, with a stack trace, at the moment when its connection ends. Here it stays
    open when process 0 dies, so that the link can end the process with its line.
    """
    if self._place.index == 0:
      return self.jax_port

    async def serve() -> int:
      server = await asyncio.start_server(self._carry, host="127.0.0.1", port=0)
      self._server = server  # Keeps it from being collected.
      return server.sockets[0].getsockname()[1]

    return asyncio.run_coroutine_threadsafe(serve(), self._loop).result()

  async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
      other = await asyncio.open_connection(self._place.host, self._place.port)
      wire.prepare(other[1])
      other[1].write(wire.packed("forward"))
      outward = asyncio.create_task(wire.copy(reader, other[1]))
      await wire.copy(other[0], writer)
      outward.cancel()
    while not self._left:  # Keeps JAX's side open.
      await asyncio.sleep(TICK)
    writer.close()

  def _start_hub(self) -> None:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      jax_port = free.getsockname()[1]
    self._hub = Hub(self._place.count, self._connect_s, self._grace_s, jax_port)
    # If the port is taken, then perhaps by another process 0: its hub says so.
    with contextlib.suppress(OSError):
      asyncio.run_coroutine_threadsafe(self._hub.serve(self._place.port), self._loop).result()

  async def _connect(self) -> None:
    """Tries until the hub answers with a welcome or an end, then serves the connection."""
    until = time.monotonic() + self._connect_s + 2 * PING  # The hub's own limit comes first.
    while time.monotonic() < until:
      with contextlib.suppress(OSError, TimeoutError):
        address = "127.0.0.1" if self._place.index == 0 else self._place.host
        reader, self._writer = await asyncio.wait_for(asyncio.open_connection(address, self._place.port), 10)
        wire.prepare(self._writer)
        hello = {
          "count": self._place.count,
          "index": self._place.index,
          "host": socket.gethostname(),
          "pid": os.getpid(),
        }
        self._writer.write(wire.packed("hello", **hello))
        self._heard = time.monotonic()
        clock = asyncio.create_task(guarded(self._watch()))
        if await self._serve(reader):
          return
        clock.cancel()
        self._writer.close()
      await asyncio.sleep(TICK)
    self._end(Ending(f"error: {self._zero} did not answer within {self._connect_s:g} s (--connect_s)", LOST))

  async def _serve(self, reader: asyncio.StreamReader) -> bool:
    """Serves the connection until it ends. Returns whether the hub had answered at all."""
    answered = False
    while message := await wire.received(reader):
      self._heard = time.monotonic()
      header, body = message
      kind = header["kind"]
      if kind in ("welcome", "values", "bye"):
        answered = True
        self._over = self._left = kind == "bye"
        self._answers.put((kind, header, body))
      elif kind == "passed?":
        with self._lock:
          self._stop_asked = True
          steps = self._passed
        self._writer.write(wire.packed("passed", steps=steps, saves=self.saves))
      elif kind == "stop at":
        self._stop_at = header["step"]
        self._stop_known.set()
      elif kind == "end":
        self._end(Ending(header["line"], header["code"], header["quiet"], header["cause"]))
        return True
    if answered and not self._over:
      self._end(
        Ending(f"stopped: {self._zero} is gone without a word (killed, out of memory, or crashed); {RESUME}", LOST)
      )
    return answered

  async def _watch(self) -> None:
    """Gives signs of life, and ends the process if the hub gives none."""
    async for now, held, ping in ticks(lambda: self._over):
      if held:  # The hub is heard anew.
        self._heard = now
      if ping:
        self._writer.write(wire.packed("ping"))
      if now - self._heard > SILENCE:
        why = f"has not answered for {SILENCE:g} s (stopped, hung, or unreachable)"
        self._end(Ending(f"stopped: {self._zero} {why}; {RESUME}", LOST))

  def _end(self, ending: Ending) -> None:
    """Ends the process with the ending, or hands it to the main thread if that waits for it."""
    with self._lock:
      if self._over:
        return
      self._over = True
      if self._endings is not None:
        self._endings.put(ending)
        return
    end(ending)

  def _send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
    """Sends a message from any thread."""
    message = wire.packed(kind, body, **fields)

    async def write() -> None:
      with contextlib.suppress(OSError):
        self._writer.write(message)

    self._spawn(write())

  def _spawn(self, work: Coroutine) -> None:
    asyncio.run_coroutine_threadsafe(guarded(work), self._loop)
