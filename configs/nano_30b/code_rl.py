"""Stage 7, Code RL of 30B-A3B: the reward is 1 iff all tests pass in the sandbox.

See the Cascade 2 report (arXiv 2603.19220), section 4.7 and table 9. Commands: if_rl.py.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage(
    "code_rl",
    arg,
    steps=22,
    total_tokens=118_784,  # 118K.
    top_p=0.95,
    # Sampling with top_p < 1 needs a correction: each token is weighted by its probability under the full
    # distribution over that under the truncated one. The report names none; this is MOPD's.
    correction=recipe.STAGES["mopd"]["correction"],
  )


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
