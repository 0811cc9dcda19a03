"""The preference judge: a Bradley-Terry reward model trained on generated pairs.

Nemotron-Cascade 1 (arXiv 2512.13607, section 4) has one; Cascade 2 uses a generative reward model.

  python -m experiments.reward_model --config=configs/tiny/reward_model.py --workdir=runs/judge
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import base


def stage(arg: str = "") -> ConfigDict:
  c = recipe.reward_model()
  c.init_from = ""
  c.source = dict(rows="generated:preference")
  c.pairs = 64  # Per step.
  c.row_tokens = 64
  c.heldout_pairs = 512
  c.steps = 70
  c.optimizer.update(peak_lr=3e-3, warmup_steps=10, final_fraction=base.FINAL_FRACTION, **recipe.COSINE)
  if arg == "smoke":
    c.steps, c.save_every, c.heldout_pairs = 6, 3, 64
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
