"""Compares MOPD with several teachers, GRPO on the same mixture, and RLHF alone, at the published scale.

  python -m experiments.ablation --config=configs/nano_30b/multi_domain.py --workdir=DIR
  python -m experiments.ablation --config=configs/nano_30b/multi_domain.py:smoke --workdir=DIR

The teachers are those of the Cascade 2 report (arXiv 2603.19220, section 4.4). If DIR/seed_0 is the work
directory of a cascade, its finished stages are reused. The report gives ArenaHard v2 scores for (hard
prompts, creative writing): (71.5, 40.6) at the start; RLHF (81.7, 68.6) after 100 steps and (80.7, 71.2)
after 160; MOPD (85.5, 71.0) after 52.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import meshes, mopd, reward_model, rl, rlhf, rlhf_teacher
from configs.nano_30b.grpo_vs_mopd import STEPS, up_to_the_student

RLHF_STEPS = 160


def get_config(arg: str = "") -> ConfigDict:
  c = up_to_the_student(arg, recipe.several_teachers(), recipe.COMPARED)
  c.order = ("sft", "reward_model", "if_rl", "multi_domain_rl", "rlhf_teacher")
  c.stages.update(reward_model=reward_model.stage(arg), rlhf_teacher=rlhf_teacher.stage(arg))
  c.teachers_of = recipe.TEACHERS

  c.arms = dict(
    mopd=mopd.stage(arg, steps=STEPS),
    grpo=rl.stage("if_rl", arg, mixture=mopd.MIXTURE, total_tokens=mopd.TOTAL_TOKENS, steps=STEPS),
    rlhf=rl.stage("rlhf", arg, total_tokens=rlhf.TOTAL_TOKENS, steps=RLHF_STEPS),
  )
  c.budget.amount = float(RLHF_STEPS)
  c.compared.update(full_at=(30, 50, 100), ends=(("mopd", "rlhf"),))
  if meshes.words(arg)[1]:
    recipe.shrink_comparison(c)
  return c
