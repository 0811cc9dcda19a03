"""Freed memory is used again without a page fault."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from nemocascade import host_memory
if "keep" in sys.argv:
  assert host_memory.keep()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(50_000_000)
before = faults()
np.ones(50_000_000)
print(faults() - before)
"""


def faults(*words):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *words],
    cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_a_freed_array_is_used_again_without_faults():
  assert faults("keep") < 100 < faults()
