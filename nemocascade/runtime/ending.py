"""How a process of several ends: with a line and an exit code that all share, at once, whatever its threads do."""

import contextlib
import dataclasses
import os
import sys
import threading
import traceback
from collections.abc import Coroutine

from nemocascade.errors import FAILURE

RESUME = "the same command resumes"


@dataclasses.dataclass(frozen=True)
class Ending:
  """Why the run ends. `cause` is the index of the process that the line is about, if it is about one."""

  line: str
  code: int
  quiet: bool = False  # This process does not print the line.
  cause: int | None = None


class NotAdmitted(Exception):
  """The processes did not all meet, or this one may not take part."""

  def __init__(self, ending: Ending):
    super().__init__(ending.line)
    self.ending = ending


def end(ending: Ending) -> None:
  """Prints the line and ends the process, without waiting for its other threads."""

  def say() -> None:
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      if not ending.quiet:
        os.write(2, f"{ending.line}\n".encode())

  # Another thread may hold the stream's lock for ever.
  saying = threading.Thread(target=say, daemon=True)
  saying.start()
  saying.join(2)
  os._exit(ending.code)


async def guarded(work: Coroutine) -> None:
  """Awaits the work of a thread that the run depends on. A failure of it ends the process."""
  try:
    await work
  except Exception as error:
    traceback.print_exception(error)
    end(Ending(f"error: {type(error).__name__}: {error}", FAILURE))
