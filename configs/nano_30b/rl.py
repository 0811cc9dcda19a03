"""The fields that all RL stages share at the published scale: on-policy GRPO with one update per batch.

This file is not a stage itself: each stage file changes these fields. Settings: Cascade 2 report (arXiv
2603.19220), section 4.1 and tables 8 to 10, which give the same numbers to every stage unless its file says
otherwise. The report rounds lengths to 16K, 49K, 98K and 118K. We use 49,152 (as in Nano-3's open recipe,
NVIDIA-NeMo/Nemotron), twice that, and multiples of 4,096 for the rest. The report's lengths are those of a
response; ours count prompt and response together.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import meshes
from configs.tiny import long_context_rl
from configs.tiny import rl as tiny

LONGEST = 98_304  # Longest row of an RL step for one device: the RL step of mopd.py needs 86 GiB with such rows.


def stage(name: str, arg: str, **differs: Any) -> ConfigDict:
  """The RL stage `name` of configs/recipe.py at this scale.

  Args:
    arg: the argument of its file, see meshes.words.
    differs: its fields that differ from `fields`; those of rollout and optimizer without their section.
  """
  slice_, smoke = meshes.words(arg)
  c = recipe.put(fields(name), **differs)
  c.packing.update(packing(c.rollout, slice_))
  if smoke:
    shrink(c)
  return c


def fields(name: str = "") -> ConfigDict:
  """The stage `name` of the recipe, or its base, with the sizes of most stages at this scale; without `packing`."""
  c = recipe.rl(name)
  # 128 prompts, 16 completions, at most 49K tokens (tables 8 and 9). The length of prompts is not published.
  c.rollout.update(prompts=128, completions=16, prompt_tokens=4_096, total_tokens=49_152)
  # The rate of tables 8 and 9. The warm-up is not published; 10 steps as in Nano-3's recipe, which starts at a
  # hundredth of the peak.
  c.optimizer.update(peak_lr=3e-6, warmup_steps=10)
  c.router_balance.kind = "sign"  # Not published. Nano-3's RL recipe has no balance loss and a bias rate of 1e-3.
  c.samples_every = 1
  c.samples = 32
  c.teachers_in_memory = 3  # Each takes 7.4 GiB of a host's memory on 16 hosts.
  return c


def packing(rollout: ConfigDict, slice_: str) -> dict:
  """One row per completion, as long as the longest; each piece has one row per device, or per expert group if long."""
  rows, tokens = rollout["prompts"] * rollout["completions"], rollout["total_tokens"]
  at_once = meshes.DEVICES[slice_] // (meshes.SLICES[slice_]["expert"] if tokens > LONGEST else 1)
  return dict(rows=rows, row_tokens=tokens, pieces=max(1, rows // at_once))


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the `:smoke` form of its stage, with the lengths of the tiny scale."""
  small = tiny.fields()
  long = long_context_rl.stage().rollout
  recipe.shrink_rl(c)
  c.rollout.update(prompt_tokens=small.rollout.prompt_tokens, total_tokens=tiny.SEVERAL_TURNS)
  if "long_context" in c.mixture:  # Its prompts are longer at every scale.
    c.rollout.update(prompt_tokens=long.prompt_tokens, total_tokens=long.total_tokens)
  c.packing.update(rows=64, row_tokens=small.packing.row_tokens, pieces=4)
  c.samples, c.refill_rounds = 4, small.refill_rounds
