"""Stage 1, SFT of 30B-A3B (Cascade 2 report, arXiv 2603.19220, section 3.1 and table 7).

  python -m experiments.compile --config=configs/nano_30b/sft.py --topology=v5p:4x4x4
  python -m experiments.sft --config=configs/nano_30b/sft.py --workdir=DIR
  python -m experiments.sft --config=configs/nano_30b/sft.py:smoke --workdir=DIR

The report packs 64 rows of 256K tokens. Rows of that length need sequence parallelism, which is not
implemented. Here a row is as long as one device holds (meshes.py), and longer conversations are refused.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes
from configs.tiny import sft as tiny


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  c = base.get_config(slice_, smoke)
  c.update(recipe.sft())
  # Generated conversations. The report's 26M (section 3.2) are not all released.
  c.conversations = dict.fromkeys(c.domains, 100_000)
  c.rows = meshes.SLICES[slice_]["rows"]  # 64 on v5p.
  c.row_tokens = meshes.SLICES[slice_]["row_tokens"]
  c.steps = 40_000  # Length of the schedule. The report stops at 33,000, about 1.5 epochs.
  c.optimizer.update(
    peak_lr=5e-5,
    warmup_steps=200,
    final_fraction=0.1,  # The rate ends at 5e-6.
    b2=0.98,
    weight_decay=0.1,
  )
  c.router_balance.kind = "both"  # Not published for Cascade 2; as in Nano-3's SFT (arXiv 2512.20848).
  c.save_every = 500
  if smoke:
    small = tiny.stage("smoke")
    c.conversations = small.conversations
    c.rows, c.row_tokens, c.steps, c.save_every = 8, small.row_tokens, 4, 2
    # The check of teachers refuses near-uniform models.
    c.optimizer.update(peak_lr=5e-3, warmup_steps=small.optimizer.warmup_steps)
  else:
    c.init_from = f"hf:{base.FOLDER}"
  return c
