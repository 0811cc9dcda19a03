"""Compares batches that are sampled with the newest parameters and with those of one update before, under GRPO.

  python -m experiments.ablation --config=configs/tiny/sweep_lag.py --workdir=runs/sweep_lag

Arms: no lag, a lag of one update, and the same with the token's loss weighted by min(pi_train / pi_sampler, 2).
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main


def get_config(arg: str = "") -> ConfigDict:
  arms = dict(lag_0=lagging(0), lag_1=lagging(1), lag_1_weighed=lagging(1))
  arms["lag_1_weighed"].correction = "tis"
  c = main.sweep(arg, arms, (("lag_1", "lag_0"), ("lag_1_weighed", "lag_0")))
  c.order, c.teachers_of = ("sft",), {}  # No arm needs a teacher.
  del c.stages["teacher"]
  return c


def lagging(lag: int) -> ConfigDict:
  c = main.grpo()
  c.rollout.lag = lag
  return c
