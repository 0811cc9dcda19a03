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
from configs.nano_30b import meshes, mopd, rl
from configs.nano_30b.grpo_vs_mopd import ORDER, STEPS, up_to_the_student
from configs.tiny import reward_model as tiny

RLHF_STEPS = 160


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  own = recipe.several_teachers()
  c, of = up_to_the_student(slice_, smoke, own, recipe.COMPARED)
  c.order = ("sft", "reward_model", "if_rl", "multi_domain_rl", "rlhf_teacher")
  c.stages.update(reward_model=reward_model(smoke), rlhf_teacher=of(rl, "rlhf"))
  c.stages.rlhf_teacher.init_from = recipe.rl("rlhf_teacher").init_from
  c.teachers_of = recipe.TEACHERS

  c.arms = dict(mopd=of(mopd), grpo=of(rl), rlhf=of(rl, "rlhf"))
  c.arms.grpo.mixture = c.arms.mopd.mixture.copy_and_resolve_references()
  c.arms.grpo.rollout.total_tokens = c.arms.mopd.rollout.total_tokens
  if not smoke:
    c.arms.grpo.packing.update(rl.packing(c.arms.grpo.rollout, slice_))
    c.arms.mopd.steps = c.arms.grpo.steps = STEPS
    c.arms.rlhf.steps = RLHF_STEPS
  c.budget.amount = float(RLHF_STEPS)
  c.compared.update(full_at=(30, 50, 100), ends=(("mopd", "rlhf"),))
  if smoke:
    recipe.shrink_comparison(c)
  return c


def reward_model(smoke: bool) -> ConfigDict:
  """The judge, trained from the SFT checkpoint.

  The batch of 256 and one epoch over 82K pairs are those of Nemotron-Cascade 1 (arXiv 2512.13607, section 4).
  """
  c = recipe.reward_model()
  c.init_from = ORDER[0]  # Cascade 1 starts from Qwen2.5-72B-Instruct.
  c.pairs = 256
  c.row_tokens = 4_096  # Prompt and final answer, without thoughts. The length is not published.
  c.heldout_pairs = 1_024
  c.steps = 320  # One epoch.
  c.optimizer.update(peak_lr=2e-6, warmup_steps=0)  # The warm-up is not published.
  if smoke:
    small = tiny.stage("smoke")
    c.update(pairs=small.pairs, row_tokens=small.row_tokens, heldout_pairs=small.heldout_pairs, steps=4, save_every=2)
  return c
