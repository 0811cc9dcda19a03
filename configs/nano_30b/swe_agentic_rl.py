"""Stage 9, agentic SWE RL of 30B-A3B: up to 200 turns with tools, without thinking; tests give the reward.

See the Cascade 2 report (arXiv 2603.19220), section 4.8 and table 10. Commands: if_rl.py. `base.TURNS` has the
turns.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage(
    "swe_agentic_rl",
    arg,
    steps=226,  # Not published; one pass over the data card's 3,612 tasks.
    prompts=16,
    completions=64,
    total_tokens=262_144,  # The context of an episode, 256K.
    temperature=0.8,
    warmup_steps=10,
    **recipe.ANNEALED,  # From 3e-6 to 0. Whether along a line or a cosine is not published.
  )


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
