"""GRPO and MOPD on mathematics at the published scale: one student, the same prompts (paper.md 5.3).

  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py --workdir=DIR
  python -m experiments.ablation --config=configs/nano_30b/grpo_vs_mopd.py:smoke --workdir=DIR

The student is the checkpoint after multi-domain RL, its teacher of mathematics the SFT checkpoint.
Stages that a cascade has finished are not trained again if its work directory is DIR/seed_0. The
report's figures, AIME25 in the mean of 64: 89.9 at the start, GRPO 91.0 at 25 steps, MOPD 92.0, the
teacher's level, within 30. GRPO's shape there is not told: here that of its stages, and MOPD's own.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs.nano_30b import base, meshes, mopd, rl, sft

# What stands before MOPD in the cascade, and what of it is trained or scored here.
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
  """(what a comparison at this scale shares, the student's stages included; the own fields of a stage's file)."""
  c = base.get_config(slice_, smoke)
  del c.seed
  c.seeds = (0,)  # One run as the report's: means without intervals.
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
  """What a stage's file adds to the shared fields."""
  shared = base.get_config(meshes.DEFAULT, smoke=False)
  return ConfigDict({name: value for name, value in c.items() if name not in shared})


def shaped(c: ConfigDict, slice_: str, prompts: int, completions: int) -> ConfigDict:
  c.rollout.update(prompts=prompts, completions=completions, total_tokens=98_304)
  c.packing = ConfigDict(rl.packing(c.rollout, slice_))
  return c
