"""A seccomp filter for Linux: the system calls that an untrusted program may make.

Every call that is not listed is refused, also calls that future kernels add. A program is one
process. It can start threads, but no processes and no other programs. It cannot reach another
process. It cannot watch or lock files that other programs also see. It cannot allocate kernel
objects whose memory is outside the limits of the process.
"""

import platform
import struct

# Name -> (number on x86-64, number on arm64). None: arm64 has no such call.
_ALLOWED = {
  # Files. Only the read-only system and the program's folder are visible.
  "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
  "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "open": (2, None),
  "openat": (257, 56), "creat": (85, None), "close": (3, 57), "close_range": (436, 436),
  "lseek": (8, 62), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
  "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
  "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
  "readlink": (89, None), "readlinkat": (267, 78), "getdents": (78, None),
  "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
  "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "rename": (82, None),
  "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37),
  "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
  "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88),
  "utimes": (235, None), "utime": (132, None), "truncate": (76, 45), "ftruncate": (77, 46),
  "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "umask": (95, 166),
  "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fcntl": (72, 25), "ioctl": (16, 29),
  "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71), "copy_file_range": (326, 285),
  "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11),
  "llistxattr": (195, 12), "flistxattr": (196, 13),
  # The process's memory, all of it limited by RLIMIT_AS.
  "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
  "brk": (12, 214), "madvise": (28, 233), "msync": (26, 227),
  # Threads, and information about the calling thread.
  "clone": (56, 220), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
  "exit": (60, 93), "exit_group": (231, 94), "gettid": (186, 178), "getpid": (39, 172),
  "getppid": (110, 173), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
  "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
  "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
  "getcpu": (309, 168), "restart_syscall": (219, 128),
  # Signal handling within the process, and timers.
  "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
  "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
  "sigaltstack": (131, 132), "pause": (34, None), "alarm": (37, None), "setitimer": (38, 103),
  "getitimer": (36, 102),
  # Time and limits.
  "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
  "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
  "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164),
  "prlimit64": (302, 261),
  # Identity.
  "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
  "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
  "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156), "uname": (63, 160),
  "getrandom": (318, 278),
  # Waiting.
  "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
  "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
  "epoll_wait": (232, None), "epoll_pwait": (281, 22),
  # A socket pair, which asyncio needs. It cannot be connected, nor can descriptors be sent over it.
  "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
  "getsockopt": (55, 209), "getsockname": (51, 204), "getpeername": (52, 205),
}  # fmt: skip
# Calls restricted in one argument: name -> (its index, allowed values, errno for other values).
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_CHECKED = {
  # The flags with which C libraries start a thread. Starting a process takes other flags.
  "clone": (0, (0x3D0F00, 0x7D0F00), _EPERM),
  "prlimit64": (0, (0,), _EPERM),  # Process id 0: the caller's own limits.
  "socketpair": (0, (1,), _EPERM),  # AF_UNIX.
  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC and F_GETPIPE_SZ. Other commands lock
  # files, send signals, watch folders or enlarge pipes.
  "fcntl": (1, (0, 1, 2, 3, 4, 1030, 1032), _EPERM),
  # TCGETS (for isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX and TCGETS2.
  "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A), _ENOTTY),
  # Advice that affects only the caller's memory. Other advice can drop cached pages of shared files.
  "madvise": (2, (0, 1, 2, 4, 8, 14, 15), _EPERM),
}
_CLONE3 = 435
# C libraries try calls from this number on, and fall back to older ones on ENOSYS. So these calls
# fail with ENOSYS, not EPERM.
_FIRST_NEWER = 424
# Machine -> (AUDIT_ARCH value, index into the tuples of _ALLOWED).
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32 = 0x40000000  # Numbers from here on are x86-64's x32 ABI, a second way to make the same calls.

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # Byte offsets in the kernel's struct seccomp_data.

Instructions = list[tuple[int, int, int, int]]


def filter_program(machine: str | None = None) -> bytes | None:
  """The filter as classic BPF instructions of 8 bytes; None if it does not support this machine.

  Args:
    machine: "x86_64" or "aarch64". None: this machine's, which must run Linux.
  """
  if machine is None and platform.system() != "Linux":
    return None
  machine = platform.machine() if machine is None else machine
  if machine not in _MACHINES:
    return None
  audit, column = _MACHINES[machine]
  code = [
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_EQUAL, 1, 0, audit),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, _NUMBER),
    *_search(_ranges(column)),
  ]
  return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _ranges(column: int) -> list[tuple[int, Instructions]]:
  """(first call number, instructions for it and all numbers up to the next entry), ascending.

  Args:
    column: index into the tuples of _ALLOWED.
  """
  denied, unknown = ([(_RETURN, 0, 0, _FAIL | error)] for error in (_EPERM, _ENOSYS))
  # A filter cannot read the flags of clone3, which are in memory. On ENOSYS, libc falls back to clone.
  actions = {_CLONE3: unknown}
  for name, numbers in _ALLOWED.items():
    number = numbers[column]
    if number is not None:
      actions[number] = _checks(*_CHECKED[name]) if name in _CHECKED else _allow()
  ranges: list[tuple[int, Instructions]] = []
  edges = {0, _FIRST_NEWER, _X32, *actions, *(number + 1 for number in actions)}
  for number in sorted(edges):
    otherwise = unknown if _FIRST_NEWER <= number < _X32 else denied
    action = actions.get(number, otherwise)
    if not ranges or ranges[-1][1] != action:
      ranges.append((number, action))
  return ranges


def _search(ranges: list[tuple[int, Instructions]]) -> Instructions:
  """A binary search for the range of the call number, as the kernel runs this at every call."""
  if len(ranges) == 1:
    return ranges[0][1]
  middle = len(ranges) // 2
  below, above = _search(ranges[:middle]), _search(ranges[middle:])
  # A conditional jump can skip at most 255 instructions; an unconditional one has no such limit.
  return [(_AT_LEAST, 0, 1, ranges[middle][0]), (_JUMP, 0, 0, len(below)), *below, *above]


def _checks(argument: int, values: tuple[int, ...], error: int) -> Instructions:
  """Allows the call if the argument's lower 32 bits, the only ones that matter, are in `values`."""
  code = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
  for i, value in enumerate(values):
    code.append((_EQUAL, len(values) - i, 0, value))
  return [*code, (_RETURN, 0, 0, _FAIL | error), *_allow()]


def _allow() -> Instructions:
  return [(_RETURN, 0, 0, _ALLOW)]
