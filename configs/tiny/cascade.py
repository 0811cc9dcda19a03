"""The whole cascade at the tiny scale: SFT, six RL stages and MOPD on two CPU cores.

python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/tiny
python -m experiments.cascade --config=configs/tiny/cascade.py:smoke --workdir=runs/smoke
python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=runs/b --config.seed=1
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import (
  base,
  code_rl,
  if_rl,
  long_context_rl,
  mopd,
  multi_domain_rl,
  reward_model,
  rlhf,
  rlhf_teacher,
  sft,
  swe_agentic_rl,
  swe_rl,
)

# In the order of the recipe. init_from="previous" means the stage before, not counting c.side_line.
STAGES = dict(
  reward_model=reward_model,
  sft=sft,
  if_rl=if_rl,
  multi_domain_rl=multi_domain_rl,
  rlhf_teacher=rlhf_teacher,
  mopd=mopd,
  rlhf=rlhf,
  long_context_rl=long_context_rl,
  code_rl=code_rl,
  swe_rl=swe_rl,
  swe_agentic_rl=swe_agentic_rl,
)


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config(arg)
  c.about = (
    "The stages of the Nemotron-Cascade 2 recipe at a scale of minutes. SFT learns ten domains from demonstrations, most"
    " of which are sloppy on purpose, so that reinforcement learning has something to mend."
  )
  c.order = tuple(STAGES)
  c.side_line = recipe.SIDE_LINE
  c.stages = {name: module.stage(arg) for name, module in STAGES.items()}
  return c
