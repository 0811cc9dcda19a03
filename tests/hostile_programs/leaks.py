"""Pairs of programs that run one after the other: the first tries to leave a bit (SECRET) for the second.

The second prints what it can observe. Its output must not depend on the bit.
"""

PAIRS = {  # Where the bit would be -> (source of the first program, source of the second).
  "a file": ("open(f'f{SECRET}', 'w')", "import os; print(sorted(os.listdir('.')))"),
  "a file beside the folder": ("try: open(f'/x{SECRET}', 'w')\nexcept OSError: pass", "import os; print(sorted(os.listdir('/')))"),
  "contents of a file of the same name": ("open('main.py', 'w').write(SECRET)", "print(len(open('main.py').read()))"),
  "mode of the folder": ("import os; os.chmod('.', 0o700 + int(SECRET))", "import os; print(os.stat('.').st_mode)"),
  "times of the folder": ("import os; os.utime('.', (int(SECRET), int(SECRET)))", "import os; s = os.stat('.'); print(s.st_mtime < 10, s.st_atime < 10)"),
  "times of a file": ("import os; os.utime('main.py', (int(SECRET), 5))", "import os; s = os.stat('main.py'); print(s.st_mtime < 10, s.st_atime < 10)"),
  "attribute of the folder": ("import os\ntry: os.setxattr('.', 'user.x', SECRET.encode())\nexcept OSError: pass", "import os; print(os.listxattr('.'), [os.getxattr('.', n) for n in os.listxattr('.')])"),
  "attribute of a file": ("import os\ntry: os.setxattr('main.py', 'user.x', SECRET.encode())\nexcept OSError: pass", "import os; print(os.listxattr('main.py'))"),
  "access list": ("import os, struct\nif SECRET == '1':\n  try: os.setxattr('.', 'system.posix_acl_default', struct.pack('<I' + 'HHI' * 3, 2, 1, 7, 2**32 - 1, 4, 0, 2**32 - 1, 32, 0, 2**32 - 1))\n  except OSError: pass", "import os; print(oct(os.stat('main.py').st_mode)); open('new', 'w'); print(oct(os.stat('new').st_mode))"),
  "attribute of the stream of input": ("import os\ntry: os.setxattr(0, 'user.x', SECRET.encode())\nexcept OSError: pass", "import os; print(os.listxattr(0))"),
  "numbers of files": ("for i in range(100 * int(SECRET)): open(f'f{i}', 'w')", "import os; open('n', 'w'); print([os.stat(p).st_ino for p in ('.', 'main.py', 'n', 0)])"),
  "links": ("import os; [os.link('main.py', f'l{i}') for i in range(int(SECRET))]", "import os; print(os.stat('main.py').st_nlink, os.stat('.').st_nlink)"),
  "free space": ("open('f', 'wb').write(bytes(1 + 10**6 * int(SECRET)))", "import os; s = os.statvfs('.'); print(s.f_bfree, s.f_ffree)"),
  "size of the folder": ("import os; [os.mkdir(f'd{i}') for i in range(50 * int(SECRET))]", "import os; print(os.stat('.').st_size)"),
  "numbers of processes": ("import threading\nfor _ in range(200 * int(SECRET)):\n  t = threading.Thread(target=int); t.start(); t.join()", "import os, threading\nt = threading.Thread(target=lambda: print(threading.get_native_id())); t.start(); t.join(); print(os.getpid(), os.getppid(), os.getsid(0), os.getpgrp())"),
  "exit code": ("import os; os._exit(40 + int(SECRET))", "import sys\nf = sys._getframe()\nwhile f: print({k: v for k, v in f.f_locals.items() if isinstance(v, int | bytes | str | tuple)} if f.f_code.co_name != '<module>' else ''); f = f.f_back"),
  "exit by a signal": ("import ctypes\nif SECRET == '1': ctypes.string_at(0)", "import gc\nprint(sum(x == 11 for o in gc.get_objects() if type(o) in (list, tuple) for x in o if type(x) is int))"),
  "time of the processor": ("x = sum(range(10**7 * int(SECRET)))", "import resource as r; u = r.getrusage(r.RUSAGE_CHILDREN); print(u.ru_utime, u.ru_stime, r.getrusage(r.RUSAGE_SELF).ru_utime > 0.2)"),
  "most memory": ("x = bytearray(10**8 * int(SECRET) + 1)", "import resource as r; print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss, r.getrusage(r.RUSAGE_SELF).ru_maxrss > 90_000)"),
  "environment": ("import os; os.environ['X'] = SECRET; os.putenv('Y', SECRET)", "import os; print(dict(os.environ))"),
  "mask of modes": ("import os; os.umask(0o70 + int(SECRET))", "import os; print(os.umask(0))"),
  "current folder": ("import os; os.mkdir('d'); os.chdir(['d', '/'][int(SECRET)])", "import os; print(os.getcwd())"),
  "limits": ("import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (20 + int(SECRET),) * 2)", "import resource as r; print([r.getrlimit(i) for i in range(16)])"),
  "signals": ("import signal; signal.signal(signal.SIGTERM, [signal.SIG_IGN, signal.SIG_DFL][int(SECRET)])", "import signal; print([signal.getsignal(s) for s in range(1, 32)], signal.pthread_sigmask(0, []))"),
  "an alarm": ("import signal; signal.alarm(1 + 900 * int(SECRET))", "import signal; print(signal.alarm(0))"),
  "a patched module": ("import builtins, os, json; builtins.leak = os.leak = SECRET; json.leak = SECRET", "import builtins, os, sys; print(hasattr(builtins, 'leak'), hasattr(os, 'leak'), 'json' in sys.modules)"),
  "a start file": ("open('sitecustomize.py', 'w').write('x = ' + SECRET); open('usercustomize.py', 'w'); open('x.pth', 'w')", "import sys\ntry:\n  import sitecustomize; print(sitecustomize.x)\nexcept ImportError: print('none')\nprint(sys.path)"),
  "compiled code": ("import os, py_compile, shutil\nopen('m.py', 'w').write('x = ' + SECRET); py_compile.compile('m.py')", "import os, sys; print(os.path.exists('__pycache__'), sys.dont_write_bytecode)"),
  "a module of the library": ("import os\ntry: open(os.path.dirname(os.__file__) + '/leak.py', 'w').write(SECRET)\nexcept OSError: pass", "try:\n  import leak; print(1)\nexcept ImportError: print(0)"),
  "temporary folders": ("import os\nfor d in ('/var/tmp', '/dev/shm', '/run', '/tmp/..', '/usr/tmp'):\n  try: open(d + '/l' + SECRET, 'w')\n  except OSError: pass", "import os\nfor d in ('/var/tmp', '/dev/shm', '/run', '/', '/usr/tmp'):\n  try: print(sorted(os.listdir(d)))\n  except OSError: print('none')"),
  "SysV memory": ("import ctypes\nfor i in range(int(SECRET)): ctypes.CDLL(None).shmget(7, 4096, 0o1666)", "import ctypes; print([ctypes.CDLL(None).shmget(k, 0, 0) for k in range(1, 20)])"),
  "SysV semaphores": ("import ctypes\nfor i in range(int(SECRET)): ctypes.CDLL(None).semget(7, 1, 0o1666)", "import ctypes; print([ctypes.CDLL(None).semget(k, 0, 0) for k in range(1, 20)])"),
  "SysV messages": ("import ctypes\nfor i in range(int(SECRET)): ctypes.CDLL(None).msgget(7, 0o1666)", "import ctypes; print([ctypes.CDLL(None).msgget(k, 0) for k in range(1, 20)])"),
  "an abstract socket": ("import socket\ntry: s = socket.socket(socket.AF_UNIX); s.bind('\\0x' + SECRET)\nexcept OSError: pass", "import socket\nfor n in '01':\n  try: s = socket.socket(socket.AF_UNIX); s.connect('\\0x' + n); print(n)\n  except OSError as e: print(e)"),
  "a port": ("import socket\ntry: s = socket.socket(); s.bind(('127.0.0.1', 5000 + int(SECRET))); s.listen()\nexcept OSError: pass", "import socket\ntry: socket.create_connection(('127.0.0.1', 5001)); print(1)\nexcept OSError as e: print(e)"),
  "a thread that goes on": ("import threading, time\nif SECRET == '1': threading.Thread(target=lambda: [open('t', 'w') or time.sleep(0.01) for _ in range(20)], daemon=True).start()", "import os, time; time.sleep(0.05); print(os.listdir('.'))"),
  "signals to all numbers": ("pass", "import os\ndef there(p):\n  try: os.kill(p, 0); return True\n  except OSError as e: return e.errno\nprint({there(p) for p in range(1, 400)})"),
  "source in memory": ("needle = 'TOP-SECRET-' + SECRET\nX = '''NEEDLES'''", "SCAN"),
  "stdin in memory": ("import sys; sys.stdin.read()", "SCAN"),
  "position in the stream of input": ("import os; os.lseek(0, 3 * int(SECRET), 0)", "import os; print(os.lseek(0, 0, 1), os.fstat(0).st_size)"),
  "flags of the streams": ("import fcntl; fcntl.fcntl(1, fcntl.F_SETFL, [0, 2048][int(SECRET)])", "import fcntl; print([fcntl.fcntl(fd, fcntl.F_GETFL) for fd in range(4)])"),
  "hash seed": ("pass", "print(hash('a'), hash(b'b'))"),
  "name of the machine": ("import socket\ntry: socket.sethostname('x' + SECRET)\nexcept OSError: pass", "import os; print(os.uname().nodename)"),
  "priority": ("import os\ntry: os.nice(5 * int(SECRET))\nexcept OSError: pass", "import os; print(os.getpriority(0, 0) if False else os.sched_getscheduler(0), os.sched_getaffinity(0))"),
  "locks": ("import fcntl, os\nfd = os.open(os.__file__, 0)\ntry: fcntl.flock(fd, fcntl.LOCK_EX) if SECRET == '1' else 0\nexcept OSError: pass", "import fcntl, os\ntry: fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX | fcntl.LOCK_NB); print(1)\nexcept OSError as e: print(e)"),
}  # fmt: skip

