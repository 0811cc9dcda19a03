"""The whole cascade at the published scale: SFT, a judge, seven RL stages, and MOPD among them.

  python -m experiments.cascade --config=configs/nano_30b/cascade.py --dry_run
  python -m experiments.cascade --config=configs/nano_30b/cascade.py --workdir=DIR --distributed=auto
  python -m experiments.cascade --config=configs/nano_30b/cascade.py:v5p:8x8x8 --workdir=DIR --distributed=auto
  python -m experiments.cascade --config=configs/nano_30b/cascade.py:smoke --workdir=runs/smoke

The order is that of the Cascade 2 report (arXiv 2603.19220, section 4): SFT, IF-RL, multi-domain RL, MOPD, RLHF,
long-context RL, Code RL, SWE RL (agentless, then agentic). The judge and MOPD's preference teacher stand beside
it, each trained from the SFT checkpoint before the first stage that needs it.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import (
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
  swe_agentless_rl,
)

# In the order of the recipe. init_from="previous" means the stage before, not counting c.side_line.
STAGES = dict(
  sft=sft,
  reward_model=reward_model,
  if_rl=if_rl,
  multi_domain_rl=multi_domain_rl,
  rlhf_teacher=rlhf_teacher,
  mopd=mopd,
  rlhf=rlhf,
  long_context_rl=long_context_rl,
  code_rl=code_rl,
  swe_agentless_rl=swe_agentless_rl,
  swe_agentic_rl=swe_agentic_rl,
)
# An RL stage of the main line warns if it loses more than this on a held-out domain that an earlier stage has trained.
# The number is ours: the report orders its stages so that they lose little (section 4.2).
TOLERANCE, ACTION = 0.03, "warn"


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config(arg)
  c.order = tuple(STAGES)
  c.side_line = recipe.SIDE_LINE
  c.stages = {name: module.stage(arg) for name, module in STAGES.items()}
  trained: set[str] = set()
  for name in c.order:
    if c.stages[name].kind == "rl" and name not in c.side_line:
      kept = sorted(trained - set(c.stages[name].mixture))
      c.stages[name].gates = {domain: dict(tolerance=TOLERANCE, action=ACTION) for domain in kept}
      trained |= set(c.stages[name].mixture)
  return c
