"""What the tiny RL stages have in common: GRPO, on policy, one update a batch (paper.md 4.1).

Not a stage of its own: each `*_rl.py` states its difference from it.
"""

from ml_collections import ConfigDict


def fields() -> ConfigDict:
  c = ConfigDict()
  c.kind = "rl"
  c.init_from = "previous"  # A stage's name, "previous", or a checkpoint's path.
  c.rollout = dict(
    prompts=32,  # a step.
    completions=8,  # a prompt.
    prompt_tokens=48,
    total_tokens=80,  # Prompt, completion and tool responses.
    temperature=1.0,  # Above 0; of sampler, trainer, teachers and reference alike.
    top_p=1.0,  # Below 1 only with a correction.
  )
  c.packing = dict(  # Completions are packed for the step; one shape for all stages, one compilation.
    rows=128,
    row_tokens=272,
    pieces=8,  # Taken one after another; those that stay empty cost nothing.
    # Rows are what follows a prompt, row_tokens at most, and the prompt is taken in once for all its completions.
    shared_prompts=False,
  )
  c.reward = "verdict"  # verdict | pairwise: all pairs of a group, by the judge.
  c.judge = ""  # The reward model's checkpoint; in a cascade the reward_model stage is the judge.
  # Each names a function; experiments/OBJECTIVES.md has the equations.
  c.advantage = "grpo"  # nemocascade/advantage.py: ADVANTAGES.
  c.ratio = "none"  # Of several updates a batch: none | token_clip | dual_clip | gspo | cispo.
  c.correction = "none"  # Sampler against trainer: none | tis | icepop | sequence_mask.
  c.aggregation = "token_mean"  # token_mean | sequence_mean | constant_length.
  c.kl = "k3"  # To where the stage started: k1 | k2 | k3.
  c.kl_weight = 0.0
  c.entropy_weight = 0.0
  # Of the policy from its teachers: reverse_kl | forward_kl | reverse_kl_topk | forward_kl_topk.
  c.distillation = "reverse_kl"
  c.distillation_weight = 0.0
  c.overlong = "zero"  # zero | filter | keep | soft.
  c.options = dict(  # What these functions are given; those that are not chosen cost nothing.
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
  c.updates = 1  # A batch is learned from so often; 1 is on policy.
  c.dynamic_filtering = True  # Groups whose verdicts are all equal teach nothing: leave them out.
  c.refill_rounds = 1  # Batches that may be sampled to fill the step with informative groups.
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
    frozen=(r"/gate$",),  # The router; its bias moves by no gradient anyway.
  )
  c.router_balance = dict(
    kind="frozen",  # frozen | sign | auxiliary | both; nemocascade/step/balance.py.
    rate=1e-3,  # Of the bias, a step: the recipes of Nano-3 and Nemotron-3 (paper.md 1.4, 3.1, 5.4).
    weight=1e-4,  # Of the balance loss: Nano-3's SFT (paper.md 3.1); 0 in its RL, where it parts sampler and trainer (4.1).
  )
  c.steps = 20
  c.save_every = 10
  c.samples_every = 5
  c.samples = 8  # Completions written to samples.jsonl each time.
  c.teachers = {}  # MOPD: domain -> "best" (of the cascade so far), a stage's name, or a checkpoint.
  c.teachers_in_memory = 4  # Checkpoints; each is loaded and probed when it is not there.
  return c


def shrink(c: ConfigDict) -> None:
  """A stage's `:smoke` form: the same path in a few seconds."""
  c.rollout.update(prompts=8, completions=8)
  c.rollout.total_tokens = max(c.rollout.total_tokens, 112)  # Shapes that other stages have too.
  c.steps, c.save_every, c.samples_every = 2, 1, 1
