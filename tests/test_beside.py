"""Functions that run in threads beside decoding: how many run at a time, and that none is lost."""

import queue
import threading

import pytest

from nemocascade.rollout import beside
from nemocascade.rollout.beside import Beside


def test_few_functions_begin_at_a_time(monkeypatch):
  monkeypatch.setattr(beside, "SHORT_S", 60)
  work, go, begun = Beside(64, 2), threading.Event(), queue.SimpleQueue()

  def call():
    begun.put(None)
    go.wait(60)

  for name in range(30):
    work.start(name, call, 60)
  assert work.ended() == []
  for _ in range(2):
    begun.get(timeout=60)
  with pytest.raises(queue.Empty):  # A third one would begin within this time.
    begun.get(timeout=0.2)
  assert len(work) == 30
  go.set()
  ended = []
  while len(work):
    ended += work.ended(1.0)
  assert sorted(name for name, *_ in ended) == list(range(30))


def test_functions_that_wait_get_as_many_threads_as_may_run(monkeypatch):
  """Sixteen functions that wait for one another end only if all of them run at a time."""
  monkeypatch.setattr(beside, "SHORT_S", 0.01)
  work, meet = Beside(16, 2), threading.Barrier(16, timeout=60)
  for name in range(16):
    work.start(name, meet.wait, 60)
  ended = []
  while len(work):
    ended += work.ended(1.0)
  assert len(ended) == 16 and all(error is None for _, _, error, _ in ended)
