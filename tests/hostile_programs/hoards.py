"""Programs that take as much of a resource as they can, never end, or leave something behind in the worker.

`HOARDS` take one resource until they are refused, and print how much they hold. `LONG` do not end by
themselves. After each program of `BARS` the worker must still run the next program normally.
"""

COUNT = """
import os, sys
held = 0
def more(take, size, most=10**6):
  global held
  kept = []
  try:
    for _ in range(most):
      kept.append(take()); held += size() if callable(size) else size
  except (OSError, MemoryError, RuntimeError, ValueError): pass
  return kept
"""
TOLD = "\nprint('HELD', held)"

MB = 1 << 20
# Name -> (source, the most that it may hold, the least that it must hold; 0 if all of it may be refused).
HOARDS = {
  "pairs of sockets (bytes)": (
    "import socket\npairs = more(socket.socketpair, 0)\n"
    "for s in (s for p in pairs for s in p):\n  s.setblocking(False)\n"
    "  try:\n    while True: held += s.send(b'x' * 65536)\n  except OSError: pass", 16 * MB, MB,
  ),
  "pairs of sockets, one byte at a time (writes)": (
    "import socket\npairs = more(socket.socketpair, 0)\n"
    "for s in (s for p in pairs for s in p):\n  s.setblocking(False)\n"
    "  try:\n    while True: held += s.send(b'x')\n  except OSError: pass", 60_000, 1000,
  ),
  "pairs of sockets made larger (bytes)": (
    "import socket\npairs = more(socket.socketpair, 0)\n"
    "for s in (s for p in pairs for s in p):\n  s.setblocking(False)\n"
    "  try: s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)\n  except OSError: pass\n"
    "  try:\n    while True: held += s.send(b'x' * 65536)\n  except OSError: pass", 16 * MB, MB,
  ),
  "sockets in flight (sockets)": (
    "import socket\na, b = socket.socketpair()\ndef send():\n  c = socket.socketpair()\n"
    "  socket.send_fds(a, [b'x'], [x.fileno() for x in c]); [x.close() for x in c]\n"
    "more(send, 2, 5000)", 0, 0,
  ),
  "pipes (bytes)": (
    "pipes = more(os.pipe, 0)\nfor r, w in pipes:\n  os.set_blocking(w, False)\n"
    "  try:\n    while True: held += os.write(w, b'x' * 65536)\n  except OSError: pass", 4 * MB, MB,
  ),
  "pipes made larger (bytes)": (
    "import fcntl\nr, w = os.pipe()\nmore(lambda: fcntl.fcntl(w, 1031, 1 << 20), 1 << 20, 1)", 0, 0,
  ),
  "pages that pipes keep (pages)": (
    "import ctypes, mmap, struct\nlibc = ctypes.CDLL(None)\ndef give():\n  m = mmap.mmap(-1, 1 << 21)\n"
    "  r, w = os.pipe()\n  p = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "  if libc.vmsplice(w, struct.pack('QQ', p, 4096), ctypes.c_size_t(1), 0) < 0: raise OSError\n"
    "more(give, 512, 30)", 0, 0,
  ),
  "memory files (bytes)": ("more(lambda: os.write(os.memfd_create('x'), bytes(1 << 20)), 1 << 20)", 0, 0),
  "memory (bytes)": ("kept = more(lambda: bytearray(1 << 20), 1 << 20); n = held; del kept", 256 * MB, 64 * MB),
  "shared memory by mapping (bytes)": (
    "import mmap\nkept = more(lambda: mmap.mmap(-1, 1 << 20).write(bytes(1 << 20)), 1 << 20, 1)\n"
    "kept = more(lambda: mmap.mmap(-1, 1 << 20), 1 << 20); n = held; del kept", 256 * MB, 64 * MB,
  ),
  "threads": (
    "import threading, time\nthreading.stack_size(32768)\n"
    "def start():\n  t = threading.Thread(target=time.sleep, args=(9,), daemon=True); t.start()\n"
    "more(start, 1, 2000)\nprint('HELD', held, flush=True); os._exit(0)", 35, 8,
  ),
  "threads on one stack": (
    "import ctypes, platform\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "import mmap\nm = mmap.mmap(-1, 4096, prot=7); a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    # Machine code: clone, then the new thread calls `pause` for ever.
    "m.write(bytes.fromhex('b838000000' '0f05' '85c0' '7401' 'c3' 'b822000000' '0f05' 'ebf7'))\n"
    "f = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_void_p)(a)\n"
    "s = ctypes.create_string_buffer(65536); top = ctypes.addressof(s) + 65000 & ~15\n"
    "def start():\n  if platform.machine() != 'x86_64' or f(0x3D0F00 , top) < 0: raise OSError\n"
    "more(start, 1, 2000)\nprint('HELD', held, flush=True); os._exit(0)", 35, 0,
  ),
  "files (bytes)": (
    "n = iter(range(10**6))\ndef put():\n  with open(f'f{next(n)}', 'wb') as f: f.write(bytes(1 << 20))\n"
    "more(put, 1 << 20)", 17 * MB, 8 * MB,
  ),
  "empty files": ("n = iter(range(10**6))\nmore(lambda: open(f'f{next(n)}', 'w').close(), 1)", 4096, 1000),
  "empty folders": ("n = iter(range(10**6))\nmore(lambda: os.mkdir(f'd{next(n)}'), 1)", 4096, 1000),
  "links": ("n = iter(range(10**6))\nmore(lambda: os.symlink('x' * 4000, f'l{next(n)}'), 1)", 4096, 1000),
  "names of one file": ("n = iter(range(10**6))\nmore(lambda: os.link('main.py', f'l{next(n)}'), 1)", 4096, 1000),
  "names without a file": ("more(lambda: os.open('.', os.O_TMPFILE | os.O_RDWR), 1)", 64, 10),
  "attributes": ("n = iter(range(10**6))\nmore(lambda: os.setxattr('.', f'user.{next(n)}', bytes(60000)), 60000)", 0, 0),
  "open files": ("more(lambda: os.open('main.py', 0), 1)", 64, 10),
  "waiting lists": (
    "import select\ndef make():\n  e = select.epoll()\n  for fd in range(64):\n"
    "    try: e.register(fd)\n    except OSError: pass\n  return e\nkept = more(make, 1)", 64, 10,
  ),
  "watches": ("import ctypes\ndef watch():\n  if ctypes.CDLL(None).inotify_init() < 0: raise OSError\nmore(watch, 1)", 0, 0),
  "timers": ("import ctypes\ndef make():\n  if ctypes.CDLL(None).timer_create(0, 0, bytes(8)) < 0: raise OSError\nmore(make, 1)", 0, 0),
  "keys": ("import ctypes\ndef make():\n  if ctypes.CDLL(None).syscall(248, b'user', b'k', bytes(9), 9, -2) < 0: raise OSError\nmore(make, 1)", 0, 0),
  "SysV memory (bytes)": ("import ctypes\ndef make():\n  if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0: raise OSError\nmore(make, 1 << 20)", 0, 0),
  "queues": ("import ctypes\ndef make():\n  if ctypes.CDLL(None).msgget(0, 0o1600) < 0: raise OSError\nmore(make, 1)", 0, 0),
  "processes": ("more(os.fork, 1)", 0, 0),
  "a file that is all hole (bytes)": ("f = open('f', 'wb')\nmore(lambda: f.truncate(1 << 40), 1 << 40, 1)", 0, 0),
  "space set aside (bytes)": (
    "n = iter(range(10**6))\ndef take(): os.posix_fallocate(os.open(f'f{next(n)}', os.O_CREAT | os.O_RDWR), 0, 1 << 20)\n"
    "more(take, 1 << 20)", 17 * MB, 8 * MB,
  ),
  "locked memory": ("import ctypes\ndef lock():\n  if ctypes.CDLL(None).mlockall(3) < 0: raise OSError\nmore(lock, 1, 1)", 0, 0),
}  # fmt: skip

