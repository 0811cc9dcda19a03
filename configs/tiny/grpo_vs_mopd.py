"""GRPO and MOPD side by side on mathematics: the same student, prompts, evaluation and budget.

  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py --workdir=runs/ablation
  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py:easy --workdir=runs/ablation_easy

The student is an SFT checkpoint, the teacher what GRPO makes of it. `:easy` errs less in its
demonstrations, `:clean` never: the two tasks beside the main one, on which the effect may not show.
Every arm anneals over its own length, as one with that budget would: at a constant rate all of them
end in the noise of a step. So scores of arms of unlike length compare at their ends alone.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl, sft
from nemocascade.errors import unknown

# Share of the demonstrations' steps that are done in the sloppy style.
SLOPPY = {"": 0.6, "easy": 0.25, "clean": 0.0, "smoke": 0.6}


def get_config(arg: str = "") -> ConfigDict:
  if arg not in SLOPPY:
    raise unknown("config argument", arg, filter(None, SLOPPY))
  c = base.get_config()
  c.seeds = tuple(range(8))
  c.domains = ("math",)
  c.evaluation.update(prompts=2048, total_tokens=80, long_domains=(), greedy=())
  # Problems of 3 and of 5 terms, with totals that SFT doesn't quite learn: who samples whole solutions
  # seldom sees a right one of 5, and a teacher speaks to every token. The short ones start the teacher.
  c.tasks = dict(math=dict(sloppy_rate=SLOPPY[arg], terms=(3, 5), largest_total=15))

  c.order = ("sft", "teacher")  # What each seed trains before the arms, in this order.
  c.side_line = ()
  c.stages = {"sft": sft.stage(), "teacher": equal_shape()}
  c.stages.sft.conversations = ConfigDict(dict(math=12000))
  c.stages.sft.update(steps=350, save_every=350)
  c.stages.teacher.update(init_from="sft", steps=180)
  c.stages.teacher.optimizer.peak_lr = 7e-4
  c.student = "sft"  # Where every arm starts.
  c.teachers_of = dict(math="teacher")

  c.arms = dict(grpo=grpo(), grpo_150=grpo(steps=150))
  c.arms.update(mopd=mopd(), mopd_512x1=mopd_wide(), mopd_clipped=mopd_clipped(), mopd_at_grpo_rate=mopd())
  c.rate_of = dict(grpo_150="grpo", mopd_clipped="mopd", mopd_at_grpo_rate="grpo")  # Arm -> whose peak_lr it has.
  c.budget = dict(unit="steps", amount=150.0)  # steps | tokens (sampled) | flops; `steps` of an arm is its end too.
  c.compared = dict(
    domains=("math",),
    at=(10, 20, 40, 75, 100),  # Steps at which `prompts` are scored once each.
    prompts=512,
    full_at=(30, 50),  # And here, as at the end, all of `evaluation.prompts`, so often:
    full_completions=1,
    reach=0.8,  # Share of the gap at which an arm has come to its teacher.
    pairs=(
      ("mopd", "grpo"), ("mopd_512x1", "grpo"), ("mopd_clipped", "grpo"), ("mopd_clipped", "mopd"),
      ("mopd_512x1", "mopd"), ("mopd_at_grpo_rate", "grpo"),
    ),
    ends=(("mopd", "grpo_150"), ("mopd_512x1", "grpo_150")),  # Of unlike length: where each ends.
  )  # fmt: skip
  c.search = dict(
    arms=("grpo", "mopd", "mopd_512x1"),  # Whose peak_lr is the best of:
    rates=(3e-4, 8e-4, 2e-3),
    steps=30,
    seeds=(100, 101),
  )
  if arg == "smoke":
    shrink(c)
    c.arms.grpo_150.steps = 3  # Longer than the others, as in the whole.
  return c


def sweep(arg: str, arms: dict, pairs: tuple) -> ConfigDict:
  """Other arms of 50 steps on the main task, at the rates they name: what a `sweep_*.py` returns."""
  c = get_config()
  c.seeds = tuple(range(4))
  c.arms = ConfigDict(arms)
  c.compared.update(pairs=pairs, ends=())
  c.search.arms, c.rate_of = (), ConfigDict()
  c.budget.amount = 50.0
  if arg == "smoke":
    shrink(c)
  elif arg:
    raise unknown("config argument", arg, ("smoke",))
  return c


def equal_shape() -> ConfigDict:
  """GRPO on 64 prompts of 8 completions: the teacher's stage, and the first arm."""
  c = rl.fields()
  c.mixture = dict(math=1.0)
  c.rollout.update(prompts=64, completions=8)
  c.packing.rows = 176  # Three completions of 80 tokens to a row at least.
  c.save_every = 50
  c.optimizer.update(schedule="cosine", final_fraction=0.05)
  return c


def grpo(steps: int = 50) -> ConfigDict:
  c = equal_shape()
  c.steps = steps
  return c


def mopd(steps: int = 50) -> ConfigDict:
  """As printed (paper.md 5.1): mean over a sequence, ratios outside of [0.5, 2] masked, no clip."""
  c = equal_shape()
  c.steps = steps
  c.advantage, c.aggregation, c.correction = "mopd", "sequence_mean", "icepop"
  c.dynamic_filtering, c.overlong = False, "keep"
  c.teachers = dict(math="teacher")
  return c


def mopd_wide() -> ConfigDict:
  """The paper's later shape: as many prompts as rollouts."""
  c = mopd()
  c.rollout.update(prompts=512, completions=1)
  return c


def mopd_clipped() -> ConfigDict:
  c = mopd()
  c.advantage = "mopd_clipped"
  return c


def distilled(word: str, **options) -> ConfigDict:
  """The distance from the teacher in the place of an advantage, on `mopd`'s completions."""
  c = mopd()
  c.advantage, c.correction = "none", "none"
  c.distillation, c.distillation_weight = word, 1.0
  if options:
    c.options[word].update(options)
  return c


def shrink(c: ConfigDict) -> None:
  """The same path in a minute or two, nearly all of it compilation; its numbers mean nothing."""
  c.model.hybrid_override_pattern = "M*E"  # Each kind once.
  c.tokenizer.conversations = 60
  c.seeds = (0, 1)
  c.evaluation.update(prompts=32, batch=64)
  c.stages.sft.conversations.math = 60
  c.stages.sft.update(steps=4, save_every=4, rows=4)
  for stage in (c.stages.teacher, *c.arms.values()):
    G = min(stage.rollout.completions, 4)
    stage.rollout.update(prompts=32 // G, completions=G)
    stage.packing.update(rows=16, pieces=4)
    stage.update(steps=2, save_every=1)
    if stage.advantage == "grpo":  # Something to learn where every verdict is 0.
      stage.update(dynamic_filtering=False, entropy_weight=0.01)
  c.compared.update(at=(1,), full_at=(2,), prompts=16)
  c.search.update(arms=c.search.arms[:2], rates=(1e-3, 2e-3), steps=1, seeds=(100,))
