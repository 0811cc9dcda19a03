"""The pattern of a model's blocks as units that repeat."""

# Fewest repeats of a unit that are scanned. A scan copies the parameters and states of a repeat at every
# iteration, so that two repeats run faster unrolled.
REPEATS = 3


def plan(pattern: str) -> list[tuple[str, int]]:
  """The pattern as a list of (unit, repeats); greedily takes the unit whose repeats cover the most blocks.

  Repeats are scanned, so that compile time does not grow with the number of repeats.
  """
  units, at = [], 0
  while at < len(pattern):
    best = (pattern[at], 1)
    for size in range(1, (len(pattern) - at) // 2 + 1):
      unit, n = pattern[at : at + size], 1
      while pattern.startswith(unit, at + n * size):
        n += 1
      if n >= REPEATS and n * size > len(best[0]) * best[1]:
        best = (unit, n)
    units.append(best)
    at += len(best[0]) * best[1]
  # Adjacent units that do not repeat become one unit.
  merged: list[tuple[str, int]] = []
  for unit, n in units:
    if n == 1 and merged and merged[-1][1] == 1:
      merged[-1] = (merged[-1][0] + unit, 1)
    else:
      merged.append((unit, n))
  return merged