# Name -> (source, statuses with which it may end).
LONG = {
  "a loop": ("while True: pass", {"timeout"}),
  "a sleep": ("import time; time.sleep(60)", {"timeout"}),
  "a sleep without streams": ("import os, time\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\ntime.sleep(60)", {"timeout"}),
  "a loop in threads": ("import threading\ndef f():\n  while True: pass\nfor _ in range(4): threading.Thread(target=f).start()", {"timeout"}),
  "a loop deaf to the limit": ("import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass", {"timeout"}),
  "a search that never ends": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
  "a number without end": ("9 ** 9 ** 9", {"timeout", "error"}),
  "a thread that never ends": ("import threading; threading.Event().wait()", {"timeout"}),
  "a flood of output": ("while True: print('x' * 1000)", {"killed"}),
  "a flood of errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"killed"}),
  "a flood of results": ("import os\nwhile True: os.write(3, b'{' * 1000)", {"killed"}),
  "an end that never comes": ("import atexit, time; atexit.register(time.sleep, 60)", {"timeout"}),
}  # fmt: skip

BARS = {
  "a default access list": "import os, struct\ntry: os.setxattr('.', 'system.posix_acl_default', struct.pack('<I' + 'HHI' * 3, 2, 1, 0, 2**32 - 1, 4, 0, 2**32 - 1, 32, 0, 2**32 - 1))\nexcept OSError: pass",
  "a folder without rights": "import os; os.mkdir('d'); os.chmod('d', 0); os.chmod('.', 0)",
  "a sticky folder": "import os; os.chmod('.', 0o7777); os.mkdir('d'); os.chmod('d', 0o1000)",
  "files that cannot change": "import fcntl, os, struct\nfd = os.open('.', 0)\ntry: fcntl.ioctl(fd, 0x40086602, struct.pack('l', 0x30))\nexcept OSError: pass",
  "a deep tree": "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')",
  "long names": "import os\nfor i in range(200): os.mkdir(f'{i:03}' + 'x' * 250)",
  "odd names": "import os\nfor n in (b'\\xff\\n', b'-rf', b'\\x01', b' ', b'...'): os.mkdir(n); open(n + b'/x', 'w')",
  "a farm of links": "import os\nfor i in range(500): os.symlink(f'l{(i + 1) % 500}', f'l{i}')",
  "links out": "import os\nfor p in ('/', '/usr/lib', '/tmp', '.'): os.symlink(p, f'l{len(p)}')\nos.unlink('main.py'); os.symlink('/usr/lib/x', 'main.py')",
  "hard links": "import os\nfor i in range(2000): os.link('main.py', f'l{i}')",
  "fifos and sockets": "import os, socket, stat\nfor t in (stat.S_IFIFO, stat.S_IFSOCK):\n  try: os.mknod(f'n{t}', t | 0o600)\n  except OSError: pass",
  "its own source is gone": "import os; os.unlink('main.py')",
  "its own source is a folder": "import os; os.unlink('main.py'); os.mkdir('main.py'); open('main.py/x', 'w')",
  "the next input is a folder": "import os; os.mkdir('.stdin'); os.mkdir('solution.py')",
  "a full folder": "i = 0\ntry:\n  while True: open(f'f{i}', 'wb').write(bytes(1 << 20)); i += 1\nexcept OSError: pass",
  "no number of a file left": "i = 0\ntry:\n  while True: open(f'f{i}', 'w'); i += 1\nexcept OSError: pass",
  "a file that is open": "import os; os.open('f', os.O_CREAT | os.O_RDWR); os._exit(0)",
  "a file that is mapped": "import mmap, os\nf = open('f', 'w+b'); f.write(bytes(4096)); f.flush(); m = mmap.mmap(f.fileno(), 4096); os._exit(0)",
  "the folder is in use": "import os, threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); os.mkdir('d'); os.chdir('d')",
  "a renamed folder": "import os; os.mkdir('a'); os.rename('a', 'b'); os.rename('b', 'main.py2')\ntry: os.rename('.', '../x')\nexcept OSError: pass",
  "a crash": "import ctypes; ctypes.string_at(0)",
  "an abort": "import os; os.abort()",
  "a stack without end": "import sys, threading\nsys.setrecursionlimit(10**8)\ndef f(): f()\nf()",
  "no descriptor left": "import os\ntry:\n  while True: os.dup(0)\nexcept OSError: pass",
  "no time left": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (0, 0))\nwhile True: pass",
  "signals to the launcher": "import ctypes, fcntl, os\nfor pid in (0, 1, 2, -1, os.getppid()):\n  for s in (9, 15, 19, 2):\n    try: os.kill(pid, s)\n    except OSError: pass",
  "signals at input to the launcher": "import fcntl, os, struct\nr, w = os.pipe()\nfor pid in (1, 2, -1):\n  try: fcntl.fcntl(r, 8, pid); fcntl.fcntl(r, 10, 9); fcntl.fcntl(r, 4, 0o20000); os.write(w, b'x')\n  except (OSError, OverflowError): pass",
  "answers in the launcher's name": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\\0' * 8)\n  except OSError: pass",
  "messages to the launcher": "import os, socket\nfor fd in range(64):\n  try: socket.socket(fileno=fd).send(b'p')\n  except OSError: pass",
}  # fmt: skip
