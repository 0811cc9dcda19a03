"""Runs inside the sandbox: forks processes, so that a program starts in a few milliseconds.

There are three processes, each forked from the one before:

  1. The launcher (`serve`) forks an attendant per program. It never receives data of any program, so
     its forks contain nothing of earlier programs.
  2. The attendant (`attend`) makes a new file system and process namespace for one program, writes
     the program's files, waits for its end, and exits.
  3. The program's process. The program can do anything to it; this is safe because nothing here
     judges and no expected value ever enters the sandbox.

The program cannot reach the other two processes, which are in the outer process namespace.
"""

FOLDER, PAGE = b"/tmp", 4096
NOBODY = 65534
NEW_MOUNTS, NEW_PROCESSES = 0x20000, 0x20000000  # Flags of unshare: CLONE_NEWNS, CLONE_NEWPID.
NO_SETUID, NO_DEVICES, NO_EXECUTABLES = 2, 4, 8  # Flags of mount: MS_NOSUID, MS_NODEV, MS_NOEXEC.


def encode(value, quote):
  """Encodes plain values as JSON; anything else is a TypeError. Importing `json` would be slower."""
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
  """Returns `module.function(*arguments)`; the function may be a method of a class Solution."""
  import sys

  __import__(module)
  namespace = sys.modules[module]
  if not hasattr(namespace, function) and hasattr(namespace, "Solution"):
    namespace = namespace.Solution()
  return getattr(namespace, function)(*arguments)


def new_folder(libc, content_bytes, files):
  """Mounts a new tmpfs on FOLDER that only this process and its children see; it ends with them.

  It keeps nothing of an earlier program: no file, name, attribute, time, mode or inode number. The
  children also get a new process namespace.
  """
  import ctypes

  if libc.unshare(NEW_MOUNTS | NEW_PROCESSES):
    raise OSError(ctypes.get_errno(), "no namespaces of a program's own")
  options = f"mode=700,uid={NOBODY},gid={NOBODY},size={content_bytes},nr_inodes={files}".encode()
  flags = NO_SETUID | NO_DEVICES | NO_EXECUTABLES
  if libc.mount(b"tmpfs", FOLDER, b"tmpfs", flags, options):
    raise OSError(ctypes.get_errno(), "no file system of a program's own")


def drop_privileges(libc):
  """Switches to user and group nobody, and drops the capabilities that mounting required."""
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
  """Installs a seccomp filter, which cannot be removed again."""
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
  """Prepares the forked process for the program: streams, limits, filter.

  Args:
    fds: descriptors that become stdin, stdout, stderr and control.

  Returns:
    The descriptor of control.
  """
  import os
  import resource
  import sys

  channel.close()
  stdin, stdout, stderr, control = fds
  for fd, place in ((stdin, 0), (stdout, 1), (stderr, 2)):
    os.dup2(fd, place)
  os.dup2(control, 3)
  os.closerange(4, 256)  # Covers all open descriptors: those received over the socket are small.
  sys.stdin = sys.__stdin__ = open(0, closefd=False, errors="surrogateescape")  # type: ignore[misc]
  sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, errors="surrogateescape")  # type: ignore[misc]
  sys.stderr = sys.__stderr__ = open(2, "w", 1, closefd=False, errors="backslashreplace")  # type: ignore[misc]
  for name, value in limits:
    limit = getattr(resource, name)
    _, most = resource.getrlimit(limit)  # A stricter existing limit stays.
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value))
  install_filter(libc, code)
  return 3


def run(argv, calls, control, quote):
  """Runs the program and ends the process.

  It writes a line to `control` for each event: "+" before the program's first line, "!" if the
  script raised, and one JSON object per call, {"value": ...} or {"error": name of the exception}.
  """
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
    except BaseException as error:  # SystemExit included, so that the remaining calls still run.
      line = f'{{"error":{quote(type(error).__name__)}}}\n'
    data = line.encode()
    while data:
      data = data[write(control, data) :]
  sys.stdout.flush()
  leave(0)


def finish(module, code):
  """Ends the process as Python does, but skips tearing down modules, which takes milliseconds.

  Args:
    code: the exit code, in any form that SystemExit allows.
  """
  import atexit
  import gc
  import os
  import sys

  if "threading" in sys.modules:
    sys.modules["threading"]._shutdown()  # Joins the threads.
  atexit._run_exitfuncs()
  if code is not None and not isinstance(code, int):
    print(code, file=sys.stderr)
    code = 1
  code = (code or 0) & 0xFF
  module.__dict__.clear()  # Closes files and runs finalizers.
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
  """A descriptor of an unlinked file with the content. It counts towards the program's folder."""
  import os

  name = ".stdin"  # Unlinked before the program starts.
  with open(name, "xb") as file:
    file.write(content)
  fd = os.open(name, os.O_RDONLY)
  os.unlink(name)
  return fd


def ended(child, limits):
  """Waits for the program and returns its wait status; SIGXCPU if it used up its CPU time.

  The program is process 1 of its namespace, which SIGXCPU does not kill. The kernel sends SIGKILL at
  the hard limit instead, so that status is translated.
  """
  import os
  import signal

  _, status, usage = os.wait4(child, 0)
  # The reported CPU time differs a little from the time that the limit counts, so half is enough.
  # Only a machine out of memory sends SIGKILL earlier.
  much = dict(limits)["RLIMIT_CPU"] / 2
  if status == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= much:
    status = int(signal.SIGXCPU)
  return status


def attend(channel, taken, libc, limits, code, folder_bytes, most_files):
  """Serves one program. Returns only in the program's process; the attendant exits here.

  The attendant writes to `taken` when it has received a request, and sends the program's wait status
  (4 bytes, little-endian) over `channel`. If it cannot start the program, it writes the reason to the
  program's stderr and sends the status of exit code 1; `control` is empty in that case.

  Returns:
    (argv, calls, control): the first arguments of `run`.
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
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # If ignored, the program's status would be lost.
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
      for fd in fds:  # The trainer reads these pipes until every writer has closed them.
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
  """Forks an attendant for each program that arrives over the socket; returns at the socket's end.

  The next attendant is forked as soon as one has taken a request, so that it is ready in advance and
  starting a program takes a single fork.

  Args:
    place: descriptor of the socket.
    limits: (name of a resource limit, value) pairs for programs.
    code: the seccomp filter.
    folder_bytes: bytes that a program may add to its folder.
    most_files: inodes of its folder.
  """
  import _sitebuiltins
  import atexit  # noqa: F401  (The unused imports are inherited by the forks.)
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

  for name in ("exit", "quit"):  # Normally defined by `site`, which is skipped for a faster start.
    setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Attendants' statuses are not needed: no zombies.
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
