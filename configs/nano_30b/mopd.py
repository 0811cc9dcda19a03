"""Stage 4, MOPD of 30B-A3B: RL whose advantage compares the student with one teacher per domain.

  python -m experiments.compile --config=configs/nano_30b/mopd.py --topology=v5p:4x4x4
  python -m experiments.rl --config=configs/nano_30b/mopd.py --workdir=DIR --config.init_from=CKPT \\
    --config.teachers.math=CKPT ...

The student is the checkpoint after multi-domain RL. Settings: Cascade 2 report (arXiv 2603.19220),
section 4.4, equations 2 to 4, and table 8.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes, rl


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  c = base.get_config(slice_, smoke)
  c.update(rl.fields("mopd", slice_))
  # Shares of the rows on the RL data card. The number of RLHF prompts is not published; 0.25 is our choice.
  c.mixture = dict(math=0.3, instruction=0.3, stem=0.15, structured=0.15, tools=0.1, preference=0.25)
  # The report later used 512 x 1: the same result, slightly more stable.
  c.rollout.update(prompts=128, completions=4, total_tokens=98_304)
  c.packing.update(rl.packing(c.rollout, slice_))
  c.steps = 52
  # The rate and warm-up of section 4.4; table 8 has 3e-6. The report's warm-up starts at a tenth of the
  # peak, ours at a thirtieth.
  c.optimizer.update(peak_lr=2e-6, warmup_steps=30)
  c.teachers = recipe.TEACHERS  # Finished stages of the cascade; give checkpoints where there is none.
  if smoke:
    rl.shrink(c)
  return c
