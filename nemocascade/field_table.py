"""The fields of all configs, one line each: type, range, choices and meaning.

`field_check` validates configs against these tables, `--help` prints them, and docs/fields.md is written from them.
"""

import dataclasses

from nemocascade.fields import COLDEST, HOTTEST, flag, number, section, several, text, whole, word

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "block", "offload")

SEED = {"seed": whole("Seed of parameters, data and sampling.", 0)}

# Sampling finds the likeliest token by indices in float32, which are exact up to 2^24.
VOCABULARY, WIDTH = 1 << 24, 1 << 20

MODEL = {
  "model.vocab_size": whole("Rows of the embedding; at least as many as the tokenizer has tokens.", high=VOCABULARY),
  "model.hidden_size": whole("Width of the residual stream.", high=WIDTH),
  "model.hybrid_override_pattern": text(
    "The blocks in order, a letter each: M is Mamba-2, E mixture of experts, * attention, - MLP.", empty=False
  ),
  "model.num_attention_heads": whole("Query heads.", high=WIDTH, optional=True),
  "model.num_key_value_heads": whole("Key and value heads; divides num_attention_heads.", high=WIDTH, optional=True),
  "model.head_dim": whole("Channels of an attention head.", high=WIDTH, optional=True),
  "model.mamba_num_heads": whole("Heads of a Mamba-2 block.", high=WIDTH, optional=True),
  "model.mamba_head_dim": whole("Channels of a Mamba-2 head.", high=WIDTH, optional=True),
  "model.ssm_state_size": whole("Size of the state of each Mamba-2 channel.", high=WIDTH, optional=True),
  "model.n_groups": whole("Groups of Mamba-2 heads that share B and C.", high=WIDTH, optional=True),
  "model.conv_kernel": whole("Taps of the causal convolution, in tokens.", high=256, optional=True),
  "model.use_conv_bias": flag("Whether the convolution has a bias.", optional=True),
  "model.chunk_size": whole(
    "Tokens of a chunk of the SSD scan; changes speed, not results.", high=WIDTH, optional=True
  ),
  "model.time_step_min": number("Smallest step size dt of Mamba-2 at initialisation.", above=0, optional=True),
  "model.time_step_max": number("Largest step size dt at initialisation.", above=0, optional=True),
  "model.time_step_floor": number("dt is raised to at least this at initialisation.", above=0, optional=True),
  "model.time_step_limit": several(
    "Range that dt is clamped to: (lowest, highest).", number("dt", low=0, infinite=True), length=2, optional=True
  ),
  "model.n_routed_experts": whole("Experts that the router chooses among.", high=WIDTH, optional=True),
  "model.num_experts_per_tok": whole("Experts a token is sent to.", high=WIDTH, optional=True),
  "model.moe_intermediate_size": whole("Width of a routed expert.", high=WIDTH, optional=True),
  "model.moe_shared_expert_intermediate_size": whole("Width of the shared expert.", high=WIDTH, optional=True),
  "model.n_group": whole("Groups of experts; the router first picks topk_group of them.", high=WIDTH, optional=True),
  "model.topk_group": whole("Groups of experts that a token may use.", high=WIDTH, optional=True),
  "model.norm_topk_prob": flag("Whether the chosen experts' weights sum to 1.", optional=True),
  "model.routed_scaling_factor": number("Factor of the sum of the routed experts' outputs.", above=0, optional=True),
  "model.moe_latent_size": whole(
    "Width of the experts' inputs; None is hidden_size.", high=WIDTH, also=(None,), optional=True
  ),
  "model.intermediate_size": whole("Width of an MLP block.", high=WIDTH, optional=True),
  "model.layer_norm_epsilon": number("Epsilon of the RMS norms.", above=0, optional=True),
  "model.tie_word_embeddings": flag("Whether the output head uses the embedding's weights.", optional=True),
  "model.initializer_range": number("Standard deviation of fresh weights.", above=0, optional=True),
  "model.rescale_prenorm_residual": flag("Whether output projections start divided by sqrt(blocks).", optional=True),
  "model.dtype": word("Dtype of activations and of matrix products.", DTYPES, optional=True),
  "model.param_dtype": word("Dtype of parameters.", DTYPES, optional=True),
  "model.remat": word(
    "What the backward pass recomputes: nothing, each block from its input, or so with the inputs in host memory.",
    REMAT,
    optional=True,
  ),
  "model.sequence_parallel": flag(
    "Whether rows of a batch that is no multiple of the devices are split by tokens over mesh.expert.", optional=True
  ),
  "model.sampling_weights": word(
    "Weights while sampling. gathered: once a step each device gets all but other devices' experts, in model.dtype;"
    " sharded: as in training, gathered for every token, which takes least memory.",
    ("gathered", "sharded"),
    optional=True,
  ),
}

