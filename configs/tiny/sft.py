"""Stage 1, SFT: demonstrations of all domains packed into rows (paper.md 3.1).

  python -m experiments.sft --config=configs/tiny/sft.py --workdir=runs/sft
  python -m experiments.sft --config=configs/tiny/sft.py:smoke --workdir=runs/sft_smoke

The schedule anneals fully: RL from a checkpoint in mid-schedule would be credited for averaging.
"""

from ml_collections import ConfigDict

from configs.tiny import base


def stage(arg: str = "") -> ConfigDict:
  c = ConfigDict()
  c.kind = "sft"
  c.init_from = ""  # "" draws fresh parameters.
  c.conversations = dict(  # More of what is hard to learn: arithmetic, looking up, composing.
    instruction=4000, math=5000, stem=3000, structured=2000, tools=3000,
    preference=2000, long_context=5000, code=2000, swe=4500, swe_agentic=2500,
  )  # fmt: skip
  c.non_thinking = 0.1  # Share of conversations without thoughts.
  c.rows = 32  # a step.
  c.row_tokens = 256
  c.steps = 600
  c.optimizer = dict(
    peak_lr=6e-3,
    warmup_steps=20,
    schedule="cosine",
    final_fraction=0.02,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    frozen=(),
  )
  c.router_balance = dict(
    kind="frozen",  # frozen | sign | auxiliary | both; nemocascade/step/balance.py.
    rate=1e-3,  # Of the bias, a step: the recipes of Nano-3 and Nemotron-3 (paper.md 1.4, 3.1, 5.4).
    weight=1e-4,  # Of the balance loss: Nano-3's SFT (paper.md 3.1); Nano-3 does both there.
  )
  c.save_every = 200
  if arg == "smoke":
    c.conversations = dict.fromkeys(c.conversations, 60)
    c.rows, c.steps, c.save_every = 4, 6, 3
    c.optimizer.warmup_steps = 2
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, **stage(arg))
