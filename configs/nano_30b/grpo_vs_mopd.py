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

from configs.nano_30b import base, meshes, mopd, rl, sft

# The stages before MOPD in the cascade, and the domains that are trained or scored here.
ORDER = ("sft", "if_rl", "multi_domain_rl")
DOMAINS = ("instruction", "math", "stem", "structured", "tools")
STEPS = 52


def get_config(arg: str = "") -> ConfigDict:
  slice_, _, smoke = meshes.words(arg)
  c, of = up_to_the_student(slice_, smoke, DOMAINS)
  c.teachers_of = dict(math="sft")

  c.arms = dict(
    grpo=shaped(of(rl), slice_, 128, 16),
    grpo_128x4=shaped(of(rl), slice_, 128, 4),
    mopd=shaped(of(mopd), slice_, 128, 4),
    mopd_512x1=shaped(of(mopd), slice_, 512, 1),
  )
  for name, arm in c.arms.items():
    arm.mixture = ConfigDict(dict(math=1.0))
    if "mopd" in name:
      arm.teachers = ConfigDict(dict(math="sft"))
    arm.steps = STEPS
    if smoke:
      rl.shrink(arm)
      if name == "mopd_512x1":
        arm.rollout.update(prompts=64, completions=1)
  c.rate_of = {}
  c.budget = dict(unit="steps", amount=float(STEPS))
  c.compared = dict(
    domains=("math",), at=(5, 10, 15, 20, 40), prompts=128, full_at=(25, 30, 50), full_completions=8, reach=0.95,
    pairs=(("mopd", "grpo"), ("mopd", "grpo_128x4"), ("mopd_512x1", "mopd")),
    ends=(),
  )  # fmt: skip
  c.search = dict(arms=(), rates=(1e-6, 2e-6, 3e-6), steps=25, seeds=(100,))
  if smoke:
    c.compared.update(at=(1,), full_at=(2,), prompts=32, full_completions=2)
  return c


def up_to_the_student(slice_: str, smoke: bool, domains: tuple) -> tuple[ConfigDict, Callable]:
  """The shared config of a comparison at this scale, and a function that reads a stage file.

  Returns:
    c: shared fields and the stages that train the student.
    of: (config module, *words of its argument) -> the fields that are not shared.
  """
  c = base.get_config(slice_, smoke)
  del c.seed
  c.seeds = (0,)  # One run, as in the report; its means have no intervals.
  c.domains = domains
  c.evaluation.update(long_domains=(), total_tokens=112 if smoke else 98_304)

  of = lambda module, *words: own_fields(module.get_config(",".join((slice_, *words, *["smoke"] * smoke))))
  c.order, c.side_line = ORDER, ()
  c.stages = {"sft": of(sft), "if_rl": of(rl, "if_rl"), "multi_domain_rl": of(rl, "multi_domain_rl")}
  c.stages.sft.conversations = ConfigDict({name: c.stages.sft.conversations[name] for name in domains})
  c.stages.if_rl.init_from = c.stages.multi_domain_rl.init_from = "previous"
  c.student = "multi_domain_rl"
  return c, of


def own_fields(c: ConfigDict) -> ConfigDict:
  """The fields of a stage's config that the shared config does not have."""
  shared = base.get_config(meshes.DEFAULT, smoke=False)
  return ConfigDict({name: value for name, value in c.items() if name not in shared})


def shaped(c: ConfigDict, slice_: str, prompts: int, completions: int) -> ConfigDict:
  c.rollout.update(prompts=prompts, completions=completions, total_tokens=98_304)
  c.packing = ConfigDict(rl.packing(c.rollout, slice_))
  return c
