"""All tests run on eight CPU devices; implicit rank promotion raises an error.

The workers of a session and the commands that they start share one cache of compiled programs, which is removed
at its end.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # Before jax is imported, because it reads the variable then.
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compilations.")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The files that take longest, from the longest. No worker is left with one of them while the others have ended.
LONGEST = (
  "test_cascade", "test_mesh_stages", "test_processes", "test_rl", "test_ablation_smoke", "test_bench", "test_tutorials",
  "test_hybrid", "test_temperature", "test_compilations", "test_own_functions", "test_notebooks",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
  gc.freeze()  # Collections of garbage then leave out what was imported, for which they take a tenth of a second each.


MAPS = 20_000  # Memory maps of a worker at which it drops its compiled programs.


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Drops compiled programs after a module if there are many, because a program on the CPU holds several memory maps.

  Linux allows a process 65,530 of them (vm.max_map_count), and XLA crashes if it gets no more.
  """
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def commands_compile_fast():
  """Commands that tests start compile without most optimizations too. jax here has read its own value by now."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    yield


@pytest.fixture(scope="module")
def compiled_fast():
  """Compiles without most optimizations, for modules that take nearly all of their time to compile."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
