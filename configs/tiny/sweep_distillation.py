"""What of a teacher's distribution to learn from: the sampled token, its likeliest tokens, or all of it.

  python -m experiments.ablation --config=configs/tiny/sweep_distillation.py --workdir=runs/sweep_distillation

The whole reverse KL has the gradient of MOPD without the noise of sampling a token; top-k is between.
Nemotron-3-Ultra found no gain over the sampled token (paper.md 5.4).
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main


def get_config(arg: str = "") -> ConfigDict:
  arms = dict(
    sampled=main.mopd(),
    sampled_clipped=main.mopd_clipped(),
    reverse_top4=main.distilled("reverse_kl_topk", k=4),
    reverse_top16=main.distilled("reverse_kl_topk", k=16),
    forward_top16=main.distilled("forward_kl_topk", k=16),
    reverse_whole=main.distilled("reverse_kl"),
    forward_whole=main.distilled("forward_kl"),
  )
  pairs = (
    ("reverse_whole", "sampled"), ("reverse_top16", "sampled"), ("reverse_top16", "reverse_whole"),
    ("forward_whole", "reverse_whole"), ("forward_top16", "reverse_top16"), ("reverse_top4", "reverse_top16"),
  )  # fmt: skip
  return main.sweep(arg, arms, pairs)
