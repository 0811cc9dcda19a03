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

from configs.nano_30b import base, meshes

# Stage -> the fields in which it differs from IF-RL.
STAGES = dict(
  if_rl=dict(),
  multi_domain_rl=dict(mixture=dict(stem=0.55, tools=0.3, structured=0.15), steps=70, overlong="filter"),
  # Table 9 filters overlong completions and has 25 steps. Section 4.5 says "not applied" and about 30.
  rlhf=dict(
    mixture=dict(preference=1.0), steps=25, overlong="filter", total_tokens=16_384, reward="pairwise",
    kl_weight=0.03, dynamic_filtering=False,  # Pairwise rewards can differ where verdicts are equal.
  ),
  # Table 9 filters overlong completions. Section 4.6 does not.
  long_context_rl=dict(mixture=dict(long_context=1.0), steps=30, overlong="filter", prompt_tokens=32_768),
  # Sampling with top_p < 1 needs a correction: each token is weighted by its probability under the full
  # distribution over that under the truncated one. The report names none; icepop is MOPD's.
  code_rl=dict(
    mixture=dict(code=1.0), steps=22, overlong="filter", total_tokens=118_784, top_p=0.95, correction="icepop",
  ),
  # The report masks the loss of prompts that have no reward above 0.5. Dynamic filtering does that here.
  swe_rl=dict(mixture=dict(swe=1.0), steps=45, total_tokens=98_304, prompt_tokens=32_768),
  # 200 turns. The number of steps is not published; 226 is one pass over the card's 3,612 tasks.
  swe_agentic_rl=dict(
    mixture=dict(swe_agentic=1.0), steps=226, total_tokens=262_144, prompts=16, completions=64,
    temperature=0.8, schedule="linear", warmup_steps=10, final_fraction=0.0,
  ),
)  # fmt: skip


def fields(c: ConfigDict, slice_: str) -> ConfigDict:
  """Adds the fields of IF-RL to the shared config `c`, and returns it."""
  c.kind = "rl"
  c.init_from = ""  # A checkpoint's path.
  c.mixture = dict(instruction=1.0)
  c.rollout = dict(
    prompts=128,
    completions=16,
    prompt_tokens=4_096,
    total_tokens=49_152,
    temperature=1.0,
    top_p=1.0,
  )
  c.packing = packing(c.rollout, slice_)
  c.reward = "verdict"
  c.judge = ""  # The reward model's checkpoint; reward="pairwise" needs it.
  c.advantage = "grpo"
  c.ratio = "none"  # On policy: the ratio is 1.
  c.correction = "none"  # Published only for MOPD. Nano-3 uses masked importance sampling.
  c.aggregation = "token_mean"
  c.kl = "k3"
  c.kl_weight = 0.0
  c.entropy_weight = 0.0
  c.distillation = "reverse_kl"  # Not used by MOPD, which scores the sampled token only.
  c.distillation_weight = 0.0
  c.overlong = "zero"  # A completion that is cut off at the limit gets reward 0.
  c.options = dict(icepop=dict(low=0.5, high=2.0))  # The report's section 4.4.
  c.updates = 1
  c.dynamic_filtering = True
  c.refill_rounds = 2  # The report refills until every prompt has a gradient. It does not say how.
  c.optimizer = dict(
    peak_lr=3e-6,
    warmup_steps=10,  # Nano-3's recipe, which starts at a hundredth; not published here.
    schedule="constant",
    final_fraction=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,  # Not published; Nano-3's recipe.
    clip_norm=1.0,  # Not published; Nano-3's recipe.
    frozen=(r"/gate$",),  # Not published; Nano-3's recipe freezes the router in RL.
  )
  c.router_balance = dict(
    kind="sign",  # Not published. Nano-3's RL recipe has no balance loss and a bias rate of 1e-3.
    rate=1e-3,
    weight=1e-4,
  )
  c.steps = 180
  c.save_every = 10
  c.samples_every = 1
  c.samples = 32
  c.teachers = {}
  c.teachers_in_memory = 3  # Each takes 2 GiB per chip on 64 chips.
  return c


def packing(rollout: ConfigDict, slice_: str) -> dict:
  """One row per completion, as long as the longest; each piece has one row per device."""
  devices, rows = meshes.DEVICES[slice_], rollout["prompts"] * rollout["completions"]
  return dict(rows=rows, row_tokens=rollout["total_tokens"], pieces=max(1, rows // devices), shared_prompts=False)


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the `:smoke` form of its stage."""
  c.rollout.update(prompts=8, completions=8, prompt_tokens=48, total_tokens=112)
  c.packing = dict(rows=64, row_tokens=272, pieces=4, shared_prompts=False)
  c.steps, c.save_every, c.samples_every, c.samples, c.refill_rounds = 2, 1, 1, 4, 1


def get_config(arg: str = "") -> ConfigDict:
  slice_, stage, smoke = meshes.words(arg, *STAGES)
  c = fields(base.get_config(slice_, smoke), slice_)
  for name, value in STAGES[stage or "if_rl"].items():
    section = next((s for s in (c.rollout, c.optimizer) if name in s), c)
    section[name] = ConfigDict(value) if isinstance(value, dict) else value
  c.packing = packing(c.rollout, slice_)
  if smoke:
    shrink(c)
  return c
