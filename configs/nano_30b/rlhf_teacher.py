"""The preference teacher of MOPD: RLHF from the SFT checkpoint.

See the Cascade 2 report (arXiv 2603.19220), section 4.4. It does not say which step taught MOPD. Of two that it
scores on ArenaHard v2 (hard prompts, creative writing), 100 has (81.7, 68.6) and 160 has (80.7, 71.2). The other
settings are those of rlhf.py. Commands: if_rl.py.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl, rlhf

# The earlier one: better on hard prompts at two thirds of the cost. The comparison multi_domain.py runs to the later.
STEPS = 100


def stage(arg: str = "") -> ConfigDict:
  return rl.stage("rlhf_teacher", arg, steps=STEPS, total_tokens=rlhf.TOTAL_TOKENS)


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
