"""What runs inside the sandbox: processes that fork, so that a program starts in a few milliseconds.

There are three, each of the one before. The first learns nothing of any program, so that its copies
hold nothing of an earlier one. Its copy, the attendant, makes a new file system for one program and
new process numbers, takes in the program's files, waits for its end and ends. The attendant's copy is
the program's, which may do to it as it likes: nothing here judges, and no expected value ever comes
here. Both others are out of the program's reach, in an outer namespace of processes.
"""

FOLDER, PAGE = b"/tmp", 4096
NOBODY = 65534
NEW_MOUNTS, NEW_PROCESSES = 0x20000, 0x20000000  # Flags of unshare.
NO_SETUID, NO_DEVICES, NO_EXECUTABLES = 2, 4, 8  # Flags of mount.


def encode(value, quote):
  """JSON of plain values; anything else is a TypeError. (Importing json would cost more.)"""
  if value is None or value is True or value is False:
    return {None: "null", True: "true", False: "false"}[value]
  if isinstance(value, str):
    return quote(str.__str__(value))
  if isinstance(value, int):
    return int.__repr__(value)
  if isinstance(value, float):
    text = float.__repr__(value)
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
  if isinstance(value, list | tuple):
    return f"[{','.join(encode(item, quote) for item in value)}]"
  if isinstance(value, dict):
    items = (f"{quote(str(key))}:{encode(item, quote)}" for key, item in value.items())
    return f"{{{','.join(items)}}}"
  raise TypeError(f"a {type(value).__name__} is no plain value")


def call(module, function, arguments):
  """`module.function(*arguments)`; a function may also be a method of a class Solution."""
  import sys

  __import__(module)
  namespace = sys.modules[module]
  if not hasattr(namespace, function) and hasattr(namespace, "Solution"):
    namespace = namespace.Solution()
  return getattr(namespace, function)(*arguments)


def new_folder(libc, content_bytes, files):
  """A file system of this process and its children alone, mounted on FOLDER; it ends with them.

  All of its files, names, attributes and times, its mode and its numbers of files begin anew.
  """
  import ctypes

  if libc.unshare(NEW_MOUNTS | NEW_PROCESSES):
    raise OSError(ctypes.get_errno(), "no namespaces of a program's own")
  options = f"mode=700,uid={NOBODY},gid={NOBODY},size={content_bytes},nr_inodes={files}".encode()
  flags = NO_SETUID | NO_DEVICES | NO_EXECUTABLES
  if libc.mount(b"tmpfs", FOLDER, b"tmpfs", flags, options):
    raise OSError(ctypes.get_errno(), "no file system of a program's own")


def drop_privileges(libc):
  """Makes this process nobody's, without the privileges that mounting took."""
  import ctypes
  import os
  import struct

  if os.getuid() != NOBODY:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
  version, this_process = 0x20080522, 0
  if libc.capset(struct.pack("Ii", version, this_process), bytes(24)):
    raise OSError(ctypes.get_errno(), "the privileges are not given up")


def install_filter(libc, code):
  """Takes on a seccomp filter, for good."""
  import ctypes
  import struct

  no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
  instructions = ctypes.create_string_buffer(code, len(code))
  program = struct.pack("HP", len(code) // 8, ctypes.addressof(instructions))
  zero = ctypes.c_ulong(0)
  if libc.prctl(no_new_privileges, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
    set_seccomp, ctypes.c_ulong(filter_mode), program, zero, zero
  ):
    raise OSError(ctypes.get_errno(), "the seccomp filter is refused")


def become(fds, channel, limits, libc, code):
  """Makes the forked process a program's: its streams, its limits, its filter. Returns control."""
  import os
  import resource
  import sys

  channel.close()
  stdin, stdout, stderr, control = fds
  for fd, place in ((stdin, 0), (stdout, 1), (stderr, 2)):
    os.dup2(fd, place)
  os.dup2(control, 3)
  os.closerange(4, 256)  # All that there is: what came by the socket has small numbers.
  sys.stdin = sys.__stdin__ = open(0, closefd=False, errors="surrogateescape")
  sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, errors="surrogateescape")
  sys.stderr = sys.__stderr__ = open(2, "w", 1, closefd=False, errors="backslashreplace")
  for name, value in limits:
    limit = getattr(resource, name)
    _, most = resource.getrlimit(limit)  # What is stricter already stays so.
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))
  install_filter(libc, code)
  return 3


