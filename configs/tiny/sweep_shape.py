"""Sweeps prompts x completions at a constant product of 512, for MOPD and for GRPO.

  python -m experiments.ablation --config=configs/tiny/sweep_shape.py --workdir=runs/sweep_shape

MOPD of the Cascade 2 report (arXiv 2603.19220, section 4.4) changed from 128 x 4 to 512 x 1. GRPO needs
groups, so it has no 512 x 1.
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main

SHAPES = ((512, 1), (128, 4), (64, 8), (32, 16))


def get_config(arg: str = "") -> ConfigDict:
  arms = {f"mopd_{q}x{g}": shaped(main.mopd(), q, g) for q, g in SHAPES}
  arms |= {f"grpo_{q}x{g}": shaped(main.grpo(50), q, g) for q, g in SHAPES if g > 1}
  pairs = (("mopd_512x1", "mopd_128x4"), ("mopd_512x1", "mopd_32x16"), ("grpo_128x4", "grpo_32x16"))
  return main.sweep(arg, arms, pairs)


def shaped(c: ConfigDict, prompts: int, completions: int) -> ConfigDict:
  c.rollout.update(prompts=prompts, completions=completions)
  return c
