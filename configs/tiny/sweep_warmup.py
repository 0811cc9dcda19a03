"""Sweeps the number of warm-up steps of MOPD.

MOPD's gradient is largest at the start. The Cascade 2 report (arXiv 2603.19220, section 4.4) warms up over
30 of 52 steps.

  python -m experiments.ablation --config=configs/tiny/sweep_warmup.py --workdir=runs/sweep_warmup
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main

STEPS = (0, 5, 15, 30)


def get_config(arg: str = "") -> ConfigDict:
  arms = {f"warmup_{steps}": warmed(steps) for steps in STEPS}
  return main.sweep(arg, arms, tuple((f"warmup_{steps}", "warmup_5") for steps in (0, 15, 30)))


def warmed(steps: int) -> ConfigDict:
  c = main.mopd()
  c.optimizer.warmup_steps = steps
  return c
