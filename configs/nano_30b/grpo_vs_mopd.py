"""Compares GRPO and MOPD on mathematics at the published scale, from one student on the same prompts.

  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py --workdir=DIR
  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py:smoke --workdir=DIR

The student is the checkpoint after multi-domain RL. The teacher is the SFT checkpoint. If DIR/seed_0 is
the work directory of a cascade, its finished stages are reused. The Cascade 2 report (arXiv 2603.19220,
section 4.4) gives AIME25, mean of 64 samples: 89.9 at the start; 91.0 with GRPO after 25 steps; 92.0,
the teacher's score, with MOPD within 30. It does not state GRPO's batch shape there, so two are run:
128 x 16, as in its RL stages, and 128 x 4, as in MOPD.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, if_rl, meshes, mopd, multi_domain_rl, rl, sft

STEPS = 52


def get_config(arg: str = "") -> ConfigDict:
  smoke = meshes.words(arg)[1]
  c = up_to_the_student(arg, recipe.comparison(), tuple(name for name in recipe.COMPARED if name != "preference"))
  c.teachers_of = dict(math=recipe.TEACHERS["math"])

  grpo = dict(mixture=dict(math=1.0), total_tokens=mopd.TOTAL_TOKENS, steps=STEPS)
  distilled = grpo | dict(teachers=c.teachers_of.to_dict())
  c.arms = dict(
    grpo=rl.stage("if_rl", arg, **grpo),
    grpo_128x4=rl.stage("if_rl", arg, completions=4, **grpo),
    mopd=mopd.stage(arg, **distilled),
    mopd_512x1=mopd.stage(arg, prompts=512, completions=1, **distilled),
  )
  c.budget.amount = float(STEPS)
  c.compared.update(
    at=(5, 10, 15, 20, 40), full_at=(25, 30, 50), full_completions=8,
    pairs=(("mopd", "grpo"), ("mopd", "grpo_128x4"), ("mopd_512x1", "mopd")),
  )  # fmt: skip
  if smoke:
    c.arms.mopd_512x1.rollout.update(prompts=64, completions=1)
    recipe.shrink_comparison(c)
  return c


def up_to_the_student(arg: str, own: ConfigDict, domains: tuple) -> ConfigDict:
  """The fields that comparisons at this scale share: their own, and the stages that train the student.

  Args:
    arg: the argument of the config.
    own: the fields of recipe.comparison, or of a variant of it.
    domains: those trained or scored.
  """
  smoke = meshes.words(arg)[1]
  c = base.get_config(arg)
  del c.seed
  c.seeds = (0,)  # One run, as in the report; its means have no intervals.
  c.domains = {name: c.domains[name] for name in domains}
  c.update(own)
  if not smoke:
    c.evaluation.total_tokens = mopd.TOTAL_TOKENS
  c.compared.prompts = c.evaluation.prompts
  c.search.update(rates=(1e-6, 2e-6, 3e-6), steps=25)
  stages = dict(sft=sft, if_rl=if_rl, multi_domain_rl=multi_domain_rl)
  c.order = tuple(stages)
  c.stages = {name: module.stage(arg) for name, module in stages.items()}
  if smoke:
    c.stages.sft.sources = ConfigDict({name: c.stages.sft.sources[name] for name in domains})
  return c
