"""Stage 5, RLHF: all pairs of a group compared by the judge, length control, KL 0.03 (paper.md 4.2, 4.4).
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields()
  c.mixture = dict(preference=1.0)
  c.reward = "pairwise"
  c.dynamic_filtering = False  # Pairwise rewards differ also where verdicts are equal.
  c.overlong = "filter"
  c.kl_weight = 0.03
  c.steps = 16
  c.optimizer.peak_lr = 6e-4  # At 1e-3 the other domains pay for it.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
