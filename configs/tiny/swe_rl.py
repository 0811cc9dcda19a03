"""Stage 8, agentless SWE RL: SEARCH/REPLACE edits to a small repository.

In the Cascade 2 report (arXiv 2603.19220, section 4.8) a judge model gives the reward. Here the repository's
tests give it: they are more reliable, and cheap at this size.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("swe_rl")
  c.steps = 16
  c.optimizer.peak_lr = 5e-4
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
