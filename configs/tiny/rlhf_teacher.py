"""The preference teacher of MOPD: RLHF from the SFT checkpoint (arXiv 2603.19220, section 4.4).

Shorter than the RLHF stage, so that RLHF after MOPD can still improve the model.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("rlhf_teacher")
  c.steps = 5
  c.optimizer.peak_lr = 8e-4
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