# Guard, a key of nemocascade.runtime.guards.GUARDS -> the quantity and unit of its threshold.
GUARDS = {
  "entropy_collapse": "Entropy of the policy, nats a token; the guard fires below it.",
  "reward_collapse": "Share of the best average verdict that has been lost; fires above it.",
  "length_explosion": "Average length of completions over that of the first steps; fires above it.",
  "sampler_mismatch": "Mean difference of log-probabilities between sampler and trainer, nats a token; fires above it.",
  "uniform_teacher": "Share of tokens for which a teacher's distribution is nearly uniform; fires above it.",
  "few_signals": "Share of groups whose verdicts differ; fires below it.",
  "disk_full": "Free disk space, in checkpoints; fires below it.",
}
SUPERVISION = {
  "max_nonfinite": whole("A stage stops after this many non-finite updates in a row; none of them is applied."),
  "guards.window": whole("Steps over which the guards average."),
  **{f"guards.{name}.threshold": number(help, low=0) for name, help in GUARDS.items()},
  **{f"guards.{name}.action": word("What happens when the guard fires.", ("warn", "stop", "off")) for name in GUARDS},
}

SHARED = (
  MODEL
  | SUPERVISION
  | {
    "mesh.data": whole("Groups of mesh.expert devices; -1 is all devices divided by mesh.expert.", also=(-1,)),
    "mesh.expert": whole(
      "Devices that the experts are split over; -1 is all devices divided by mesh.data.", also=(-1,)
    ),
    "tokenizer.path": text("tokenizer.json, tokenizer.model or a folder with one; if empty, one is trained."),
    "tokenizer.vocab_size": whole("Vocabulary size of a tokenizer that is trained.", high=VOCABULARY),
    "tokenizer.conversations": whole(
      "Conversations of each source, and demonstrations or prompts of each domain, that a tokenizer is trained on.", 0
    ),
    "domains": section("Name -> what the domain is composed of."),
    "domains.*.rows": text("Its prompts: generated:NAME, or a path or glob of JSON lines.", empty=False),
    "domains.*.heldout": text(
      "Held-out prompts, a path or glob; empty holds one prompt of `rows` in 8 out, by its hash.", optional=True
    ),
    "domains.*.verify": text(
      "What judges: a built-in domain, or FILE.py:FUNCTION; empty is the domain's name.", optional=True
    ),
    "domains.*.environment": text(
      "What answers tool calls: a built-in domain, or FILE.py:CLASS; empty is the built-in verifier's.", optional=True
    ),
    "domains.*.thinking": flag(
      "Whether completions have thoughts; None is the built-in domain's.", also=(None,), optional=True
    ),
    "domains.*.max_turns": whole(
      "Assistant turns of an episode at most; None is the environment's.", also=(None,), optional=True
    ),
    "domains.*.min_pass_rate": number(
      "Rows of files with a lower pass_rate are left out.", low=0, high=1, optional=True
    ),
    "domains.*.max_pass_rate": number(
      "Rows of files with a higher pass_rate are left out.", low=0, high=1, optional=True
    ),
    "domains.*.limit_s": number(
      "Seconds that one call of an own reward or environment may take; then it is ended, and counts as failed.",
      above=0,
      high=1e6,
      optional=True,
    ),  # fmt: skip
    "tasks": section("Generator -> fields of it that are not its defaults."),
    "tasks.*.sloppy_rate": number("Share of a demonstration's steps in the sloppy style.", low=0, high=1),
    "tasks.*.error_rate": number("Share of the sloppy steps that are wrong.", low=0, high=1),
    "tasks.*.careful": text("Marker of a step in the careful style.", empty=False),
    "tasks.*.sloppy": text("Marker of a step in the sloppy style.", empty=False),
    "tasks.*.phrases": several("Texts that become one token each.", text("a text", empty=False), unique=True),
    "tasks.math.terms": several(
      "Numbers to add in a short and in a long problem.",
      whole("terms", 2, high=20),
      length=2,
      rising=True,
      optional=True,
    ),
    "tasks.math.long_share": number("Share of long problems.", low=0, high=1, optional=True),
    "tasks.math.largest_total": whole("Largest value of every running total.", 9, optional=True),
    "tasks.long_context.documents": whole("Documents of a prompt.", high=32, optional=True),
    "tasks.long_context.teaching_documents": several(
      "Documents of a demonstration: (fewest, most).", whole("documents", high=32), length=2, rising=True, optional=True
    ),
    "tasks.long_context.teaching_full_share": number(
      "Share of demonstrations with as many documents as a prompt.", low=0, high=1, optional=True
    ),
    "evaluation.prompts": whole("Held-out prompts of each domain.", high=100_000),
    "evaluation.completions": whole("Completions of each prompt at temperature 1."),
    "evaluation.batch": whole("Completions decoded in one batch."),
    "evaluation.prompt_tokens": whole("Most tokens of a prompt."),
    "evaluation.total_tokens": whole("Most tokens of prompt, completion and tool responses together."),
    "evaluation.long_prompt_tokens": whole("prompt_tokens of the domains in long_domains."),
    "evaluation.long_total_tokens": whole("total_tokens of the domains in long_domains."),
    "evaluation.long_domains": several("Domains that have the long_ fields.", text("a domain"), unique=True),
    "evaluation.long_batch": whole("Completions of long_domains decoded in one batch."),
    "evaluation.greedy": several("Stages after which greedy completions are scored too.", text("a stage"), unique=True),
    "sandbox.workers": whole("Programs that run at the same time.", high=4096),
  }
)

