"""Stage 1, SFT: demonstrations of all domains, packed into rows (arXiv 2603.19220, section 3.1).

  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/sft
  python -m experiments.sft --config=configs/tiny/sft.py:smoke --workdir=runs/sft_smoke

The learning rate anneals to nearly 0. From a mid-schedule checkpoint, RL would gain by annealing alone.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import base


def stage(arg: str = "") -> ConfigDict:
  c = recipe.sft()
  c.sources = recipe.conversations(  # Hard domains get more: arithmetic, lookup, composition.
    instruction=4000, math=5000, stem=3000, structured=2000, tools=3000,
    preference=2000, long_context=5000, code=2000, swe=4500, swe_agentic=2500,
  )  # fmt: skip
  c.long_documents = "drop"  # split | cut | drop; all of these fit.
  c.look_ahead = 2**23  # More than all the data: rows are shuffled over the whole epoch.
  c.streams = 1
  c.rows = 32  # Per step.
  c.pieces = 4  # Of 8 rows: a step takes 0.22 s of CPU time; 0.24 with 4 or 16 rows a piece.
  c.row_tokens = 256
  c.steps = 600
  c.optimizer.update(peak_lr=6e-3, warmup_steps=20, final_fraction=base.FINAL_FRACTION)
  c.save_every = 200
  if arg == "smoke":
    c.sources = recipe.conversations(**dict.fromkeys(c.sources, 60))
    c.rows, c.pieces, c.steps, c.save_every = 4, 1, 6, 3
    c.optimizer.warmup_steps = 2
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
