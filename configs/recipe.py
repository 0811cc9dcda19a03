"""Fields that all scales share. `configs/tiny` and `configs/nano_30b` state what differs.

The recipe is that of the Nemotron-Cascade 2 report (arXiv 2603.19220). What it does not publish is taken from
Nano-3: the Nemotron-3-Nano report (arXiv 2512.20848) and its open recipe (NVIDIA-NeMo/Nemotron).
"""

from typing import Any

from ml_collections import ConfigDict

# Every domain, in the column order of this project's run report.
DOMAINS = (
  "instruction", "math", "stem", "structured", "tools",
  "preference", "long_context", "code", "swe", "swe_agentic",
)  # fmt: skip

SIDE_LINE = ("reward_model", "rlhf_teacher")  # No stage starts from these by "previous".
ANNEALED = dict(schedule="linear", final_fraction=0.0)  # The learning rate falls linearly to 0.
PLAIN = dict(long_domains=(), greedy=())  # The evaluation has no long prompts and no greedy scores.
COSINE = dict(schedule="cosine")  # It falls along a cosine to the optimizer's final_fraction.

_RLHF = dict(
  mixture=dict(preference=1.0),
  reward="pairwise",
  dynamic_filtering=False,  # Pairwise rewards can differ where verdicts are equal.
  overlong="filter",
  kl_weight=0.03,
)
# RL stage -> the fields in which it differs from `rl()`, at every scale.
STAGES = dict(
  if_rl=dict(mixture=dict(instruction=1.0)),
  multi_domain_rl=dict(overlong="filter"),  # Table 9. Section 4.5 says that filtering is not applied.
  mopd=dict(
    advantage="mopd", aggregation="sequence_mean", correction="icepop", dynamic_filtering=False, overlong="keep",
  ),
  rlhf=_RLHF,
  rlhf_teacher=dict(init_from="sft", **_RLHF),  # The preference teacher of MOPD (section 4.4).
  long_context_rl=dict(mixture=dict(long_context=1.0), overlong="filter"),  # Table 9. Section 4.6 does not filter.
  code_rl=dict(mixture=dict(code=1.0), overlong="filter"),
  # Overlong filtering of the last two is not published; as in Nemotron-3-Super's open recipe of SWE RL.
  swe_rl=dict(mixture=dict(swe=1.0), overlong="filter"),
  swe_agentic_rl=dict(mixture=dict(swe_agentic=1.0), overlong="filter"),
)  # fmt: skip

# Comparisons of MOPD with several teachers: the domains trained or scored, the stage that every arm starts
# from, and domain -> the stage that teaches it (section 4.4).
COMPARED = ("instruction", "math", "stem", "structured", "tools", "preference")
STUDENT = "multi_domain_rl"
TEACHERS = dict(math="sft", preference="rlhf_teacher") | dict.fromkeys(
  ("instruction", "stem", "structured", "tools"), STUDENT
)


def shared() -> ConfigDict:
  """The fields of a run, whatever it trains. A scale adds model, mesh, tokenizer, sandbox and sizes."""
  c = ConfigDict()
  c.seed = 0
  c.domains = generated(*DOMAINS)
  c.tasks = {}  # Generator -> its fields that differ from the defaults; those of its style (`sloppy_rate`) too.
  c.evaluation = dict(
    greedy=(),  # Stages also scored with greedy decoding.
    long_domains=("long_context",),  # Their prompts have `long_prompt_tokens`.
    long_batch=128,  # Rows of these domains that are decoded together.
  )
  c.update(guards())
  return c


def generated(*names: str) -> ConfigDict:
  """Domains whose rows a program makes, each judged by the built-in verifier of its name."""
  return ConfigDict({name: dict(rows=f"generated:{name}") for name in names})


def conversations(**counts: int) -> ConfigDict:
  """Sources of SFT that are generated: domain -> its demonstrations."""
  return ConfigDict({name: dict(path=f"generated:{name}", count=count) for name, count in counts.items()})