STAGE = {
  "kind": word("How the stage trains.", ("sft", "rl", "reward_model")),
  "init_from": text(
    "Where it starts: a checkpoint or hf:DIR, whose model the run then has; in a cascade also a stage or 'previous';"
    " empty draws fresh parameters."
  ),
  "steps": whole("Steps of the stage."),
  "save_every": whole("Steps between checkpoints."),
  "optimizer.peak_lr": number("Learning rate after warm-up.", above=0),
  "optimizer.warmup_steps": whole("Steps of linear warm-up.", 0),
  "optimizer.kind": word(
    "Optimizer; Muon updates matrices inside blocks, and Adam the rest.",
    "nemocascade.step.optimizer:KINDS",
    optional=True,
  ),
  "optimizer.schedule": word("Decay after warm-up.", "nemocascade.step.optimizer:SCHEDULES"),
  "optimizer.final_fraction": number("Learning rate of the last step, as a share of peak_lr.", low=0, high=1),
  "optimizer.b1": number("Adam's decay of the first moment.", low=0, below=1),
  "optimizer.b2": number("Adam's decay of the second moment.", low=0, below=1),
  "optimizer.eps": number("Adam's epsilon.", above=0),
  "optimizer.weight_decay": number("Decoupled weight decay of matrices.", low=0, high=1),
  "optimizer.clip_norm": number("Norm to which the gradient is clipped.", above=0),
  "optimizer.frozen": several(
    "Regular expressions; parameters whose path contains a match keep their values.", text("a pattern", empty=False)
  ),
}

