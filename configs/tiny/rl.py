"""The base config of the tiny RL stages: on-policy GRPO with one update per batch (configs/recipe.py).

This file is not a stage itself: each stage file changes these fields.
"""

from fractions import Fraction

from ml_collections import ConfigDict

from configs import recipe

SEVERAL_TURNS = 112  # Least `rollout.total_tokens` of conversations with several turns.
# Stages that sample a second batch where the first has too few groups whose verdicts differ.
REFILLED = ("if_rl", "long_context_rl", "code_rl", "swe_rl", "swe_agentic_rl")


def fields(stage: str = "") -> ConfigDict:
  """The RL stage `stage` of the recipe at this scale."""
  c = recipe.rl(stage)
  c.rollout.update(
    prompts=32,  # Per step.
    completions=8,  # Per prompt.
    prompt_tokens=48,
  )
  total_tokens(c, Fraction(80, 48))
  # The training batch. One shape for all stages of the cascade: one compilation. That of a stage on its own
  # follows its rollout (base.stage).
  c.packing.update(
    rows=128,
    row_tokens=272,
    # The batch is processed in this many parts, in turn. Empty parts are skipped. An update of IF-RL takes 0.19 s in
    # parts of 16 rows, 0.22 s in parts of 4.
    pieces=8,
  )
  c.options.update(
    mopd_clipped=dict(clip=1.0),
    mopd_outcome=dict(alpha=1.0),
    token_clip=dict(low=0.2, high=0.28),
    dual_clip=dict(low=0.2, high=0.28, cap=3.0),
    gspo=dict(low=3e-4, high=4e-4),
    cispo=dict(low=1.0, high=0.28),
    tis=dict(low=0.0, high=2.0),
    sequence_mask=dict(low=0.999, high=1.002),
    reverse_kl_topk=dict(k=16),
    forward_kl_topk=dict(k=16),
    soft=dict(tokens=16),
  )
  if stage not in REFILLED:
    c.refill_rounds = 1
  c.optimizer.update(peak_lr=1e-3, warmup_steps=5)
  c.steps = 20  # Each stage file sets its own.
  c.samples_every = 5
  c.samples = 8  # Completions written to samples.jsonl every `samples_every` steps.
  c.teachers_in_memory = 4  # Checkpoints kept in the host's memory. Others are read and probed on demand.
  return c


def total_tokens(c: ConfigDict, prompts: Fraction) -> None:
  """Makes `rollout.total_tokens`, of prompt, completion and tool responses, this multiple of `rollout.prompt_tokens`.

  It is a reference: a tokenizer that needs more tokens for a prompt needs more for an answer too, so a change of
  prompt_tokens alone gives room for both.
  """
  c.rollout.total_tokens = c.rollout.get_ref("prompt_tokens") * prompts.numerator // prompts.denominator


def several_turns(c: ConfigDict) -> None:
  """Gives room for conversations with several turns."""
  total_tokens(c, Fraction(SEVERAL_TURNS, 48))


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the `:smoke` form of its stage: the same code path in a few seconds."""
  recipe.shrink_rl(c)
  if c.rollout.total_tokens < SEVERAL_TURNS:  # Equal shapes share compiled programs.
    several_turns(c)
