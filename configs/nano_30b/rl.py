"""The RL stages of 30B-A3B: on-policy GRPO with one update per batch.

  python -m experiments.compile --config=configs/nano_30b/rl.py --topology=v5p:4x4x4
  python -m experiments.rl --config=configs/nano_30b/rl.py:code_rl --workdir=DIR --config.init_from=CKPT
  python -m experiments.rl --config=configs/nano_30b/rl.py:smoke --workdir=DIR --config.init_from=CKPT

Without an argument the stage is IF-RL. Settings: Cascade 2 report (arXiv 2603.19220), sections 4.2 to 4.8
and tables 8 to 10. The report rounds lengths to 16K, 49K, 98K and 118K. We use 49,152 (as in Nano-3's open
recipe, NVIDIA-NeMo/Nemotron), twice that, and multiples of 4,096 for the rest. A length counts prompt and
response together.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes
from configs.tiny import rl as tiny

# Stage -> the fields in which it differs from IF-RL at this scale, besides those of recipe.STAGES.
STAGES = dict(
  if_rl=dict(),
  multi_domain_rl=dict(mixture=dict(stem=0.55, tools=0.3, structured=0.15), steps=70),
  rlhf=dict(steps=25, total_tokens=16_384),
  long_context_rl=dict(steps=30, prompt_tokens=32_768),
  # Sampling with top_p < 1 needs a correction: each token is weighted by its probability under the full
  # distribution over that under the truncated one. The report names none; this is MOPD's.
  code_rl=dict(steps=22, total_tokens=118_784, top_p=0.95, correction=recipe.STAGES["mopd"]["correction"]),
  # The report masks the loss of prompts that have no reward above 0.5. Dynamic filtering does that here.
  swe_rl=dict(steps=45, total_tokens=98_304, prompt_tokens=32_768),
  # 200 turns. The number of steps is not published; 226 is one pass over the card's 3,612 tasks.
  swe_agentic_rl=dict(
    steps=226, total_tokens=262_144, prompts=16, completions=64, temperature=0.8, warmup_steps=10, **recipe.ANNEALED
  ),
)


def fields(stage: str, slice_: str) -> ConfigDict:
  """The RL stage `stage` of the recipe with the sizes of IF-RL at this scale."""
  c = recipe.rl(stage)
  c.init_from = ""  # A checkpoint's path.
  c.rollout.update(prompts=128, completions=16, prompt_tokens=4_096, total_tokens=49_152)
  c.packing.update(packing(c.rollout, slice_))
  # The warm-up is that of Nano-3's recipe, which starts at a hundredth of the peak; not published here.
  c.optimizer.update(peak_lr=3e-6, warmup_steps=10)
  c.router_balance.kind = "sign"  # Not published. Nano-3's RL recipe has no balance loss and a bias rate of 1e-3.
  c.steps = 180
  c.samples_every = 1
  c.samples = 32
  c.teachers_in_memory = 3  # Each takes 2 GiB per chip on 64 chips.
  return c


def packing(rollout: ConfigDict, slice_: str) -> dict:
  """One row per completion, as long as the longest; each piece has one row per device."""
  devices, rows = meshes.DEVICES[slice_], rollout["prompts"] * rollout["completions"]
  return dict(rows=rows, row_tokens=rollout["total_tokens"], pieces=max(1, rows // devices))


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the `:smoke` form of its stage, with the lengths of the tiny scale."""
  small = tiny.fields()
  recipe.shrink_rl(c)
  c.rollout.update(prompt_tokens=small.rollout.prompt_tokens, total_tokens=tiny.SEVERAL_TURNS)
  c.packing.update(rows=64, row_tokens=small.packing.row_tokens, pieces=4)
  c.samples, c.refill_rounds = 4, small.refill_rounds


def get_config(arg: str = "") -> ConfigDict:
  slice_, stage, smoke = meshes.words(arg, *STAGES)
  stage = stage or "if_rl"
  c = base.get_config(slice_, smoke)
  c.update(recipe.put(fields(stage, slice_), **STAGES[stage]))
  c.packing.update(packing(c.rollout, slice_))
  if smoke:
    shrink(c)
  return c
