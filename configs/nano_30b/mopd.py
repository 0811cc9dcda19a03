"""Stage 4, MOPD of 30B-A3B: RL with another advantage and a teacher a domain (paper.md 5.1, 5.2).

  python -m experiments.compile --config=configs/nano_30b/mopd.py --topology=v5p:4x4x4
  python -m experiments.rl --config=configs/nano_30b/mopd.py --workdir=DIR --config.init_from=CKPT \\
    --config.teachers.math=CKPT ...

The student is the checkpoint after multi-domain RL.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, meshes, rl

# Names of finished stages of a cascade, or checkpoints.
TEACHERS = dict(
  math="sft",
  preference="rlhf_teacher",  # A run of RLHF from the SFT checkpoint.
  instruction="multi_domain_rl",
  stem="multi_domain_rl",
  structured="multi_domain_rl",
  tools="multi_domain_rl",
)


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  c = rl.fields(base.get_config(slice_, smoke), slice_)
  # The card's rows of the RL data; how many RLHF prompts came on top is not told.
  c.mixture = dict(math=0.3, instruction=0.3, stem=0.15, structured=0.15, tools=0.1, preference=0.25)
  c.rollout.update(prompts=128, completions=4, total_tokens=98_304)  # Later 512 x 1: alike, a little steadier.
  c.packing = rl.packing(c.rollout, slice_)
  c.advantage = "mopd"
  c.aggregation = "sequence_mean"
  c.correction = "icepop"
  c.dynamic_filtering = False
  c.overlong = "keep"
  c.steps = 52
  # The text's rate and warm-up (which begins at a tenth, not at a thirtieth); table 8 prints 3e-6.
  c.optimizer.update(peak_lr=2e-6, warmup_steps=30)
  c.teachers = TEACHERS
  if smoke:
    rl.shrink(c)
  return c
