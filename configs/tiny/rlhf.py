"""Stage 5, RLHF: the judge compares all pairs of a group; length control; KL weight 0.03.

See the Cascade 2 report (arXiv 2603.19220), section 4.5. Length control follows Nemotron-3-Nano
(arXiv 2512.20848) and NeMo-Gym's `genrm_compare`.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl


def stage(arg: str = "") -> ConfigDict:
  c = rl.fields("rlhf")
  c.steps = 16
  c.optimizer.peak_lr = 6e-4  # 1e-3 lowers the other domains' scores.
  if arg == "smoke":
    rl.shrink(c)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
