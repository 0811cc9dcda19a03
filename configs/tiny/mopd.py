"""Stage 4, MOPD: RL whose advantage compares the student with one teacher per domain.

See the Cascade 2 report (arXiv 2603.19220), section 4.4. Teachers are the cascade's own checkpoints: the best
so far for each domain. For preferences that can be the RLHF run from the SFT checkpoint (rlhf_teacher.py).
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("mopd")
  c.mixture = dict(math=0.1, instruction=0.3, stem=0.1, structured=0.1, tools=0.1, preference=0.3)
  # The signal is per token, so a group adds nothing.
  c.rollout.update(prompts=256, completions=1)
  rl.several_turns(c)
  c.teachers = dict.fromkeys(c.mixture, "best")
  c.steps = 48
  c.optimizer.update(peak_lr=2e-3, **recipe.ANNEALED)
  if arg == "smoke":
    rl.shrink(c)
    c.rollout.update(prompts=64, completions=1)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
