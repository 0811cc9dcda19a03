"""Stage 3, multi-domain RL: STEM questions, tool calls, structured output, and mathematics.

The Cascade 2 report (arXiv 2603.19220, section 4.3) mixes 55% STEM, 30% tools and 15% structured output.
Mathematics is added here because no other RL stage of the tiny cascade trains it.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("multi_domain_rl")
  c.mixture = dict(stem=0.25, tools=0.2, structured=0.2, math=0.35)
  rl.several_turns(c)
  c.steps = 48
  c.optimizer.peak_lr = 1.2e-3  # This rate lowers the other domains' scores; MOPD restores them.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
