"""Stage 4, MOPD of 30B-A3B: RL whose advantage compares the student with one teacher per domain.

  python -m experiments.compile --config=configs/nano_30b/mopd.py --topology=v5p:4x4x4
  python -m experiments.rl --config=configs/nano_30b/mopd.py --workdir=DIR --config.init_from=CKPT \\
    --config.teachers.math=CKPT ...

The student is the checkpoint after multi-domain RL. Settings: Cascade 2 report (arXiv 2603.19220),
section 4.4, equations 2 to 4, and table 8.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, rl

# Shares of the rows on the RL data card. The number of RLHF prompts is not published; 0.25 is our choice.
MIXTURE = dict(math=0.3, instruction=0.3, stem=0.15, structured=0.15, tools=0.1, preference=0.25)
TOTAL_TOKENS = 98_304  # Table 8: 98K.


def stage(arg: str = "", **differs: Any) -> ConfigDict:
  """The stage; `differs` are fields that a comparison changes, as in rl.stage."""
  fields = dict(
    mixture=MIXTURE,
    completions=4,  # The report later used 512 x 1: the same result, slightly more stable.
    total_tokens=TOTAL_TOKENS,
    steps=52,
    peak_lr=2e-6,  # Section 4.4; table 8 has 3e-6. The text describes the warm-up to this rate, so we follow it.
    warmup_steps=30,  # The report's starts at 2e-7, a tenth of the peak; ours at a thirtieth.
    teachers=recipe.TEACHERS,  # Finished stages of the cascade; give checkpoints where there is none.
  )
  return rl.stage("mopd", arg, **fields | differs)


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
