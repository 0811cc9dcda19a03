"""Stage 3, multi-domain RL: STEM questions, tool calls, structured output, and mathematics.

The paper's blend is 55% STEM, 30% tools, 15% structured (paper.md 4.2); the tiny cascade has no
other stage for mathematics, so it shares this one.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields()
  c.mixture = dict(stem=0.25, tools=0.2, structured=0.2, math=0.35)
  c.rollout.total_tokens = 112  # Several turns.
  c.overlong = "filter"
  c.steps = 48
  c.optimizer.peak_lr = 1.2e-3  # The other domains pay for it; MOPD mends that.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
