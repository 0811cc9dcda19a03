"""TPU slices by name: how a stage lies on each, and the rows that keep every chip busy.

A name is that of `experiments.compile --topology`. `expert` devices share one set of experts, and
`data` such groups share the rows; both cut parameters and moments. Experts are 94% of the
parameters: a larger `expert` gathers fewer of them for each token that is decoded, and sends more
rows between chips in a training step.
"""

from ml_collections import ConfigDict

from nemocascade.errors import unknown

# Of a training step: 2M tokens a step, a row a device. Rows are shorter where chips have less memory.
SLICES = {
  "v5p:4x4x4": dict(data=-1, expert=8, rows=64, row_tokens=32_768),  # 64 chips of 95 GiB.
  "v6e:16x16": dict(data=-1, expert=8, rows=256, row_tokens=8_192),  # 256 chips of 32 GiB.
  "v5e:16x16": dict(data=-1, expert=16, rows=256, row_tokens=8_192),  # 256 chips of 16 GiB.
  "tpu7x:4x4x4": dict(data=-1, expert=8, rows=128, row_tokens=16_384),  # 64 chips of 2 x 96 GiB.
}
DEFAULT = "v5p:4x4x4"
DEVICES = {"v5p:4x4x4": 64, "v6e:16x16": 256, "v5e:16x16": 256, "tpu7x:4x4x4": 128}


def words(arg: str, *known: str) -> tuple[str, str, bool]:
  """(slice, one of `known` or "", smoke) of a config's argument: "v6e:16x16,smoke", in any order."""
  chosen, word, smoke = DEFAULT, "", False
  for part in filter(None, arg.split(",")):
    if part in SLICES:
      chosen = part
    elif part in known:
      word = part
    elif part == "smoke":
      smoke = True
    else:
      raise unknown("config argument", part, (*SLICES, *known, "smoke"))
  return chosen, word, smoke


def mesh(name: str) -> ConfigDict:
  """The field `mesh` of a config for this slice."""
  return ConfigDict({axis: SLICES[name][axis] for axis in ("data", "expert")})
