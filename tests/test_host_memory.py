"""Freed memory is used again without a page fault."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import jax, numpy as np
from nemocascade import host_memory
if "keep" in sys.argv:
  assert host_memory.keep()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ones = {"numpy": lambda: np.ones(50_000_000), "jax": jax.jit(lambda: jax.numpy.ones(50_000_000) * 2)}[sys.argv[1]]
jax.block_until_ready(ones())
before = faults()
jax.block_until_ready(ones())
print(faults() - before)
"""


def faults(*words):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *words],
    cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_a_freed_array_is_used_again_without_faults(library):
  assert faults(library, "keep") < 100 < faults(library)