# Searches the memory around every object, and the heap, for the secret. Where memory is not mapped, a walk ends.
SCAN = r"""
import ctypes, gc, os, re
libc = ctypes.CDLL(None); libc.sbrk.restype = ctypes.c_void_p
r, w = os.pipe()
def page(address):
  if libc.write(w, ctypes.c_void_p(address), ctypes.c_size_t(4096)) != 4096: return None
  return os.read(r, 4096)
found, seen = set(), 0
def walk(start, step, most):
  global seen
  for i in range(most):
    data = page(start + i * step)
    if data is None: return
    seen += 1
    found.update(re.findall(rb"TOP-SECRET-[01]", data))
walk(((libc.sbrk(0) - 1) >> 12) << 12, -4096, 8192)
for block in {id(o) >> 20 for o in gc.get_objects()}:
  walk(block << 20, 4096, 256)
print(sorted(found), seen > 200)
"""
# A control: the program has a secret of its own, which the search must find.
OWN_SCAN = "mine = 'TOP-SECRET-' + str(int('1'))\n" + SCAN


def first(name: str, secret: str) -> tuple[str, str]:
  """Source and stdin of the program that tries to leave the bit."""
  needles = f"TOP-SECRET-{secret} " * 2000
  source = PAIRS[name][0].replace("NEEDLES", needles)
  return f"SECRET = '{secret}'\n{source}", needles if "stdin" in name else "abcdef"


def second(name: str) -> str:
  return PAIRS[name][1].replace("SCAN", SCAN)
