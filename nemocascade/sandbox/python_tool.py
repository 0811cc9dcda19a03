"""The Python tool: runs code in a sandbox and keeps its variables between calls.

Its name, its 120 s timeout and the limit of 100 calls are those of the Nemotron-Cascade 2 report
(arXiv 2603.19220, section 3.1.2 and appendix A) and its model card.
"""

import contextlib
import os
import pathlib
import selectors
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from nemocascade.errors import UserError
from nemocascade.sandbox import python_session
from nemocascade.sandbox.program import Limits, Program
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.sandbox.worker import MB

NAME = "stateful_python_code_exec"
TIMEOUT_S = 120.0  # Wall time of one call.
MOST_CALLS = 100  # Per conversation.
MOST_SHOWN = 10_000  # Characters of a result; the middle of a longer one is cut out.
MEMORY_MB = 1024  # Address space of the session's process, in MB of 2^20 bytes.
POLL_S = 0.05  # Interval between checks of the deadline and of `stopped`.
START_S = 60.0  # Wall time for starting a session; it does not count against TIMEOUT_S.
_OUTPUT_BYTES = MB  # Largest output of one call.
_SOURCE = pathlib.Path(python_session.__file__).read_text()


class PythonTool:
  """The session of one conversation. The first call starts its process, in the calling thread."""

  def __init__(self, sandbox: Sandbox, *, timeout_s: float = TIMEOUT_S, most_calls: int = MOST_CALLS):
    if timeout_s <= 0 or most_calls < 1:
      raise UserError(f"python tool: {timeout_s=} must be above 0, {most_calls=} at least 1")
    self.timeout_s, self.most_calls, self.calls = timeout_s, most_calls, 0
    self._sandbox = sandbox
    self._session: _Session | None = None

  @property
  def schema(self) -> dict[str, Any]:
    """The tool's description for the model, in OpenAI form."""
    return {
      "type": "function",
      "function": {
        "name": NAME,
        "description": (
          "Runs Python code in a session that keeps its variables from call to call, as a notebook "
          "does. Answers with what the code printed and the value of its last line, or times out "
          f"after {self.timeout_s:g} seconds."
        ),
        "parameters": {
          "type": "object",
          "properties": {"code": {"type": "string", "description": "The code to run."}},
          "required": ["code"],
        },
      },
    }

  def call(self, name: str, arguments: Mapping[str, str], *, stopped: Callable[[], bool] = lambda: False) -> str:
    """Runs one call and returns its result as text for the model. Errors begin with "error:".

    Args:
      name: must be NAME.
      arguments: must be {"code": ...}.
      stopped: polled while the code runs. If it returns True, the session is ended.
    """
    if name != NAME:
      return f"error: there is no tool {name!r}, only {NAME!r}"
    if set(arguments) != {"code"}:
      given = ", ".join(sorted(arguments)) or "none"
      return f"error: {NAME} takes one parameter 'code', given: {given}"
    if self.calls >= self.most_calls:
      return f"error: all {self.most_calls} calls of this conversation are used"
    self.calls += 1
    try:
      if self._session is None:
        self._session = _Session(self._sandbox, self.timeout_s * self.most_calls)
      output, ended = self._session.run(arguments["code"], self.timeout_s, stopped)
    except OSError as error:
      output, ended = "", f"the session failed ({error})"
    if ended:
      self._end()
      ended = f"error: {ended}; the session was started anew and its variables are gone"
    return "\n".join(part for part in (_shortened(output).rstrip("\n"), ended) if part)

  def reset(self) -> None:
    """Prepares for a new conversation: drops all variables and resets the count of calls."""
    self._end()
    self.calls = 0

  def _end(self) -> None:
    if self._session is not None:
      self._session.close()
      self._session = None


class _Session:
  """A confined process and our ends of its pipes."""

  def __init__(self, sandbox: Sandbox, cpu_s: float):
    limits = Limits(cpu_s=cpu_s, memory_mb=MEMORY_MB)
    worker = sandbox.session(limits)
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
      ours.callback(worker.close)
      pipes = [os.pipe() for _ in range(3)]
      stdin, self._requests = pipes[0]
      (self._output, stdout), (self._control, control) = pipes[1:]
      for fd in (self._requests, self._output, self._control):
        os.set_blocking(fd, False)
        ours.callback(os.close, fd)
      for fd in (stdin, stdout, control):
        theirs.callback(os.close, fd)
      worker.start(Program({"main.py": _SOURCE}), [stdout, stdout, control], stdin=stdin)
      kept = ours.pop_all()
    self.close = weakref.finalize(self, kept.close)
    output, ended = self._until_done(python_session.READY, b"", START_S, lambda: False)
    if ended:
      self.close()
      raise OSError(f"it did not start: {ended} {output.strip()[-200:]}".strip())

  def run(self, code: str, timeout_s: float, stopped: Callable[[], bool]) -> tuple[str, str]:
    """Runs code. Returns (output, reason why the session must be ended, or "")."""
    data = code.encode("utf-8", "replace")
    # The name is fresh, so code of an earlier request cannot have faked the answer to it.
    name = os.urandom(python_session.NAME_BYTES)
    request = name + len(data).to_bytes(8, "little") + data
    return self._until_done(name, request, timeout_s, stopped)

  def _until_done(self, name: bytes, data: bytes, timeout_s: float, stopped: Callable[[], bool]) -> tuple[str, str]:
    """Sends the data and reads until the session answers to the name, or must be ended."""
    deadline = time.monotonic() + timeout_s
    request, awaited, control = memoryview(data), python_session.reply(name), b""
    output, ended = b"", ""
    with selectors.DefaultSelector() as selector:
      if request:
        selector.register(self._requests, selectors.EVENT_WRITE)
      for fd in (self._output, self._control):
        selector.register(fd, selectors.EVENT_READ)
      done = False
      while not done and not ended:
        for key, _ in selector.select(POLL_S):
          if key.fd == self._requests:
            request = request[_write(key.fd, request) :]
            if not request:
              selector.unregister(key.fd)
          elif key.fd == self._output:
            part = _read(key.fd)
            output += part or b""
            if part == b"":
              selector.unregister(key.fd)  # The code closed its output; control may still be open.
          else:
            told = _read(key.fd)
            control += told or b""
            done = awaited in control
            control = control[-len(awaited) :]
            ended = "the process ended" if told == b"" else ""
        if len(output) > _OUTPUT_BYTES:
          ended = f"the code wrote over {_OUTPUT_BYTES} bytes"
        elif not done and not ended and stopped():
          ended = "the user stopped the code"
        elif not done and not ended and time.monotonic() > deadline:
          ended = f"no result within {timeout_s:g} seconds"
    while part := _read(self._output):  # Output written before the end was announced on control.
      output += part
      if len(output) > _OUTPUT_BYTES:
        break
    return output.decode("utf-8", "replace"), ended


def _read(fd: int) -> bytes | None:
  """The available bytes; b"" at the end of the file, None if nothing is available yet."""
  try:
    return os.read(fd, 1 << 16)
  except BlockingIOError:
    return None


def _write(fd: int, data: memoryview) -> int:
  try:
    return os.write(fd, data)
  except BlockingIOError:
    return 0


def _shortened(text: str) -> str:
  """The text, or its beginning and end if it is longer than MOST_SHOWN."""
  if len(text) <= MOST_SHOWN:
    return text
  half = MOST_SHOWN // 2
  return f"{text[:half]}\n... {len(text) - 2 * half} characters are left out ...\n{text[-half:]}"