# What a cascade does after a stage, and validation inside a stage.
COURSE = {
  "gates": section(
    "Domain -> what of its score the stage may lose, in a cascade, against where it started.", optional=True
  ),
  "gates.*.tolerance": number(
    "The gate fires if the 95% interval of the mean change of the score lies below minus this.",
    low=0,
    high=1,
    optional=True,
  ),
  "gates.*.action": word(
    "What follows: a warning; a MOPD stage (`recovery`); the next stage starts before this one; the end.",
    ("warn", "mopd", "back", "stop"),
    optional=True,
  ),
  "teaches": several(
    "Domains for which a teacher 'best' may be this stage; without it all.",
    text("a domain"),
    unique=True,
    optional=True,
  ),
  "validation.every": whole(
    "Steps between validations on held-out prompts; a multiple of save_every; 0 is never.", 0, optional=True
  ),
  "validation.metric": text(
    "What the best checkpoint has most of: the score of this domain, or 'mean' of all.", empty=False, optional=True
  ),
  "validation.prompts": whole("Held-out prompts of each domain that are scored.", optional=True),
  "validation.patience": whole(
    "The stage ends after so many validations without a new best; 0 is never.", 0, optional=True
  ),
}

BALANCE = {
  "router_balance.kind": word("How the loads of the experts are balanced.", ("frozen", "sign", "auxiliary", "both")),
  "router_balance.rate": number("Change of the router's bias a step; for the kinds sign and both.", low=0, high=1),
  "router_balance.weight": number("Weight of the balance loss; for the kinds auxiliary and both.", low=0),
}

LANGUAGE_MODEL = COURSE | BALANCE

SFT = LANGUAGE_MODEL | {
  "sources": section("Name -> a source of conversations.", empty=False),
  "sources.*.path": text(
    "JSONL, Parquet or array_record files (a path, or a pattern such as 'chats/*.jsonl'), a folder of them, a TFDS"
    " dataset, or 'generated:DOMAIN'.",
    empty=False,
  ),
  "sources.*.heldout": text(
    "Files of held-out conversations, as in path: their loss is measured at every checkpoint.", optional=True
  ),
  "sources.*.count": whole(
    "Conversations of an epoch; more than the source has repeats them. Without count and weight: all.", optional=True
  ),
  "sources.*.weight": number("Share of the conversations, relative to the others'.", above=0, optional=True),
  "non_thinking": number("Share of generated conversations without thoughts.", low=0, high=1),
  "long_documents": word("What happens to a document longer than a row.", "nemocascade.data.documents:LONG"),
  "max_bad_share": number("Share of the conversations above which bad ones stop the run.", low=0, high=1),
  "look_ahead": whole("Tokens read ahead; their documents are packed, and their rows shuffled, together."),
  "streams": whole("Parts of the data that are read and packed apart, so that hosts can share them; divides `rows`."),
  "data_workers": whole("Processes of a host that read and tokenize; 0 does it in the training process.", 0, high=1024),
  "rows": whole("Packed rows of a step."),
  "row_tokens": whole("Tokens of a row."),
  "pieces": whole("Parts of the rows for gradient accumulation."),
  "z_loss": number("Weight of the mean squared logarithm of the softmax's denominator.", low=0),
}

REWARD_MODEL = {
  "source.rows": text(
    "Pairs of answers: generated:preference, or a path or glob of JSON lines with a prompt, `chosen` and `rejected`.",
    empty=False,
  ),
  "source.heldout": text(
    "Held-out pairs, a path or glob; empty holds one prompt of `rows` in 8 out, by its hash.", optional=True
  ),
  "pairs": whole("Pairs of answers in a step."),
  "row_tokens": whole("Most tokens of prompt and answer together; longer ones are cut."),
  "heldout_pairs": whole("Held-out pairs that the accuracy is measured on; at least `pairs`."),
}

