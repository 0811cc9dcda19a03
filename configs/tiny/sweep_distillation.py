"""Sweeps what MOPD learns from: the sampled token, the teacher's k likeliest tokens, or all tokens.

  python -m experiments.ablation --config=configs/tiny/sweep_distillation.py --workdir=runs/sweep_distillation

The reverse KL over the whole vocabulary has MOPD's expected gradient without the noise of sampling a token;
top-k lies between. Nemotron-3-Ultra found no gain over the sampled token (NVIDIA-NeMo/Nemotron,
skills/nemotron-ultra/paper/mopd).
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main


def get_config(arg: str = "") -> ConfigDict:
  arms = dict(
    sampled=main.mopd(),
    sampled_clipped=main.mopd_clipped(),
    reverse_top4=main.distilled("reverse_kl_topk", k=4),
    reverse_top16=main.distilled("reverse_kl_topk"),
    forward_top16=main.distilled("forward_kl_topk"),
    reverse_whole=main.distilled("reverse_kl"),
    forward_whole=main.distilled("forward_kl"),
  )
  pairs = (
    ("reverse_whole", "sampled"), ("reverse_top16", "sampled"), ("reverse_top16", "reverse_whole"),
    ("forward_whole", "reverse_whole"), ("forward_top16", "reverse_top16"), ("reverse_top4", "reverse_top16"),
  )  # fmt: skip
  return main.sweep(arg, arms, pairs)
