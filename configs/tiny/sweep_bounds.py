"""Sweeps the bounds of MOPD's sampler-trainer mask, and of the ratio clip with two updates per batch.

  python -m experiments.ablation --config=configs/tiny/sweep_bounds.py --workdir=runs/sweep_bounds

The sampler and the trainer run the same model code in fp32, so they agree, and the mask's bounds should not
matter here. The clip's bounds may matter, because the second update of a batch is off-policy.
"""

from ml_collections import ConfigDict

from configs.tiny import grpo_vs_mopd as main

MASKS = dict(printed=(0.5, 2.0), narrow=(0.9, 1.1), tight=(0.99, 1.01))
CLIPS = dict(dapo=(0.2, 0.28), tight=(0.1, 0.1))


def get_config(arg: str = "") -> ConfigDict:
  arms = {f"icepop_{name}": masked(*bounds) for name, bounds in MASKS.items()}
  arms |= {f"twice_{name}": twice("token_clip", low=low, high=high) for name, (low, high) in CLIPS.items()}
  arms["twice_free"] = twice("none")
  pairs = (("icepop_tight", "icepop_printed"), ("twice_dapo", "twice_free"), ("twice_tight", "twice_free"))
  return main.sweep(arg, arms, pairs)


def masked(low: float, high: float) -> ConfigDict:
  c = main.mopd()
  c.options.icepop.update(low=low, high=high)
  return c


def twice(ratio: str, **bounds: float) -> ConfigDict:
  c = main.mopd()
  c.updates, c.ratio = 2, ratio
  if bounds:
    c.options[ratio].update(bounds)
  return c