RL = LANGUAGE_MODEL | {
  "mixture": section("Domain -> its share of the prompts.", empty=False),
  "mixture.*": number("Share of this domain, relative to the others'.", low=0),
  "rollout.prompts": whole("Prompts in a step."),
  "rollout.completions": whole("Completions of each prompt: the size of a group."),
  "rollout.prompt_tokens": whole("Most tokens of a prompt."),
  "rollout.total_tokens": whole("Most tokens of prompt, completion and tool responses together."),
  "rollout.lag": whole("Updates since the parameters that a batch is sampled with.", 0, high=1),
  "rollout.slots": whole("Completions that are decoded at a time; 0 decodes all of them.", 0),
  "rollout.parked": whole(
    "Completions that may wait for tools outside the slots, each with its state; 0 takes as many as slots.", 0
  ),
  "rollout.exact": flag("Whether tokens and their log-probabilities are those of the trainer's program, to the bit."),
  "rollout.calls_s": number(
    "Time limit of the tool calls of one turn, in seconds, of environments that run in threads.", above=0
  ),
  "rollout.episode_s": number("Time limit of all tool calls of a completion, in seconds.", above=0),
  "rollout.verdict_s": number("Time limit of a verdict given beside decoding, in seconds, in training.", above=0),
  "rollout.temperature": number("Sampling temperature.", low=COLDEST, high=HOTTEST),
  "rollout.top_p": number("Probability mass of the likeliest tokens, from which one is drawn.", above=0, high=1),
  "rollout.record_experts": flag("Whether the sampler records each token's experts, so that agreement is measured."),
  "rollout.replay": flag("Whether the trainer's routers take the experts that the sampler recorded."),
  "rollout.replay_teachers": flag("Whether teachers and reference take them too."),
  "packing.rows": whole("Rows in a step."),
  "packing.row_tokens": whole("Tokens of a row."),
  "packing.pieces": whole("Parts of the batch for gradient accumulation."),
  "packing.shared_prompts": flag("Whether training processes each prompt once for all its completions."),
  "reward": word("verdict: the verifier's; pairwise: the judge compares a group's answers.", ("verdict", "pairwise")),
  "judge": text("Checkpoint of the reward model; empty in a cascade, whose reward_model stage is the judge."),
  "advantage": word("How the advantage of a token is computed.", "nemocascade.advantage:ADVANTAGES", own=True),
  "ratio": word("How the loss limits the policy's change if updates > 1.", "nemocascade.step.loss:RATIOS", own=True),
  "correction": word(
    "Weight of a token where trainer and sampler differ.", "nemocascade.step.loss:CORRECTIONS", own=True
  ),
  "aggregation": word("How the loss is averaged over tokens.", "nemocascade.step.loss:AGGREGATIONS", own=True),
  "kl": word(
    "Estimator of the KL to the checkpoint that the stage started from.", "nemocascade.step.loss:KLS", own=True
  ),
  "kl_weight": number("Weight of that KL.", low=0),
  "entropy_weight": number("Weight of the entropy bonus.", low=0),
  "distillation": word(
    "Divergence from the teachers' whole distribution.", "nemocascade.step.loss:DISTILLATIONS", own=True
  ),
  "distillation_weight": number("Weight of that divergence.", low=0),
  "overlong": word("What a completion cut off by the limit gets.", "nemocascade.rollout.rewards:OVERLONG", own=True),
  "options": section("Name of a function -> its settings; used only if the config chooses the function."),
  "options.*.clip": number("Advantages are clipped to this on both sides, in nats.", above=0),
  "options.*.alpha": number("Weight of the GRPO advantage that is added.", low=0),
  "options.*.low": number("Lower bound of the ratio, or how far below 1.", low=0),
  "options.*.high": number("Upper bound of the ratio, or how far above 1.", above=0),
  "options.*.cap": number("Bound of the form where the advantage is negative, in units of it.", above=1),
  "options.*.eps": number("Added to a standard deviation before a division by it.", above=0),
  "options.*.k": whole("Number of the teacher's likeliest tokens that are compared."),
  "options.*.tokens": whole("Tokens before the limit over which the reward falls."),
  "options.*.*": number("Another setting of the function."),
  "updates": whole("Updates on each batch; 1 is on-policy."),
  "dynamic_filtering": flag("Whether groups whose verdicts are all equal are left out."),
  "refill_rounds": whole("Most batches that are sampled to fill a step with groups whose verdicts differ.", high=100),
  "samples_every": whole("Steps between writes of samples.jsonl."),
  "samples": whole("Completions written to samples.jsonl each time.", 0),
  "teachers": section("Domain -> 'best', a finished stage of the cascade, or a checkpoint."),
  "teachers.*": text("The teacher of this domain.", empty=False),
  "teachers_in_memory": whole(
    "Most teachers kept in the host's memory at a time; others are read again. One at a time is on the devices."
  ),
}

