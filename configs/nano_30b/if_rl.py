"""Stage 2, IF-RL of 30B-A3B: instructions whose following a program verifies.

  python -m experiments.compile --config=configs/nano_30b/if_rl.py --topology=v5p:4x4x4
  python -m experiments.rl --config=configs/nano_30b/if_rl.py --workdir=DIR --config.init_from=CKPT
  python -m experiments.rl --config=configs/nano_30b/if_rl.py:smoke --workdir=DIR --config.init_from=CKPT

Thinking mode only, dynamic filtering with refill, reward 0 for a completion cut off at the limit (Cascade 2
report, arXiv 2603.19220, section 4.2). The other settings are those of rl.py.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage("if_rl", arg, steps=180)  # Table 8.


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
