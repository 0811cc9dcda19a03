"""The preference judge of 30B-A3B: a Bradley-Terry reward model, as in Nemotron-Cascade 1.

  python -m experiments.reward_model --config=configs/nano_30b/reward_model.py --workdir=DIR --config.init_from=CKPT

Cascade 2 (arXiv 2603.19220, section 4.5) has a generative reward model of 235B parameters (GenRM), which samples
up to 16K tokens for each of a group's 120 pairs. Such a model does not fit beside the policy on the slices of
meshes.py, and needs a server of its own; verifiers/judge.py has its prompts and its scores (GenRMJudge). A
Bradley-Terry model reads each answer once and gives every pair the difference of two numbers. The batch of 256,
the rate and one epoch over 82K pairs are those of Cascade 1 (arXiv 2512.13607, section 4).
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes
from configs.tiny import reward_model as tiny


def stage(arg: str = "") -> ConfigDict:
  c = recipe.reward_model()
  c.init_from = "sft"  # Cascade 1 starts from Qwen2.5-72B-Instruct.
  c.source = dict(
    rows="pairs/*.jsonl"
  )  # 82K: HelpSteer2, HelpSteer3 without ties, and pairs made for Cascade 1. Not released.
  c.pairs = 256
  c.row_tokens = 4_096  # Prompt and final answer, without thoughts. The length is not published.
  c.heldout_pairs = 1_024
  c.steps = 320  # One epoch: 82K / 256.
  c.optimizer.update(peak_lr=2e-6, warmup_steps=0)  # The warm-up is not published.
  if meshes.words(arg)[1]:
    small = tiny.stage("smoke")
    sizes = {name: small[name] for name in ("source", "pairs", "row_tokens", "heldout_pairs")}
    c.update(steps=4, save_every=2, **sizes)
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
