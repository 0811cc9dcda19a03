"""Keeps freed host memory in the process, in huge pages, for JAX arrays on the CPU."""

import ctypes
import sys

import jax

RESERVED = (4 << 30) - (16 << 20)  # Bytes of address space; only pages that are used take memory.
HUGE_PAGE = 2 << 20
# Constants of glibc's malloc.h and Linux's mman.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _MADV_HUGEPAGE = -1, -2, -4, 14


def keep() -> bool:
  """Configures malloc to keep freed memory; returns whether that worked. It needs glibc on Linux.

  XLA's CPU client allocates the arrays of each program with malloc and frees them after the call. By default
  malloc returns large blocks to the system, so every step has page faults for all of them again. On a virtual
  machine that took a third of a training step (250,000 faults at 12,000 tokens).

  The main thread's heap alone keeps large blocks, so arrays must be allocated by that thread: JAX is told to run
  programs in the thread that calls them. XLA's threads have heaps of their own for their small blocks. With one heap
  for all, a process that had compiled its programs itself, and so had a heap full of the compiler's small blocks,
  took half as long again for a step of the tiny model: the threads waited for the heap's lock.
  """
  if not sys.platform.startswith("linux"):
    return False
  c = ctypes.CDLL(None)
  if not hasattr(c, "gnu_get_libc_version"):
    return False
  for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
    c.mallopt(option, value)
  c.sbrk.restype, c.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
  c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  c.free.argtypes = [ctypes.c_void_p]
  c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

  # One allocation moves the end of the heap by RESERVED; freeing it leaves the end there. Options of mallopt
  # are C ints, too small for RESERVED: half of it is requested, and malloc adds the other half as padding.
  c.mallopt(_TOP_PAD, RESERVED // 2 - HUGE_PAGE)
  start = c.sbrk(0)
  c.free(c.malloc(RESERVED // 2))
  end = c.sbrk(0)
  c.mallopt(_TOP_PAD, 64 * HUGE_PAGE)
  if not start or not end or end - start < RESERVED * 3 // 4:
    return False
  first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
  c.madvise(first, last - first, _MADV_HUGEPAGE)
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return True
