"""Stage 9, agentic SWE RL: several turns with tools, without thinking.

The Cascade 2 report (arXiv 2603.19220, section 4.8) has temperature 0.8 and anneals the learning rate to 0.
This stage has temperature 1.0 and a constant rate.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("swe_agentic_rl")
  rl.several_turns(c)
  c.steps = 12  # The score stops rising within ten.
  c.optimizer.peak_lr = 4e-4
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
