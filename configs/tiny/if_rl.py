"""Stage 2, IF-RL: instructions whose following a program verifies (arXiv 2603.19220, section 4.2).

  python -m experiments.rl --config=configs/tiny/if_rl.py --workdir=runs/if_rl --config.init_from=CKPT

Thinking mode only, dynamic filtering with refill, reward 0 for a completion cut off at the limit.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("if_rl")
  c.steps = 40
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
