"""Freed host memory is kept for the next step, in huge pages, where arrays live on the CPU."""

import ctypes
import sys

RESERVED = (4 << 30) - (16 << 20)  # Bytes of address space; touched, and so paid for, only as far as they are used.
HUGE_PAGE = 2 << 20
# glibc's malloc.h and Linux's mman.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX, _MADV_HUGEPAGE = -1, -2, -4, -8, 14


def keep() -> bool:
  """Returns whether it could be arranged: with glibc on Linux; elsewhere nothing changes.

  XLA's CPU client takes each program's arrays from malloc and gives them back after the call. By
  default large ones go back to the system, and every step faults them in again page by page: on a
  virtual machine that was a third of a training step (a quarter of a million faults at 12,000 tokens).
  """
  if not sys.platform.startswith("linux"):
    return False
  c = ctypes.CDLL(None)
  if not hasattr(c, "gnu_get_libc_version"):
    return False
  for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
    c.mallopt(option, value)
  c.sbrk.restype, c.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
  c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  c.free.argtypes = [ctypes.c_void_p]
  c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

  # One allocation moves the heap's end by all that is reserved; it stays there when freed. Options
  # are C ints: half of it is asked for, half is what malloc adds.
  c.mallopt(_TOP_PAD, RESERVED // 2 - HUGE_PAGE)
  start = c.sbrk(0)
  c.free(c.malloc(RESERVED // 2))
  end = c.sbrk(0)
  c.mallopt(_TOP_PAD, 64 * HUGE_PAGE)
  if not start or not end or end - start < RESERVED * 3 // 4:
    return False
  first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
  c.madvise(first, last - first, _MADV_HUGEPAGE)
  return True