def guards() -> ConfigDict:
  """Thresholds at which a training stage warns or stops; docs/objectives.md gives the reasons.

  The action of each guard is warn | stop | off.
  """
  c = ConfigDict()
  # A non-finite update is not applied. The stage stops after this many in a row.
  c.max_nonfinite = 3
  c.guards = dict(
    window=10,  # Steps of the moving average. Guards wait for this many steps.
    entropy_collapse=dict(action="warn", threshold=0.01),  # Entropy, nats per token.
    reward_collapse=dict(action="warn", threshold=0.5),  # Fall of the average, as a share of its best.
    length_explosion=dict(action="warn", threshold=3.0),  # Completion length over that of the first steps.
    sampler_mismatch=dict(action="warn", threshold=0.05),  # Nats per token.
    uniform_teacher=dict(action="warn", threshold=0.5),  # Share of tokens on which a teacher is uniform.
    few_signals=dict(action="warn", threshold=0.05),  # Share of groups whose verdicts differ.
    disk_full=dict(action="stop", threshold=2.0),  # Checkpoints that still fit on the disk.
  )
  return c


def optimizer(**differs: Any) -> dict:
  """The optimizer's fields, updated with `differs`; peak_lr and warmup_steps have no shared value."""
  fields = dict(
    kind="adamw",  # adamw | muon
    schedule="constant",
    final_fraction=1.0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,  # Not published; Adam's default.
    weight_decay=0.0,  # Not published for RL; Nano-3's recipe.
    clip_norm=1.0,  # Not published; Nano-3's recipe.
    frozen=(),
  )
  return fields | differs


def router_balance() -> dict:
  return dict(
    kind="frozen",  # frozen | sign | auxiliary | both; nemocascade/step/balance.py.
    rate=1e-3,  # Bias change per step; Nano-3's report and recipes.
    # Weight of the balance loss: that of Nano-3's SFT. Nano-3's RL recipe has 0, because the loss increases
    # the mismatch of sampler and trainer.
    weight=1e-4,
  )


def sft() -> ConfigDict:
  """Stage 1, SFT (section 3.1). A scale adds sources, rows, steps and the learning rate."""
  c = ConfigDict()
  c.kind = "sft"
  c.init_from = ""  # A checkpoint's path, or hf:DIR. "" initializes the parameters.
  c.pieces = 1  # Parts of a step's rows that are processed one after another.
  c.z_loss = 0.0  # Not published.
  c.non_thinking = 0.1  # Share of generated conversations without thoughts. Nano-3 removed them from 10%.
  c.data_workers = 0  # Processes that read and tokenize; 0 does it in the training process.
  c.max_bad_share = 0.01  # More bad conversations than this share stop the run.
  c.optimizer = optimizer(**COSINE)
  c.router_balance = router_balance()
  return c


def reward_model() -> ConfigDict:
  """The preference judge: a Bradley-Terry reward model (Nemotron-Cascade 1, arXiv 2512.13607, section 4)."""
  c = ConfigDict()
  c.kind = "reward_model"
  c.optimizer = optimizer()
  c.save_every = 100
  return c


