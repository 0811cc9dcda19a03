"""Runs inside the sandbox for the Python tool: executes code, request by request, in one namespace.

A request is a random name (8 bytes), the length of the code (8 bytes, little-endian), and the code
(UTF-8). The answer is everything that the code writes; a line with the request's name on the control
file marks its end. The code can do anything to this process, so the process outside trusts nothing
that it writes.
"""

CONTROL, NAME_BYTES = 3, 8
READY = b"\0" * NAME_BYTES  # The name that is answered when the session has started.


def reply(name):
  """The line on the control file that marks the end of the answer to the request of this name."""
  return b"\n" + name.hex().encode() + b"\n"


def run(code, name, namespace):
  """Runs the code like a notebook cell: prints the value of a final expression, or the traceback."""
  import ast
  import linecache
  import sys
  import traceback

  lines = code.splitlines(keepends=True)
  linecache.cache[name] = (len(code), None, lines, name)  # Tracebacks show the lines.
  try:
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is not None:
      value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
      if value is not None:
        namespace["_"] = value
        print(repr(value))
  except SystemExit:
    print("SystemExit: the session goes on")
  except BaseException as error:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
      trace = trace.tb_next  # Skips the frames of this file.
    traceback.print_exception(type(error), error, trace, file=sys.stdout)


def read(fd, size):
  """Reads exactly `size` bytes; returns b"" if the input ends first."""
  import os

  data = b""
  while len(data) < size:
    part = os.read(fd, size - len(data))
    if not part:
      return b""
    data += part
  return data


def serve():
  """Answers requests until stdin ends."""
  import os
  import sys

  requests = os.dup(0)
  empty, end = os.pipe()
  os.close(end)
  os.dup2(empty, 0)  # The code gets an empty stdin. /dev/null cannot be opened in the sandbox.
  sys.stderr = sys.__stderr__ = sys.stdout  # type: ignore[misc]  # One stream keeps the order of what is written.
  module = type(sys)("__main__")
  sys.modules["__main__"] = module
  number = 0
  os.write(CONTROL, reply(READY))
  while name := read(requests, NAME_BYTES):
    number += 1
    size = int.from_bytes(read(requests, 8), "little")
    code = read(requests, size).decode("utf-8", "replace")
    sys.stdin = open(0, closefd=False)  # Reopened, because `exit()` in the code closes it.
    run(code, f"<call {number}>", module.__dict__)
    try:
      sys.stdout.flush()
    except (OSError, ValueError):  # The code closed stdout: its output is lost, its state is kept.
      sys.stdout = sys.stderr = open(1, "w", closefd=False)
    os.write(CONTROL, reply(name))


if __name__ == "__main__":
  serve()
