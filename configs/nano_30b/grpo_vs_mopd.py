"""Compares GRPO and MOPD on mathematics at the published scale, from one student on the same prompts.

  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py --workdir=DIR
  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py:smoke --workdir=DIR

The student is the checkpoint after multi-domain RL. The teacher is the SFT checkpoint. If DIR/seed_0 is
the work directory of a cascade, its finished stages are reused. The Cascade 2 report (arXiv 2603.19220,
section 4.4) gives AIME25, mean of 64 samples: 89.9 at the start; 91.0 with GRPO after 25 steps; 92.0,
the teacher's score, with MOPD within 30. It does not state GRPO's batch shape there, so two are run:
128 x 16, as in its RL stages, and 128 x 4, as in MOPD.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes, mopd, rl, sft

ORDER = ("sft", "if_rl", "multi_domain_rl")  # The stages before MOPD in the cascade.
STEPS = 52


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  domains = tuple(name for name in recipe.COMPARED if name != "preference")
  c, of = up_to_the_student(slice_, smoke, recipe.comparison(), domains)
  c.teachers_of = dict(math=recipe.TEACHERS["math"])

  c.arms = dict(
    grpo=shaped(of(rl), slice_, 128, 16),
    grpo_128x4=shaped(of(rl), slice_, 128, 4),
    mopd=shaped(of(mopd), slice_, 128, 4),
    mopd_512x1=shaped(of(mopd), slice_, 512, 1),
  )
  for name, arm in c.arms.items():
    arm.mixture = ConfigDict(dict(math=1.0))
    if "mopd" in name:
      arm.teachers = ConfigDict(c.teachers_of)
    arm.steps = STEPS
    if smoke:
      rl.shrink(arm)
      if name == "mopd_512x1":
        arm.rollout.update(prompts=64, completions=1)
  c.budget.amount = float(STEPS)
  c.compared.update(
    at=(5, 10, 15, 20, 40), full_at=(25, 30, 50), full_completions=8,
    pairs=(("mopd", "grpo"), ("mopd", "grpo_128x4"), ("mopd_512x1", "mopd")),
  )  # fmt: skip
  if smoke:
    recipe.shrink_comparison(c)
  return c


def up_to_the_student(slice_: str, smoke: bool, own: ConfigDict, domains: tuple) -> tuple[ConfigDict, Callable]:
  """The shared config of a comparison at this scale, and a function that reads a stage file.

  Args:
    own: the fields of recipe.comparison, or of a variant of it.
    domains: those trained or scored.

  Returns:
    c: shared fields and the stages that train the student.
    of: (config module, *words of its argument) -> the fields that are not shared.
  """
  c = base.get_config(slice_, smoke)
  del c.seed
  c.seeds = (0,)  # One run, as in the report; its means have no intervals.
  c.domains = {name: c.domains[name] for name in domains}
  c.update(own)
  if not smoke:
    c.evaluation.total_tokens = 98_304
  c.compared.prompts = c.evaluation.prompts
  c.search.update(rates=(1e-6, 2e-6, 3e-6), steps=25)

  of = lambda module, *words: own_fields(module.get_config(",".join((slice_, *words, *["smoke"] * smoke))))
  c.order = ORDER
  c.stages = {"sft": of(sft), "if_rl": of(rl, "if_rl"), "multi_domain_rl": of(rl, "multi_domain_rl")}
  if smoke:
    c.stages.sft.sources = ConfigDict({name: c.stages.sft.sources[name] for name in domains})
  for name in ("if_rl", "multi_domain_rl"):
    c.stages[name].init_from = recipe.rl(name).init_from
  return c, of


def own_fields(c: ConfigDict) -> ConfigDict:
  """The fields of a stage's config that the shared config does not have."""
  shared = base.get_config(meshes.DEFAULT, smoke=False)
  return ConfigDict({name: value for name, value in c.items() if name not in shared})


def shaped(c: ConfigDict, slice_: str, prompts: int, completions: int) -> ConfigDict:
  c.rollout.update(prompts=prompts, completions=completions, total_tokens=98_304)
  c.packing.update(rl.packing(c.rollout, slice_))
  return c
