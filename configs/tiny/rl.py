"""The base config of the tiny RL stages: on-policy GRPO with one update per batch.

See the Cascade 2 report (arXiv 2603.19220), section 4. This file is not a stage itself: each stage file
changes these fields.
"""

from ml_collections import ConfigDict


def fields() -> ConfigDict:
  c = ConfigDict()
  c.kind = "rl"
  c.init_from = "previous"  # "previous", a stage's name, or a checkpoint's path.
  c.rollout = dict(
    prompts=32,  # Per step.
    completions=8,  # Per prompt.
    prompt_tokens=48,
    total_tokens=80,  # Prompt, completion and tool responses.
    temperature=1.0,  # Above 0. Used by sampler, trainer, teachers and reference.
    top_p=1.0,  # A value below 1 needs a `correction`.
  )
  c.packing = dict(  # The training batch. One shape for all stages of the cascade: one compilation.
    rows=128,
    row_tokens=272,
    pieces=8,  # The batch is processed in this many parts, in turn. Empty parts are skipped.
    # True: a row holds what follows a prompt, at most row_tokens, and the model reads each prompt once for
    # all its completions.
    shared_prompts=False,
  )
  c.reward = "verdict"  # verdict | pairwise. pairwise: the judge compares all pairs of a group.
  c.judge = ""  # The reward model's checkpoint; empty in a cascade, which uses its reward_model stage.
  # Each of these fields names a function. docs/objectives.md has the equations.
  c.advantage = "grpo"  # nemocascade/advantage.py: ADVANTAGES.
  c.ratio = "none"  # For several updates per batch: none | token_clip | dual_clip | gspo | cispo.
  c.correction = "none"  # For a mismatch of sampler and trainer: none | tis | icepop | sequence_mask.
  c.aggregation = "token_mean"  # token_mean | sequence_mean | constant_length.
  c.kl = "k3"  # Estimator of the KL to the stage's initial policy: k1 | k2 | k3.
  c.kl_weight = 0.0
  c.entropy_weight = 0.0
  # Loss between policy and teachers: reverse_kl | forward_kl | reverse_kl_topk | forward_kl_topk.
  c.distillation = "reverse_kl"
  c.distillation_weight = 0.0
  c.overlong = "zero"  # zero | filter | keep | soft.
  c.options = dict(  # Function -> its arguments. Only those of chosen functions are used.
    mopd_clipped=dict(clip=1.0),
    mopd_outcome=dict(alpha=1.0),
    token_clip=dict(low=0.2, high=0.28),
    dual_clip=dict(low=0.2, high=0.28, cap=3.0),
    gspo=dict(low=3e-4, high=4e-4),
    cispo=dict(low=1.0, high=0.28),
    tis=dict(low=0.0, high=2.0),
    icepop=dict(low=0.5, high=2.0),
    sequence_mask=dict(low=0.999, high=1.002),
    reverse_kl_topk=dict(k=16),
    forward_kl_topk=dict(k=16),
    soft=dict(tokens=16),
  )
  c.updates = 1  # Updates per batch; 1 is on-policy.
  c.dynamic_filtering = True  # Leaves out groups of equal verdicts; they have no advantage.
  c.refill_rounds = 1  # Batches sampled at most per step, to find enough groups whose verdicts differ.
  c.optimizer = dict(
    peak_lr=1e-3,
    warmup_steps=5,
    schedule="constant",
    final_fraction=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    frozen=(r"/gate$",),  # The router. Its bias never gets a gradient update.
  )
  c.router_balance = dict(
    kind="frozen",  # frozen | sign | auxiliary | both; nemocascade/step/balance.py.
    rate=1e-3,  # Bias change per step; Nemotron-3-Nano report (arXiv 2512.20848) and NVIDIA's recipes.
    # Weight of the balance loss: that of Nano-3's SFT. Nano-3's RL recipe has 0, because the loss increases
    # the mismatch of sampler and trainer.
    weight=1e-4,
  )
  c.steps = 20
  c.save_every = 10
  c.samples_every = 5
  c.samples = 8  # Completions written to samples.jsonl every `samples_every` steps.
  c.teachers = {}  # Domain -> "best" (of the cascade so far), a stage, or a checkpoint.
  c.teachers_in_memory = 4  # Teacher checkpoints kept loaded. Others are loaded and probed on demand.
  return c


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the `:smoke` form of its stage: the same code path in a few seconds."""
  c.rollout.update(prompts=8, completions=8)
  c.rollout.total_tokens = max(c.rollout.total_tokens, 112)  # Equal shapes share compiled programs.
  c.steps, c.save_every, c.samples_every = 2, 1, 1
