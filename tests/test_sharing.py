"""Processes that share a work directory divide its seeds."""

import contextlib
import subprocess
import sys
from pathlib import Path

from nemocascade.runtime.sharing import each, held

HOLDS = """
import sys
from pathlib import Path
from nemocascade.runtime.sharing import held
with held(Path(sys.argv[1]), wait=True):
  print("in", flush=True)
  sys.stdin.read()  # Until it is killed.
"""


def test_a_process_leaves_a_seed_that_another_is_at_to_the_last_and_then_waits(tmp_path):
  """The other process holds seed 0 while this one runs 1 and 2, and then releases it."""
  done, place = [], lambda seed: tmp_path / str(seed)
  with contextlib.ExitStack() as other:
    assert other.enter_context(held(place(0), wait=False))

    def work(seed):
      done.append(seed)
      if done == [1, 2]:
        with held(place(0), wait=False) as mine:
          assert not mine
        other.close()
      return -seed

    steps = list(each((0, 1, 2), place, work))
  assert done == [1, 2, 0]
  assert steps == [{1: -1}, {1: -1, 2: -2}, {0: 0, 1: -1, 2: -2}] and list(steps[-1]) == [0, 1, 2]


def test_what_a_killed_process_held_is_free(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", HOLDS, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=Path(__file__).parent.parent,
  ) as other:
    assert other.stdout.readline() == b"in\n"
    with held(tmp_path, wait=False) as mine:
      assert not mine
    other.kill()
    with held(tmp_path, wait=True) as mine:
      assert mine
