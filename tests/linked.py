"""Runs a script in several linked processes without JAX: `link` is this one's connection, `index` its number."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Short times, so that what takes a minute in a run takes a second here.
BEGIN = """
import os, signal, sys, threading, time
from nemocascade.runtime import hub, link as links
from nemocascade.runtime.ending import NotAdmitted, end
from nemocascade.runtime.meeting import Place
hub.PING = links.PING = 0.1
hub.SILENCE = links.SILENCE = 2.0
hub.ALIKE = 3.0
index, count, port, connect_s, grace_s = (float(word) for word in sys.argv[1:])
index = int(index)
def say(*words):
  print(*words, flush=True)
say(os.getpid())
try:
  link = links.Link(Place("127.0.0.1", int(port), int(count), index), connect_s=connect_s, grace_s=grace_s)
except NotAdmitted as error:
  end(error.ending)
signal.signal(signal.SIGTERM, lambda *_: link.terminated())
def fail(line, code=2, user=True):
  end(link.fail(line, code, user))
def exchange(body, what="words", limit=600.0):
  return link.exchange(body, what, limit)[0]
"""
END = """
link.leave()
"""


@dataclasses.dataclass
class Ended:
  """How a process ended: its exit code, its pid and what it printed."""

  code: int
  pid: int
  out: str
  err: str


class Processes:
  """The processes of a script. Use it in a `with`: none outlives it."""

  def __init__(self, script: str, *indices: int, count: int = 0, connect_s: float = 30, grace_s: float = 20):
    """
    Args:
      indices: of the processes to start.
      count: what they say is the number of processes; by default as many as are started.
    """
    self.address = free_address()
    self._started: dict[int, subprocess.Popen] = {}
    self.pids: dict[int, int] = {}
    self._ended: dict[int, Ended] = {}
    for i in indices:
      self.start(script, i, count or len(indices), connect_s, grace_s)

  def start(self, script: str, index: int, count: int, connect_s: float = 30, grace_s: float = 20) -> None:
    """Starts one more process of the script."""
    self.run(BEGIN + script + END, *map(str, (index, count, self.address.split(":")[1], connect_s, grace_s)))

  def run(self, code: str, *words: str) -> None:
    """Starts a process of other code. It must print its pid first."""
    self._started[len(self._started)] = subprocess.Popen(
      [sys.executable, "-c", code, *words], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

  def __enter__(self) -> "Processes":
    return self

  def __exit__(self, *_) -> None:
    for process in self._started.values():
      process.kill()
      process.communicate()

  def wait_for(self, number: int, line: str) -> None:
    """Waits until the process that was started as `number` prints the line."""
    stream = self._started[number].stdout
    while said := stream.readline():
      if said.strip().isdecimal():
        self.pids[number] = int(said)
      if said.strip() == line:
        return
    raise AssertionError(f"process {number} ended: {self._started[number].stderr.read()}")

  def signal(self, number: int, kind: signal.Signals) -> None:
    self._started[number].send_signal(kind)

  def end(self, number: int) -> Ended:
    """Waits for the end of a process."""
    if number not in self._ended:
      process = self._started[number]
      out, err = process.communicate(timeout=60)
      if number not in self.pids:
        first, _, out = out.partition("\n")
        self.pids[number] = int(first)
      self._ended[number] = Ended(process.returncode, self.pids[number], out, err)
    return self._ended[number]


def free_address() -> str:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"