def run(argv, calls, control, quote):
  """`control` is told "+" before the program's first line, then a line for each call's result."""
  import os
  import sys

  write, leave = os.write, os._exit
  sys.argv = list(argv)
  write(control, b"+\n")
  if not calls:
    module = type(sys)("__main__")
    module.__file__ = argv[0]
    sys.modules["__main__"] = module
    code = 0
    try:
      with open(argv[0], "rb") as file:
        source = file.read()
      exec(compile(source, argv[0], "exec"), module.__dict__)
    except SystemExit as error:
      code = error.code
    except BaseException:
      write(control, b"!\n")
      sys.excepthook(*sys.exc_info())
      code = 1
    finish(module, code)
  for module, function, arguments in calls:
    try:
      line = f'{{"value":{encode(call(module, function, arguments), quote)}}}\n'
    except BaseException as error:  # Even SystemExit: the next call has its own verdict.
      line = f'{{"error":{quote(type(error).__name__)}}}\n'
    data = line.encode()
    while data:
      data = data[write(control, data) :]
  sys.stdout.flush()
  leave(0)


def finish(module, code):
  """Ends the process as Python does, but for taking its own modules apart, which takes milliseconds.

  Args:
    code: what the program left with, as of SystemExit.
  """
  import atexit
  import gc
  import os
  import sys

  if "threading" in sys.modules:
    sys.modules["threading"]._shutdown()  # Waits for threads.
  atexit._run_exitfuncs()
  if code is not None and not isinstance(code, int):
    print(code, file=sys.stderr)
    code = 1
  code = (code or 0) & 0xFF
  module.__dict__.clear()  # Closes files and runs what objects do at their end.
  gc.collect()
  for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
    try:
      if stream is not None and not stream.closed:
        stream.flush()
    except Exception:
      code = 120
  os._exit(code)


def put(files):
  """Writes the files into the program's folder."""
  import os

  for path, content in files:
    folder, _, _ = path.rpartition("/")
    if folder:
      os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
      file.write(content)


def readable(content):
  """A descriptor to read the content from: of a file without a name, within the program's limits."""
  import os

  name = ".stdin"  # Gone before the program begins.
  with open(name, "xb") as file:
    file.write(content)
  fd = os.open(name, os.O_RDONLY)
  os.unlink(name)
  return fd


def ended(child, limits):
  """The wait status of a program. One that used up its CPU time ends as if by SIGXCPU.

  The program is the first process of its namespace, which SIGXCPU does not end: SIGKILL does, at the
  hard limit.
  """
  import os
  import signal

  _, status, usage = os.wait4(child, 0)
  # What it reports differs a little from what it counts. Only a machine without memory kills sooner.
  much = dict(limits)["RLIMIT_CPU"] / 2
  if status == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= much:
    status = int(signal.SIGXCPU)
  return status


def attend(channel, taken, libc, limits, code, folder_bytes, most_files):
  """Serves one program. Returns in its process, with what `run` takes; the attendant ends here.

  It writes to `taken` when it has a request, and answers with the program's wait status. Where no
  program could be started, it says why on the program's stderr and answers with a status of 1;
  `control` was told nothing then.
  """
  import marshal
  import os
  import signal
  import socket

  message, fds, _, _ = socket.recv_fds(channel, 1, 5)
  if not message:
    os._exit(0)
  os.write(taken, message)
  os.close(taken)
  status = 1 << 8
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ignored, it would take the program's status away.
  try:
    with open(fds.pop(0), "rb") as file:
      files, argv, calls, stdin = marshal.load(file)
    contents = [stdin or b"", *(content for _, content in files)]
    own = sum(len(content) + PAGE for content in contents)
    new_folder(libc, folder_bytes + own, most_files)
    drop_privileges(libc)
    os.chdir(FOLDER)
    put(files)
    if stdin is not None:
      fds.insert(0, readable(stdin))
    child = os.fork()
    if child:
      for fd in fds:  # The trainer waits for their end.
        os.close(fd)
      status = ended(child, limits)
  except BaseException as error:
    os.write(fds[-2], str(error).encode())
  else:
    if not child:
      return argv, calls, become(fds, channel, limits, libc, code)
  channel.sendall(status.to_bytes(4, "little"))
  os._exit(0)


def serve(place, limits, code, folder_bytes, most_files):
  """Forks an attendant for each program that comes over the socket. Ends when the socket does.

  The next attendant is there before the program of this one has ended: a start waits for one fork.
  """
  import _sitebuiltins
  import atexit  # noqa: F401  (This and others are loaded for the copies.)
  import builtins
  import ctypes
  import gc
  import marshal  # noqa: F401
  import os
  import resource  # noqa: F401
  import signal
  import socket
  import struct  # noqa: F401
  import sys
  from _json import encode_basestring_ascii as quote

  for name in ("exit", "quit"):  # Else made by `site`, which is left out to start faster.
    setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nothing is to be learnt from an attendant's end.
  libc = ctypes.CDLL(None, use_errno=True)
  channel = socket.socket(fileno=place)
  sys.path.insert(0, FOLDER.decode())
  gc.collect()
  gc.freeze()
  while True:
    ready, taken = os.pipe()
    if not os.fork():
      os.close(ready)
      return run(*attend(channel, taken, libc, limits, code, folder_bytes, most_files), quote)
    os.close(taken)
    message = os.read(ready, 1)
    os.close(ready)
    if not message:
      return