CASCADE = {
  "about": text("What the run is meant to show; its report begins with it.", optional=True),
  "order": several("The stages in their order.", text("a stage", empty=False), empty=False, unique=True),
  "side_line": several("Stages beside the main line, which init_from='previous' skips.", text("a stage"), unique=True),
  "stages": section("Name -> the fields of a stage.", empty=False),
  "recovery": text("The MOPD stage that a gate with action 'mopd' inserts has this stage's config.", optional=True),
}

ABLATION = CASCADE | {
  "seeds": several("Seeds that are compared, each with its own student.", whole("a seed", 0), empty=False, unique=True),
  "student": text("The stage from which every arm starts.", empty=False),
  "teachers_of": section("Domain -> the stage that made its teacher."),
  "teachers_of.*": text("A stage.", empty=False),
  "arms": section("Name -> the fields of an RL stage.", empty=False),
  "rate_of": section("Arm -> the arm whose peak_lr, as the search found it, is used."),
  "rate_of.*": text("An arm.", empty=False),
  "budget.unit": word("The quantity of which all arms get the same.", ("steps", "tokens", "flops")),
  "budget.amount": number("How much of it an arm gets; at most what the longest arm can spend.", low=1),
  "compared.domains": several("Domains that are scored.", text("a domain"), empty=False, unique=True),
  "compared.at": several(
    "Steps after which an arm is scored on compared.prompts prompts.", whole("a step"), unique=True
  ),
  "compared.prompts": whole("Held-out prompts of each domain, with one completion each; at most evaluation.prompts."),
  "compared.full_at": several(
    "Steps after which an arm is scored on all held-out prompts.", whole("a step"), unique=True
  ),
  "compared.full_completions": whole("Completions of each prompt in these scores, and in the last one."),
  "compared.reach": number("Share of the gap to the teacher that counts as having reached it.", above=0, high=1),
  "compared.pairs": several(
    "Pairs (a, b): score of a minus b at each scored step.", several("a pair", text("an arm"), length=2), unique=True
  ),
  "compared.ends": several(
    "Pairs (a, b): last score of a minus that of b.", several("a pair", text("an arm"), length=2), unique=True
  ),
  "search.arms": several("Arms whose peak_lr is searched for.", text("an arm"), unique=True),
  "search.rates": several("Values of peak_lr to try.", number("a rate", above=0), empty=False, unique=True),
  "search.steps": whole("Steps of a trial."),
  "search.seeds": several("Seeds of the trials; none of them may be in `seeds`.", whole("a seed", 0), unique=True),
}

# Kind of config -> its own fields. A stage inside a cascade has only these, not the SHARED ones.
OWN = {
  "sft": STAGE | SFT, "rl": STAGE | RL, "reward_model": STAGE | REWARD_MODEL, "cascade": CASCADE, "ablation": ABLATION,
}  # fmt: skip
WHOLE = {kind: SEED | SHARED | own for kind, own in OWN.items()}
# An ablation has `seeds` instead of `seed`.
WHOLE["ablation"]["seed"] = dataclasses.replace(SEED["seed"], optional=True)
# Kind of config -> the sections that its command does not read; --help leaves them out. All that it takes from the
# domains is the text that a new tokenizer is trained on.
UNREAD = dict.fromkeys(("sft", "reward_model"), ("domains", "evaluation", "sandbox"))
