"""Compares GRPO and MOPD on mathematics, with the same student, prompts, evaluation and budget.

  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py --workdir=runs/ablation
  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py:easy --workdir=runs/ablation_easy

The student is an SFT checkpoint. The teacher is a GRPO run from that checkpoint. `:easy` and `:clean` are
two further tasks, on which the effect may not show: demonstrations have fewer errors in `:easy` and none in
`:clean`. Each arm anneals its learning rate over its own length, because at a constant rate the final scores
would be dominated by step noise. So arms of different length are compared at their ends only.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import base, rl, sft
from nemocascade.errors import unknown

# Config argument -> share of demonstration steps written in the sloppy style, which makes errors.
SLOPPY = {"": 0.6, "easy": 0.25, "clean": 0.0, "smoke": 0.6}


def get_config(arg: str = "") -> ConfigDict:
  if arg not in SLOPPY:
    raise unknown("config argument", arg, filter(None, SLOPPY))
  c = base.get_config()
  c.update(recipe.comparison())
  c.seeds = tuple(range(8))
  c.domains = recipe.generated(*c.compared.domains)
  c.evaluation.update(prompts=2048, total_tokens=80)
  # Sums of 3 and 5 terms, with totals that SFT learns imperfectly. A sampled solution of 5 terms is seldom
  # right, so GRPO gets little signal there, while MOPD's teacher scores every token. The 3-term problems give
  # the teacher's own GRPO run a start.
  c.tasks = dict(math=dict(sloppy_rate=SLOPPY[arg], terms=(3, 5), largest_total=15))

  c.order = ("sft", "teacher")  # Stages that each seed trains before the arms, in this order.
  c.stages = {"sft": sft.stage(), "teacher": equal_shape()}
  c.stages.sft.sources = recipe.conversations(math=12000)
  c.stages.sft.update(steps=350, save_every=350)
  c.stages.teacher.update(init_from="sft", steps=180)
  c.stages.teacher.optimizer.peak_lr = 7e-4
  c.student = "sft"  # Every arm starts from this stage.
  c.teachers_of = dict(math="teacher")

  c.arms = dict(grpo=grpo(), grpo_150=grpo(steps=150))
  c.arms.update(mopd=mopd(), mopd_512x1=mopd_wide(), mopd_clipped=mopd_clipped(), mopd_at_grpo_rate=mopd())
  c.rate_of = dict(grpo_150="grpo", mopd_clipped="mopd", mopd_at_grpo_rate="grpo")  # Arm -> whose rate.
  c.budget.amount = 150.0
  c.compared.update(
    at=(10, 20, 40, 75, 100),  # Steps after which `prompts` prompts are scored, one completion each.
    prompts=512,
    full_at=(30, 50),  # Steps after which, as at the end, all `evaluation.prompts` are scored.
    full_completions=1,  # Completions per prompt in these full evaluations.
    reach=0.8,
    pairs=(
      ("mopd", "grpo"), ("mopd_512x1", "grpo"), ("mopd_clipped", "grpo"), ("mopd_clipped", "mopd"),
      ("mopd_512x1", "mopd"), ("mopd_at_grpo_rate", "grpo"),
    ),
    ends=(("mopd", "grpo_150"), ("mopd_512x1", "grpo_150")),
  )  # fmt: skip
  c.search.update(
    arms=("grpo", "mopd", "mopd_512x1"),
    rates=(3e-4, 8e-4, 2e-3),
    steps=30,
    seeds=(100, 101),
  )
  if arg == "smoke":
    shrink(c)
    c.arms.grpo_150.steps = 3  # Longer than the other arms, as in the full form.
    c.budget.amount = 3.0
  return c


def sweep(arg: str, arms: dict, pairs: tuple) -> ConfigDict:
  """A comparison of `arms` of 50 steps on the main task, without a learning-rate search.

  Args:
    arg: "" or "smoke".
    arms: name -> what `grpo`, `mopd` or `distilled` return, changed as the arm differs.
    pairs: (ours, theirs), arms that are compared step by step.
  """
  c = get_config()
  c.seeds = tuple(range(4))
  c.arms = ConfigDict(arms)
  plain = recipe.comparison()
  c.compared.update(pairs=pairs, ends=plain.compared.ends, at=(10, 20, 40))
  c.search.arms, c.rate_of = plain.search.arms, plain.rate_of
  c.budget.amount = 50.0
  if arg == "smoke":
    shrink(c)
  elif arg:
    raise unknown("config argument", arg, ("smoke",))
  return c


def equal_shape() -> ConfigDict:
  """GRPO on 64 prompts x 8 completions: the teacher's stage, and the base of the arms."""
  c = rl.fields()
  c.mixture = dict(math=1.0)
  c.rollout.update(prompts=64, completions=8)
  c.packing.rows = 192  # A row holds at least three completions of 80 tokens.
  c.save_every = 50
  c.optimizer.update(final_fraction=0.05, **recipe.COSINE)
  return c


def grpo(steps: int = 50) -> ConfigDict:
  c = equal_shape()
  c.steps = steps
  return c


def mopd(steps: int = 50) -> ConfigDict:
  """MOPD of the recipe: sequence mean, mask outside [0.5, 2], no clip."""
  c = recipe.put(equal_shape(), **recipe.STAGES["mopd"])
  c.steps = steps
  c.teachers = dict(math="teacher")
  return c


def mopd_wide() -> ConfigDict:
  """The report's later batch shape: 512 prompts with one completion each."""
  c = mopd()
  c.rollout.update(prompts=512, completions=1)
  return c


def mopd_clipped() -> ConfigDict:
  c = mopd()
  c.advantage = "mopd_clipped"
  return c


def distilled(word: str, **options) -> ConfigDict:
  """`mopd` with a distillation loss instead of an advantage; `word` names the loss, `options` set it."""
  c = mopd()
  c.advantage, c.correction = "none", grpo().correction
  c.distillation, c.distillation_weight = word, 1.0
  if options:
    c.options[word].update(options)
  return c


def shrink(c: ConfigDict) -> None:
  """Changes `c` to its `:smoke` form: the same code path in a minute or two. Scores mean nothing."""
  base.shrink_model(c)
  c.seeds = (0, 1)
  c.evaluation.update(prompts=32, batch=64)
  c.stages.sft.sources.math.count = 60
  c.stages.sft.update(steps=4, save_every=4, rows=4, pieces=1)
  for stage in (c.stages.teacher, *c.arms.values()):
    G = min(stage.rollout.completions, 4)
    stage.rollout.update(prompts=32 // G, completions=G)
    stage.packing.update(rows=16, pieces=4)
    stage.update(steps=2, save_every=1)
    if stage.dynamic_filtering:  # So that the loss is not 0 when every verdict is 0.
      stage.update(dynamic_filtering=False, entropy_weight=0.01)
  recipe.shrink_comparison(c)
  c.compared.prompts = 16
  c.search.update(arms=c.search.arms[:2], rates=(1e-3, 2e-3), steps=1, seeds=c.search.seeds[:1])
