"""Mesh shape and SFT batch shape for each TPU slice.

A slice is named as in `experiments.compile --topology`. The mesh has `data` x `expert` devices. The experts
are split over the `expert` axis. Rows, parameters and moments are split over both axes. Experts are 94% of
the parameters. With a larger `expert`, decoding gathers fewer expert parameters per token, and a training
step sends more rows between chips.
"""

from ml_collections import ConfigDict

from nemocascade.errors import unknown

# `rows` and `row_tokens` of an SFT step: 64 rows of 256K, as the report's, in `pieces`, with the chips of an expert group
# sharing a row; on the smallest chips 2M tokens, one row per device.
SLICES = {
  "v5p:4x4x4": dict(data=-1, expert=8, rows=64, row_tokens=262_144, pieces=8),  # 64 chips of 95 GiB.
  "v5p:8x8x8": dict(data=-1, expert=8, rows=64, row_tokens=262_144),  # 512 of them.
  "v6e:16x16": dict(data=-1, expert=16, rows=64, row_tokens=262_144, pieces=4),  # 256 chips of 32 GiB.
  "v5e:16x16": dict(data=-1, expert=16, rows=256, row_tokens=8_192),  # 256 chips of 16 GiB.
  "tpu7x:4x4x4": dict(data=-1, expert=8, rows=64, row_tokens=262_144, pieces=4),  # 64 chips of 2 x 96 GiB.
}
DEFAULT = "v5p:4x4x4"
DEVICES = {"v5p:4x4x4": 64, "v5p:8x8x8": 512, "v6e:16x16": 256, "v5e:16x16": 256, "tpu7x:4x4x4": 128}


def words(arg: str) -> tuple[str, bool]:
  """Parses a config's argument, such as "v6e:16x16,smoke": comma-separated words in any order.

  Returns:
    (slice name, whether `smoke` was given)

  Raises:
    UserError: a word is not known.
  """
  chosen, smoke = DEFAULT, False
  for part in filter(None, arg.split(",")):
    if part in SLICES:
      chosen = part
    elif part == "smoke":
      smoke = True
    else:
      raise unknown("config argument", part, (*SLICES, "smoke"))
  return chosen, smoke


def mesh(name: str) -> ConfigDict:
  """The value of a config's field `mesh` for this slice."""
  return ConfigDict({axis: SLICES[name][axis] for axis in ("data", "expert")})
