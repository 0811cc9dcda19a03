"""What runs inside the sandbox for the Python tool: code comes, runs in one namespace, and is answered.

A request is 8 bytes of a name that was drawn for it, 8 bytes of length, then the code. The answer is
all that the code wrote; a line on the control file that holds the request's name says that it is
complete. The code may do to this process as it likes: the one outside believes nothing.
"""

CONTROL, NAME_BYTES = 3, 8
READY = b"\0" * NAME_BYTES  # The name of what was asked for at first: to begin.


def reply(name):
  """What the control file is told when the request of this name is answered: a line of its own."""
  return b"\n" + name.hex().encode() + b"\n"


def run(code, name, namespace):
  """Runs the code as a notebook's cell: the value of a last expression is shown."""
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
      trace = trace.tb_next  # Frames of this file tell nothing.
    traceback.print_exception(type(error), error, trace, file=sys.stdout)


def read(fd, size):
  """Exactly `size` bytes, or b"" at the end."""
  import os

  data = b""
  while len(data) < size:
    part = os.read(fd, size - len(data))
    if not part:
      return b""
    data += part
  return data


def serve():
  """Until no more code comes."""
  import os
  import sys

  requests = os.dup(0)
  empty, end = os.pipe()
  os.close(end)
  os.dup2(empty, 0)  # The code's own stdin; /dev/null cannot be opened in here.
  sys.stderr = sys.__stderr__ = sys.stdout  # In the order in which it is written.
  module = type(sys)("__main__")
  sys.modules["__main__"] = module
  number = 0
  os.write(CONTROL, reply(READY))
  while name := read(requests, NAME_BYTES):
    number += 1
    size = int.from_bytes(read(requests, 8), "little")
    code = read(requests, size).decode("utf-8", "replace")
    sys.stdin = open(0, closefd=False)  # exit() closes it.
    run(code, f"<call {number}>", module.__dict__)
    try:
      sys.stdout.flush()
    except (OSError, ValueError):  # The code closed it: what it wrote is lost, its state is not.
      sys.stdout = sys.stderr = open(1, "w", closefd=False)
    os.write(CONTROL, reply(name))


if __name__ == "__main__":
  serve()
