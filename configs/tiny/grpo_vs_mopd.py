"""GRPO and MOPD side by side on mathematics: the same student, prompts, evaluation and budget.

  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py --workdir=runs/ablation
  python -m experiments.ablation --config=configs/tiny/grpo_vs_mopd.py:easy --workdir=runs/ablation_easy

The student is an SFT checkpoint, the teacher what GRPO makes of it. `:easy` errs less in its
demonstrations, `:clean` never: the two tasks beside the main one, on which the effect may not show.
All schedules are constant after the warm-up, so that arms of different lengths compare at any step.
"""

from ml_collections import ConfigDict

from configs.tiny import base, rl, sft

# Share of the demonstrations' steps that are done in the sloppy style.
SLOPPY = {"": 0.6, "easy": 0.25, "clean": 0.0, "smoke": 0.6}


def get_config(arg: str = "") -> ConfigDict:
  if arg not in SLOPPY:
    raise ValueError(f"unknown config argument {arg!r}: allowed: {', '.join(filter(None, SLOPPY))}")
  c = base.get_config()
  c.seeds = tuple(range(8))
  c.domains = ("math",)
  c.evaluation.update(prompts=1024, total_tokens=80, long_domains=(), greedy=())

  c.order = ("sft", "teacher")  # What each seed trains before the arms, in this order.
  c.side_line = ()
  c.stages = {"sft": sft.stage(), "teacher": equal_shape()}
  c.stages.sft.conversations = ConfigDict(dict(math=12000))
  c.stages.sft.update(steps=300, save_every=300)
  c.stages.teacher.update(init_from="sft", steps=100)
  c.student = "sft"  # Where every arm starts.
  c.teachers_of = dict(math="teacher")
  c.tasks = dict(math=dict(sloppy_rate=SLOPPY[arg]))

  c.arms = dict(grpo=grpo(), mopd=mopd(), mopd_512x1=mopd_wide(), mopd_clipped=mopd_clipped())
  c.arms.update(grpo_at_mopd_rate=grpo(steps=50), mopd_at_grpo_rate=mopd())
  c.rate_of = dict(grpo_at_mopd_rate="mopd", mopd_at_grpo_rate="grpo")  # Arm -> whose peak_lr it has.
  c.budget = dict(unit="steps", amount=150.0)  # steps | tokens (sampled) | flops; `steps` of an arm is its end too.
  c.compared = dict(
    domains=("math",),
    at=(5, 10, 15, 20, 25, 40, 75, 100, 125),  # Steps at which `prompts` are scored once each.
    prompts=512,
    full_at=(30, 50),  # And here, as at the end, all of `evaluation.prompts`, so often:
    full_completions=2,
    reach=0.95,  # Share of the gap at which an arm has come to its teacher.
    pairs=(
      ("mopd", "grpo"), ("mopd_512x1", "grpo"), ("mopd_clipped", "grpo"), ("mopd_clipped", "mopd"),
      ("mopd_512x1", "mopd"), ("mopd_at_grpo_rate", "grpo"), ("mopd", "grpo_at_mopd_rate"),
    ),
  )  # fmt: skip
  c.search = dict(
    arms=("grpo", "mopd", "mopd_512x1", "mopd_clipped"),  # Whose peak_lr is the best of:
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
    steps=30,
    seeds=(100, 101),
  )
  if arg == "smoke":
    shrink(c)
    c.arms.grpo.steps = 3  # Longer than the others, as in the whole.
  return c


def sweep(arg: str, arms: dict, pairs: tuple) -> ConfigDict:
  """Other arms of 50 steps on the main task, at the rates they name: what a `sweep_*.py` returns."""
  c = get_config()
  c.seeds = tuple(range(4))
  c.arms = ConfigDict(arms)
  c.compared.pairs = pairs
  c.search.arms, c.rate_of = (), ConfigDict()
  c.budget.amount = 50.0
  if arg == "smoke":
    shrink(c)
  elif arg:
    raise ValueError(f"unknown config argument {arg!r}: allowed: smoke")
  return c


def equal_shape() -> ConfigDict:
  """GRPO on 64 prompts of 8 completions: the teacher's stage, and the first arm."""
  c = rl.fields()
  c.mixture = dict(math=1.0)
  c.rollout.update(prompts=64, completions=8)
  c.packing.rows = 176  # Three completions of 80 tokens to a row at least.
  c.save_every = 50
  return c


def grpo(steps: int = 150) -> ConfigDict:
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
  c.compared.update(at=(1,), full_at=(2,), prompts=32)
  c.search.update(arms=c.search.arms[:2], rates=(1e-3, 2e-3), steps=1, seeds=(100,))
