"""Stage 7, Code RL: 1 iff all hidden tests pass in the sandbox (paper.md 4.2).

The paper samples this stage with top_p 0.95; 1.0 here keeps the sampler's and the trainer's
distribution the same.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields()
  c.mixture = dict(code=1.0)
  c.overlong = "filter"
  c.refill_rounds = 2
  c.steps = 12  # All of it is learned within ten.
  c.optimizer.peak_lr = 4e-4  # Late stages forget less at a low rate.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
