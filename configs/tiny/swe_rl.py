"""Stage 8, SWE RL, agentless: SEARCH/REPLACE edits to a small repository (paper.md 9).

The paper pays a judge model; tests that run are the stronger verdict and cost little at this size.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields()
  c.mixture = dict(swe=1.0)
  c.overlong = "filter"
  c.refill_rounds = 2
  c.steps = 16
  c.optimizer.peak_lr = 5e-4
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
