"""Programs that try to reach something outside of the sandbox. A program prints REACHED if it succeeds.

`ESCAPES`: name -> (source, pattern of the result that it must have). A program that fails for another reason,
such as a mistake in its source, proves nothing; it counts as one that got through.
"""

import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).parents[2]
REFUSED = r"error: (PermissionError|OSError: \[Errno (1|38)\])"
ABSENT = r"error: (FileNotFoundError|NotADirectoryError|PermissionError)"

PRELUDE = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
  given = [a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
  found = libc.syscall(ctypes.c_long(number), *given)
  if found == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
  print("REACHED", found)
"""

# System call -> (its number on x86-64, on arm64 or None if there is no such call, arguments that are valid).
CALLS = {
  "fork": (57, None, ""), "vfork": (58, None, ""),
  "a child by clone": (56, 220, "17, 0, 0, 0, 0"),
  "a namespace by clone": (56, 220, "0x10000011, 0, 0, 0, 0"),
  "a child that outlives": (56, 220, "0x8011, 0, 0, 0, 0"),
  "clone3": (435, 435, "struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88"),
  "execve": (59, 221, "b'/usr/bin/id', 0, 0"), "execveat": (322, 281, "-100, b'/bin/sh', 0, 0, 0"),
  "ptrace the parent": (101, 117, "16, 1, 0, 0"),
  "be traced": (101, 117, "0, 0, 0, 0"),
  "read a process": (310, 270, "1, bytes(16), 1, bytes(16), 1, 0"),
  "write a process": (311, 271, "1, bytes(16), 1, bytes(16), 1, 0"),
  "pidfd of the first": (434, 434, "1, 0"), "fd of another": (438, 438, "3, 0, 0"),
  "compare processes": (312, 272, "1, 1, 0, 0, 0"), "kill": (62, 129, "1, 9"),
  "kill all": (62, 129, "-1, 9"), "kill a thread": (234, 131, "1, 1, 9"),
  "queue a signal": (129, 138, "1, 9, bytes(128)"), "new session": (112, 157, ""),
  "new group": (109, 154, "0, 0"), "a user namespace": (272, 97, "0x10000000"),
  "a mount namespace": (272, 97, "0x20000"), "enter a namespace": (308, 268, "0, 0"),
  "mount": (165, 40, "b'x', b'/tmp', b'tmpfs', 0, 0"), "unmount": (166, 39, "b'/tmp', 2"),
  "pivot_root": (155, 41, "b'/tmp', b'/tmp'"), "chroot": (161, 51, "b'/tmp'"),
  "clone a mount": (428, 428, "-100, b'/', 1"), "move a mount": (429, 429, "0, b'', 0, b'', 4"),
  "fsopen": (430, 430, "b'tmpfs', 0"), "change a mount": (442, 442, "-100, b'/', 0, bytes(32), 32"),
  "a device": (259, 33, "-100, b'mem', 0o20666, 0x101"),
  "a disk": (259, 33, "-100, b'disk', 0o60666, 0xFE00"), "a fifo": (259, 33, "-100, b'p', 0o10666, 0"),
  "internet socket": (41, 198, "2, 1, 0"), "raw socket": (41, 198, "2, 3, 1"),
  "packet socket": (41, 198, "17, 3, 0x300"), "netlink": (41, 198, "16, 3, 0"),
  "local socket": (41, 198, "1, 1, 0"), "vsock": (41, 198, "40, 1, 0"),
  "pair of tipc": (53, 199, "30, 5, 0, bytes(8)"), "bind": (49, 200, "1, b'\\1\\0\\0x', 4"),
  "connect": (42, 203, "1, b'\\1\\0\\0x', 4"), "send a file": (46, 211, "1, bytes(56), 0"),
  "io_uring": (425, 425, "8, bytes(120)"), "userfaultfd": (323, 282, "1"),
  "memfd": (319, 279, "b'x', 0"), "secret memory": (447, 447, "0"),
  "shared memory": (29, 194, "7, 4096, 0o1666"), "semaphores": (64, 190, "7, 1, 0o1666"),
  "messages": (68, 186, "7, 0o1666"), "posix messages": (240, 180, "b'q', 0x42, 0o666, 0"),
  "add a key": (248, 217, "b'user', b'k', b'v', 1, -4"),
  "ask for a key": (249, 218, "b'user', b'k', 0, -4"), "keyring": (250, 219, "0, -4, 1"),
  "bpf": (321, 280, "5, bytes(128), 128"), "perf": (298, 241, "bytes(128), 0, -1, -1, 0"),
  "kexec": (246, 104, "0, 0, 0, 0"), "load a module": (175, 105, "b'x', 1, b''"),
  "load a module's file": (313, 273, "0, b'', 0"), "reboot": (169, 142, "0xfee1dead, 672274793, 0, 0"),
  "swap": (167, 224, "b'/tmp', 0"), "accounting": (163, 89, "b'/tmp/a'"),
  "kernel log": (103, 116, "3, bytes(64), 64"), "personality": (135, 92, "0x40000"),
  "ports": (172, None, "3"), "more ports": (173, None, "0, 8, 1"),
  "descriptor table": (154, None, "0, bytes(16), 16"), "quota": (179, 60, "0, b'/', 0, bytes(128)"),
  "handle of a file": (303, 264, "-100, b'/usr/lib', bytes(256), bytes(8), 0"),
  "file by handle": (304, 265, "-100, bytes(64), 0"),
  "attribute": (188, 5, "b'/tmp', b'user.x', b'1', 1, 0"),
  "access list": (188, 5, "b'/tmp', b'system.posix_acl_default', bytes(28), 28, 0"),
  "watch": (294, 26, "0"), "watch all": (300, 262, "0, 0"), "lock": (73, 32, "0, 2"),
  "signals at input": (72, 25, "1, 10, 9"), "owner of signals": (72, 25, "1, 8, 1"),
  "lock a part": (72, 25, "0, 6, bytes(32)"), "lease": (72, 25, "0, 1024, 1"),
  "larger pipe": (72, 25, "1, 1031, 1 << 20"), "timer": (222, 107, "0, 0, bytes(8)"),
  "gift of pages": (278, 75, "1, bytes(16), 1, 0"), "splice": (275, 76, "0, 0, 1, 0, 1, 0"),
  "tee": (276, 77, "0, 1, 1, 0"), "what is cached": (27, 232, "0, 4096, bytes(8)"),
  "cached reads": (327, 286, "0, bytes(16), 1, 0, 0, 8"), "cache statistics": (451, 451, "0, bytes(16), bytes(40), 0"),
  "drop the cache": (28, 233, "0, 4096, 21"), "landlock": (444, 444, "bytes(16), 16, 0"),
  "own filter": (317, 277, "1, 0, bytes(16)"), "new tracer": (157, 167, "0x59616d61, -1, 0, 0, 0"),
  "priority": (141, 140, "0, 0, -20"), "processors": (203, 122, "0, 8, b'\\1' + bytes(7)"),
  "real time": (144, 119, "0, 1, struct.pack('i', 1)"), "disk priority": (251, 30, "1, 0, 0"),
  "host name": (170, 161, "b'x', 1"), "clock": (227, 112, "0, bytes(16)"),
  "load of the machine": (99, 179, "bytes(128)"), "flush all disks": (162, 81, ""),
  "lock memory": (151, 230, "3"), "advise another": (440, 440, "3, bytes(16), 1, 21, 0"),
  "limits of another": (302, 261, "1, 7, bytes(16), 0"), "becoming root": (105, 146, "0"),
  "privileges": (126, 91, "struct.pack('Ii', 0x20080522, 0), b'\\xff' * 24"),
  "a call of later years": (999, 999, "0"), "another architecture's fork": (0x40000039, None, ""),
}  # fmt: skip


def _file(path):
  return f"print('REACHED', open({str(path)!r}, 'rb').read(1))"


def _calls():
  column = 1 if platform.machine() == "aarch64" else 0
  for name, (*numbers, arguments) in CALLS.items():
    if numbers[column] is not None:
      yield f"system call: {name}", f"{PRELUDE}call({numbers[column]}, {arguments})", REFUSED


OTHERS = {
  "open /proc/1/mem": (_file("/proc/1/mem"), ABSENT),
  "open the trainer's memory": (_file(f"/proc/{os.getpid()}/mem"), ABSENT),
  "environment of all": ("import glob\nfor f in glob.glob('/proc/*/environ'): print('REACHED', f)\nopen('/proc/self/environ')", ABSENT),
  "own maps": (_file("/proc/self/maps"), ABSENT),
  "passwords": (_file("/etc/shadow"), ABSENT), "users": (_file("/etc/passwd"), ABSENT),
  "home": (_file(pathlib.Path.home() / ".bashrc"), ABSENT),
  "the repository": (_file(ROOT / "setup.py"), ABSENT),
  "this file": (_file(pathlib.Path(__file__).resolve()), ABSENT),
  "hidden tests": (_file(ROOT / "tests" / "test_code.py"), ABSENT),
  "physical memory": (_file("/dev/mem"), ABSENT), "a terminal": (_file("/dev/tty"), ABSENT),
  "a disk's device": (_file("/dev/vda"), ABSENT), "shared memory files": ("open('/dev/shm/x', 'w'); print('REACHED')", ABSENT),
  "kernel settings": ("open('/proc/sys/kernel/core_pattern', 'w'); print('REACHED')", ABSENT),
  "cgroups": ("import os; os.mkdir('/sys/fs/cgroup/x'); print('REACHED')", ABSENT),
  "docker": (_file("/var/run/docker.sock"), ABSENT),
  "the folder above": ("open('../x', 'w'); print('REACHED')", r"error: OSError: \[Errno 30\]"),
  "through a link": ("import os; os.symlink('/etc/passwd', 'l'); print('REACHED', open('l').read(1))", ABSENT),
  "write the interpreter": ("import os; open(os.__file__, 'a'); print('REACHED')", r"error: (OSError: \[Errno 30\]|PermissionError)"),
  "write a library": ("open('/usr/lib/x', 'w'); print('REACHED')", r"error: (OSError: \[Errno 30\]|PermissionError)"),
  "change a library's mode": ("import os; os.chmod(os.__file__, 0o777); print('REACHED')", r"error: (OSError: \[Errno 30\]|PermissionError)"),
  "change a library's times": ("import os; os.utime(os.__file__, (0, 0)); print('REACHED')", r"error: (OSError: \[Errno 30\]|PermissionError)"),
  "an installed package": ("import numpy; print('REACHED')", "error: ModuleNotFoundError"),
  "jax": ("import jax; print('REACHED')", "error: ModuleNotFoundError"),
  "this package": ("import nemocascade; print('REACHED')", "error: ModuleNotFoundError"),
  "a shell": ("import subprocess; subprocess.run('id', shell=True); print('REACHED')", REFUSED),
  "os.system": ("import os, sys\nif os.system('true') == 0: print('REACHED')\nsys.exit(7)", "failed: exit code 7"),
  "another interpreter": ("import os, sys; os.execv(sys.executable, ['python', '-c', 'print(\"REACHED\")'])", REFUSED),
  "a spawned process": ("import os, sys; os.posix_spawn(sys.executable, ['p'], {}); print('REACHED')", REFUSED),
  "multiprocessing": ("import multiprocessing as m\np = m.Process(target=print, args=('REACHED',)); p.start(); p.join()", REFUSED),
  "a daemon": ("import os\nif not os.fork():\n  os.setsid(); print('REACHED')", REFUSED),
  "the network": ("import urllib.request; print('REACHED', urllib.request.urlopen('http://1.1.1.1'))", "error: urllib.error.URLError"),
  "a name server": ("import socket; print('REACHED', socket.gethostbyname('example.com'))", "error: (socket.gaierror|PermissionError|OSError)"),
  "a set-user-id program": ("import os; os.execv('/usr/bin/su', ['su']); print('REACHED')", REFUSED),
  "typing for the terminal": ("import fcntl; fcntl.ioctl(0, 0x5412, b'x'); print('REACHED')", r"error: OSError: \[Errno 25\]"),
  "a console": ("import fcntl; fcntl.ioctl(0, 0x541D); print('REACHED')", r"error: OSError: \[Errno 25\]"),
  "descriptors that were left open": ("import os, sys\nfor fd in range(4, 1024):\n  try: print('REACHED', fd, os.fstat(fd))\n  except OSError: pass\nsys.exit(7)", "failed: exit code 7"),
  "higher limits": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('REACHED')", "error: ValueError"),
  "code in a file": ("import ctypes, os\nopen('x.so', 'wb').write(open('/lib/x86_64-linux-gnu/libm.so.6' if os.path.exists('/lib/x86_64-linux-gnu/libm.so.6') else '/lib/aarch64-linux-gnu/libm.so.6', 'rb').read())\nctypes.CDLL('./x.so'); print('REACHED')", "error: OSError: .*(failed to map|not permitted)"),
  "machine code that calls": ("import ctypes, mmap, platform\nif platform.machine() != 'x86_64': raise PermissionError('x86-64 only')\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b839000000' '0f05' 'c3'))\nf = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nr = f()\nif r == -1: raise PermissionError('fork')\nprint('REACHED', r)", REFUSED),
  "calls of 32 bits": ("import ctypes, mmap, platform\nif platform.machine() != 'x86_64': ctypes.string_at(0)\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b802000000' 'cd80' 'c3'))\nf = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint('REACHED', f())", "killed: signal (31|11)"),
}  # fmt: skip

ESCAPES = {name: (source, pattern) for name, source, pattern in _calls()} | OTHERS
