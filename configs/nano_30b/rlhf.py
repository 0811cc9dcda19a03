"""Stage 5, RLHF of 30B-A3B: the judge compares all pairs of a group; length control; KL weight 0.03.

See the Cascade 2 report (arXiv 2603.19220), section 4.5. The judge is that of reward_model.py. Thinking mode
only. Commands: if_rl.py.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl

TOTAL_TOKENS = 16_384  # Table 9: 16K.


def stage(arg: str = "") -> ConfigDict:
  return rl.stage("rlhf", arg, steps=25, total_tokens=TOTAL_TOKENS)  # Table 9; the text has about 30 steps.


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
