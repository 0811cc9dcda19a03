"""Stage 1, SFT: demonstrations of all domains packed into rows (paper.md 3.1).

  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/sft
  python -m experiments.sft --config=configs/tiny/sft.py:smoke --workdir=runs/sft_smoke

The schedule anneals fully: RL from a checkpoint in mid-schedule would be credited for averaging.
"""

from ml_collections import ConfigDict

from configs.tiny import base


def stage(arg: str = "") -> ConfigDict:
  c = ConfigDict()
  c.kind = "sft"
  c.init_from = ""  # "" draws fresh parameters.
  c.conversations = 4000  # a domain.
  c.non_thinking = 0.1  # Share of conversations without thoughts.
  c.rows = 48  # a step.
  c.row_tokens = 256
  c.steps = 700
  c.optimizer = dict(
    peak_lr=6e-3,
    warmup_steps=20,
    schedule="cosine",
    final_fraction=0.02,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    frozen=(),
  )
  c.save_every = 200
  if arg == "smoke":
    c.conversations, c.rows, c.steps, c.save_every = 60, 4, 6, 3
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