def rl(stage: str = "") -> ConfigDict:
  """An RL stage (section 4): on-policy GRPO with one update per batch, changed by STAGES.

  Args:
    stage: a key of STAGES; "" has GRPO and no mixture.
  """
  c = ConfigDict()
  c.kind = "rl"
  c.init_from = "previous"  # "previous", a stage's name, or a checkpoint's path.
  c.rollout = dict(
    temperature=1.0,  # Above 0. Used by sampler, trainer, teachers and reference.
    top_p=1.0,  # A value below 1 needs a `correction`.
    lag=0,  # Updates since the parameters that sample a batch: 0, or 1 to sample it while the one before is learned.
    slots=0,  # Completions that are decoded at a time; 0 decodes all, and those that are left in fewer slots.
    parked=0,  # Completions that wait for tools beside the slots, at most; 0: as many as slots.
    exact=False,  # Whether samples are verified by the trainer's program, to the bit.
    calls_s=300.0,  # Time limits of the tool calls of a turn, and of a completion.
    episode_s=3600.0,
    verdict_s=3600.0,  # Time limit of a verdict that is given beside decoding.
    # Experts of each token: recorded by the sampler; taken by the trainer; by teachers and reference too.
    record_experts=False,
    replay=False,
    replay_teachers=False,
  )
  # shared_prompts=True: a row holds what follows a prompt, at most row_tokens, and the model reads each
  # prompt once for all its completions.
  c.packing = dict(shared_prompts=False)
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
  c.overlong = "zero"  # zero | filter | keep | soft. zero: a completion cut off at the limit gets reward 0.
  # Function -> its arguments that are not its defaults. Only those of chosen functions are used.
  c.options = dict(icepop=dict(low=0.5, high=2.0))  # Section 4.4.
  c.updates = 1  # Updates per batch; 1 is on-policy.
  c.dynamic_filtering = True  # Leaves out groups of equal verdicts; they have no advantage.
  # Batches sampled at most per step, to find enough groups whose verdicts differ. The report samples until
  # every prompt has a gradient, and does not say how.
  c.refill_rounds = 2
  c.optimizer = optimizer(frozen=(r"/gate$",))  # The router, as in Nano-3's recipe; its bias has no gradient.
  c.router_balance = router_balance()
  c.save_every = 10
  c.teachers = {}  # Domain -> "best" (of the cascade so far), a stage, or a checkpoint.
  return put(c, **STAGES[stage]) if stage else c


def put(c: ConfigDict, **fields: Any) -> ConfigDict:
  """Sets fields of an RL stage, each in the section that has it (rollout or optimizer), and returns `c`."""
  for name, value in fields.items():
    section = next((s for s in (c.rollout, c.optimizer) if name in s), c)
    section[name] = ConfigDict(value) if isinstance(value, dict) else value
  return c


def follow_rollout(c: ConfigDict) -> None:
  """Makes the packed rows of an RL stage follow its rollout: a row holds the longest completion, and each gets a row.

  They are references: a change of the rollout's sizes, also on the command line, changes them too.
  """
  pieces = c.packing.get_ref("pieces")
  completions = c.rollout.get_ref("prompts") * c.rollout.get_ref("completions")
  c.packing.rows = (completions + pieces - 1) // pieces * pieces
  c.packing.row_tokens = c.rollout.get_ref("total_tokens") + 0  # One of its own: setting it leaves total_tokens.


def shrink_rl(c: ConfigDict) -> None:
  """Changes an RL stage to its `:smoke` form: the same code path in a few seconds."""
  c.rollout.update(prompts=8, completions=8)
  c.steps, c.save_every, c.samples_every = 2, 1, 1


def comparison() -> ConfigDict:
  """The fields of a comparison on mathematics. A scale adds arms, seeds, prompts and the steps that are scored."""
  c = ConfigDict()
  c.evaluation = dict(PLAIN)
  c.side_line = ()
  c.student = STUDENT
  c.rate_of = {}  # Arm -> the arm whose learning rate it has.
  c.budget = dict(unit="steps")  # steps | tokens (sampled) | flops. An arm ends at the budget or at its own `steps`.
  c.compared = dict(
    domains=("math",),
    reach=0.95,  # An arm has reached its teacher when it closes this share of the gap.
    ends=(),  # Pairs of arms of different length, compared where each ends.
  )
  c.search = dict(arms=(), seeds=(100,))  # Arms whose peak_lr is searched for among `rates`.
  return c


def several_teachers() -> ConfigDict:
  """`comparison` of MOPD with several teachers, GRPO on the same mixture, and RLHF alone."""
  c = comparison()
  c.side_line = SIDE_LINE
  c.compared.domains = COMPARED
  c.compared.update(pairs=(("mopd", "grpo"), ("mopd", "rlhf")), at=(10, 20, 40), full_completions=4)
  return c


def shrink_comparison(c: ConfigDict) -> None:
  """Changes the scored steps and the budget of an ablation to those of its `:smoke` form, whose arms have two steps."""
  c.compared.update(at=(1,), full_at=(2,))
  c.budget.amount = float(max(arm.steps for arm in c.arms.values()))
  if c.compared.full_completions > 2:
    c.compared.full_completions = 2
