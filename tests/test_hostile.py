"""A few hostile programs of each kind; `python tests/hostile.py` runs them all."""

import pytest
from hostile import attempts

SLOW = {"no end"}  # Each program of these kinds runs until its time limit.
EACH = 6


def _representatives():
  """The first program of each kind, and others at equal distances after it."""
  kinds: dict[str, list] = {}
  for attempt in attempts():
    kinds.setdefault(attempt.kind, []).append(attempt)
  for kind, found in kinds.items():
    count = 2 if kind in SLOW else EACH
    yield from found[:: max(1, len(found) // count)][: count + 1]


REPRESENTATIVES = list(_representatives())


@pytest.mark.parametrize("attempt", REPRESENTATIVES, ids=lambda a: f"{a.kind}: {a.name}")
def test_the_sandbox_holds(attempt):
  happened, held = attempt.run()
  assert held, happened
