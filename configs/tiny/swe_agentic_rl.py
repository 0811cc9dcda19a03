"""Stage 9, SWE RL, agentic: several turns with tools, without thinking (paper.md 9: T 0.8, LR to 0).
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields()
  c.mixture = dict(swe_agentic=1.0)
  c.rollout.total_tokens = 112  # Several turns.
  c.overlong = "filter"
  c.refill_rounds = 2
  c.steps = 12  # All of it is learned within ten.
  c.optimizer.peak_lr = 4e-4
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
