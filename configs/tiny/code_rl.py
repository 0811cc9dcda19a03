"""Stage 7, Code RL: the reward is 1 iff all hidden tests pass in the sandbox.

The Cascade 2 report (arXiv 2603.19220, section 4.7 and appendix B) samples with top_p 0.95. Here top_p is
1.0, so that sampler and trainer have the same distribution.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("code_rl")
  c.steps = 12  # The score stops rising within ten.
  c.optimizer.peak_lr = 4e-4  # A late stage forgets less at a low rate.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
