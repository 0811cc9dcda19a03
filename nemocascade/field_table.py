"""The fields of all configs, one line each: type, range, choices and meaning.

`field_check` validates configs against these tables, `--help` prints them, and docs/fields.md is written from them.
"""

import dataclasses

from nemocascade.fields import (
  flag,
  number,
  section,
  several,
  text,
  whole,
  word,
)

DTYPES = ("float32", "bfloat16")

SEED = {"seed": whole("Seed of parameters, data and sampling.", 0)}

MODEL = {
  "model.vocab_size": whole("Rows of the embedding; at least the tokenizer's tokens."),
  "model.hidden_size": whole("Width of the residual stream."),
  "model.hybrid_override_pattern": text(
    "A letter a block: M Mamba-2, E mixture of experts, * attention, - MLP.", empty=False
  ),
  "model.num_attention_heads": whole("Query heads.", optional=True),
  "model.num_key_value_heads": whole("Key and value heads; divides num_attention_heads.", optional=True),
  "model.head_dim": whole("Channels of an attention head.", optional=True),
  "model.mamba_num_heads": whole("Heads of a Mamba-2 block.", optional=True),
  "model.mamba_head_dim": whole("Channels of a Mamba-2 head.", optional=True),
  "model.ssm_state_size": whole("Numbers of state a Mamba-2 channel.", optional=True),
  "model.n_groups": whole("Groups of Mamba-2 heads that share B and C.", optional=True),
  "model.conv_kernel": whole("Taps of the causal convolution, in tokens.", optional=True),
  "model.use_conv_bias": flag("Whether the convolution has a bias.", optional=True),
  "model.chunk_size": whole("Tokens that the SSD scan takes at a time; speed alone.", optional=True),
  "model.time_step_min": number("Least dt at initialisation.", above=0, optional=True),
  "model.time_step_max": number("Largest dt at initialisation.", above=0, optional=True),
  "model.time_step_floor": number("Floor of dt at initialisation.", above=0, optional=True),
  "model.time_step_limit": several(
    "Clamp of dt: (least, largest).", number("dt", low=0, infinite=True), length=2, optional=True
  ),
  "model.n_routed_experts": whole("Experts that the router chooses among.", optional=True),
  "model.num_experts_per_tok": whole("Experts a token is sent to.", optional=True),
  "model.moe_intermediate_size": whole("Width of a routed expert.", optional=True),
  "model.moe_shared_expert_intermediate_size": whole("Width of the shared expert.", optional=True),
  "model.n_group": whole("Groups of experts of which the router first picks topk_group.", optional=True),
  "model.topk_group": whole("Groups of experts that a token may use.", optional=True),
  "model.norm_topk_prob": flag("Whether the chosen experts' weights sum to 1.", optional=True),
  "model.routed_scaling_factor": number("Factor of the routed experts' sum.", above=0, optional=True),
  "model.moe_latent_size": whole("Width in which experts work; None is hidden_size.", also=(None,), optional=True),
  "model.router_loss": flag("Whether a forward pass computes the balance loss; set by training.", optional=True),
  "model.intermediate_size": whole("Width of an MLP block.", optional=True),
  "model.layer_norm_epsilon": number("Epsilon of the RMS norms.", above=0, optional=True),
  "model.tie_word_embeddings": flag("Whether the head is the embedding.", optional=True),
  "model.initializer_range": number("Standard deviation of fresh weights.", above=0, optional=True),
  "model.rescale_prenorm_residual": flag("Whether output projections start smaller by sqrt(blocks).", optional=True),
  "model.dtype": word("Of activations and products.", DTYPES, optional=True),
  "model.param_dtype": word("Of parameters.", DTYPES, optional=True),
  "model.remat": flag("Whether the backward pass recomputes each block.", optional=True),
}

# Guard, a key of nemocascade.runtime.guards.GUARDS -> the quantity and unit of its threshold.
GUARDS = {
  "entropy_collapse": "Nats a token; fires below it.",
  "reward_collapse": "Share of the best average reward that is lost.",
  "length_explosion": "Length of completions, in units of the first steps'.",
  "sampler_mismatch": "Nats a token between sampler and trainer.",
  "uniform_teacher": "Share of tokens on which a teacher is nearly uniform.",
  "few_signals": "Share of groups whose verdicts differ; fires below it.",
  "disk_full": "Checkpoints that still fit on the disk; fires below it.",
}
SUPERVISION = {
  "max_nonfinite": whole("Updates in a row that are not finite, and so not applied, after which a stage stops."),
  "guards.window": whole("Steps of the guards' moving average."),
  **{f"guards.{name}.threshold": number(help, low=0) for name, help in GUARDS.items()},
  **{f"guards.{name}.action": word("What happens where it fires.", ("warn", "stop", "off")) for name in GUARDS},
}

SHARED = (
  MODEL
  | SUPERVISION
  | {
    "mesh.data": whole("Groups of devices that share the rows; -1 takes what mesh.expert leaves.", also=(-1,)),
    "mesh.expert": whole("Devices that share the experts; -1 takes what mesh.data leaves.", also=(-1,)),
    "tokenizer.path": text("tokenizer.json, tokenizer.model or a folder with one; empty trains one."),
    "tokenizer.vocab_size": whole("Tokens of a tokenizer that is trained."),
    "tokenizer.conversations": whole("Demonstrations of each domain that a tokenizer is trained on.", 0),
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
    "tasks": section("Generator -> fields of it that are not its defaults."),
    "tasks.*.sloppy_rate": number("Share of a demonstration's steps in the sloppy style.", low=0, high=1),
    "tasks.*.error_rate": number("Share of the sloppy steps that err.", low=0, high=1),
    "tasks.*.careful": text("Marker of a step in the careful style.", empty=False),
    "tasks.*.sloppy": text("Marker of a step in the sloppy style.", empty=False),
    "tasks.*.phrases": several("Fixed texts worth one token each.", text("a text", empty=False), unique=True),
    "tasks.math.terms": several(
      "Terms of a short and of a long problem.", whole("terms", 2, high=20), length=2, optional=True
    ),
    "tasks.math.long_share": number("Share of long problems.", low=0, high=1, optional=True),
    "tasks.math.largest_total": whole("Bound of every running total.", 9, optional=True),
    "tasks.long_context.documents": whole("Documents of a prompt.", high=32, optional=True),
    "tasks.long_context.teaching_documents": several(
      "Documents of a demonstration: least, most.", whole("documents", high=32), length=2, optional=True
    ),
    "tasks.long_context.teaching_full_share": number(
      "Share of demonstrations as long as a prompt.", low=0, high=1, optional=True
    ),
    "evaluation.prompts": whole("Held-out prompts of each domain.", high=100_000),
    "evaluation.completions": whole("Completions of each prompt at temperature 1."),
    "evaluation.batch": whole("Rows decoded together."),
    "evaluation.prompt_tokens": whole("Tokens of a prompt at most."),
    "evaluation.total_tokens": whole("Tokens of prompt, completion and tool responses at most."),
    "evaluation.long_prompt_tokens": whole("The same as prompt_tokens for long_domains."),
    "evaluation.long_total_tokens": whole("The same as total_tokens for long_domains."),
    "evaluation.long_domains": several("Domains with the long lengths.", text("a domain"), unique=True),
    "evaluation.long_batch": whole("Rows of long_domains decoded together."),
    "evaluation.greedy": several("Stages that are scored greedily too.", text("a stage"), unique=True),
    "sandbox.workers": whole("Programs that run at a time.", high=4096),
  }
)

STAGE = {
  "kind": word("What the stage trains by.", ("sft", "rl", "reward_model")),
  "init_from": text(
    "Where it starts: a checkpoint, in a cascade also a stage or 'previous'; empty draws fresh parameters."
  ),
  "steps": whole("Steps of the stage."),
  "save_every": whole("Steps between checkpoints."),
  "optimizer.peak_lr": number("Learning rate after warm-up.", above=0),
  "optimizer.warmup_steps": whole("Steps of linear warm-up.", 0),
  "optimizer.schedule": word("Decay after warm-up.", "nemocascade.step.optimizer:SCHEDULES"),
  "optimizer.final_fraction": number("Share of the peak rate at the last step.", low=0, high=1),
  "optimizer.b1": number("Adam's decay of the first moment.", low=0, below=1),
  "optimizer.b2": number("Adam's decay of the second moment.", low=0, below=1),
  "optimizer.eps": number("Adam's epsilon.", above=0),
  "optimizer.weight_decay": number("Decoupled weight decay of matrices.", low=0, high=1),
  "optimizer.clip_norm": number("Norm to which the gradient is clipped.", above=0),
  "optimizer.frozen": several(
    "Patterns of the paths of parameters that keep their values.", text("a pattern", empty=False)
  ),
}

BALANCE = {
  "router_balance.kind": word("How experts' loads are balanced.", ("frozen", "sign", "auxiliary", "both")),
  "router_balance.rate": number("Change of the router's bias a step, under sign and both.", low=0, high=1),
  "router_balance.weight": number("Weight of the balance loss, under auxiliary and both.", low=0),
}

SFT = BALANCE | {
  "conversations": section("Domain -> its demonstrations.", empty=False),
  "conversations.*": whole("Demonstrations of this domain.", 0),
  "non_thinking": number("Share of conversations without thoughts.", low=0, high=1),
  "rows": whole("Packed rows of a step."),
  "row_tokens": whole("Tokens of a row."),
}

REWARD_MODEL = {
  "pairs": whole("Pairs of answers of a step."),
  "row_tokens": whole("Tokens of prompt and answer; longer ones are cut."),
  "heldout_pairs": whole("Pairs that the accuracy is measured on; at least `pairs`."),
}

RL = BALANCE | {
  "mixture": section("Domain -> its share of the prompts.", empty=False),
  "mixture.*": number("Share of this domain, relative to the others'.", low=0),
  "rollout.prompts": whole("Prompts of a step."),
  "rollout.completions": whole("Completions of a prompt."),
  "rollout.prompt_tokens": whole("Tokens of a prompt at most."),
  "rollout.total_tokens": whole("Tokens of prompt, completion and tool responses at most."),
  "rollout.temperature": number("Sampling temperature.", above=0, high=100),
  "rollout.top_p": number("Share of the probability that is sampled from; 1 is all.", above=0, high=1),
  "packing.rows": whole("Rows of a step."),
  "packing.row_tokens": whole("Tokens of a row."),
  "packing.pieces": whole("Parts of the batch whose gradients are taken one after another."),
  "packing.shared_prompts": flag("Whether a prompt is prefilled once for all its completions."),
  "reward": word("verdict: the domain's; pairwise: a group's answers compared by the judge.", ("verdict", "pairwise")),
  "judge": text("The reward model's checkpoint; in a cascade empty, where the reward_model stage is the judge."),
  "advantage": word("What a token is paid.", "nemocascade.advantage:ADVANTAGES", own=True),
  "ratio": word("Of several updates a batch: how far the policy may move.", "nemocascade.step.loss:RATIOS", own=True),
  "correction": word("For the sampler's distance from the trainer.", "nemocascade.step.loss:CORRECTIONS", own=True),
  "aggregation": word("How tokens are averaged.", "nemocascade.step.loss:AGGREGATIONS", own=True),
  "kl": word("Estimator of the KL to where the stage started.", "nemocascade.step.loss:KLS", own=True),
  "kl_weight": number("Weight of that KL.", low=0),
  "entropy_weight": number("Weight of the entropy bonus.", low=0),
  "distillation": word("Distance from the teachers.", "nemocascade.step.loss:DISTILLATIONS", own=True),
  "distillation_weight": number("Weight of that distance.", low=0),
  "overlong": word("What an unfinished completion is paid.", "nemocascade.rollout.rewards:OVERLONG", own=True),
  "options": section("Function -> its settings; those not chosen cost nothing."),
  "options.*.clip": number("Bound of an advantage, in nats.", above=0),
  "options.*.alpha": number("Weight of the outcome's advantage.", low=0),
  "options.*.low": number("Lower bound of the ratio, or how far below 1.", low=0),
  "options.*.high": number("Upper bound of the ratio, or how far above 1.", above=0),
  "options.*.cap": number("Cap of the loss where the advantage is negative.", above=1),
  "options.*.eps": number("Added to a standard deviation.", above=0),
  "options.*.k": whole("Likeliest tokens of the teacher."),
  "options.*.tokens": whole("Last tokens over which the reward falls."),
  "options.*.*": number("Another setting of the function."),
  "updates": whole("Times that a batch is learned from; 1 is on policy."),
  "dynamic_filtering": flag("Whether groups whose verdicts are all equal are left out."),
  "refill_rounds": whole("Batches sampled at most to fill a step with informative groups.", high=100),
  "samples_every": whole("Steps between writes of samples.jsonl."),
  "samples": whole("Completions written each time.", 0),
  "teachers": section("Domain -> 'best', a finished stage of the cascade, or a checkpoint."),
  "teachers.*": text("The teacher of this domain.", empty=False),
  "teachers_in_memory": whole("Teachers kept on the devices."),
}

CASCADE = {
  "order": several("The stages in their order.", text("a stage", empty=False), empty=False, unique=True),
  "side_line": several("Stages that 'previous' skips.", text("a stage"), unique=True),
  "stages": section("Name -> the fields of a stage.", empty=False),
}

ABLATION = CASCADE | {
  "seeds": several("Seeds that are compared, each with its own student.", whole("a seed", 0), empty=False, unique=True),
  "student": text("The stage from which every arm starts.", empty=False),
  "teachers_of": section("Domain -> the stage whose score is its teacher's."),
  "teachers_of.*": text("A stage.", empty=False),
  "arms": section("Name -> the fields of an RL stage.", empty=False),
  "rate_of": section("Arm -> the arm whose peak_lr it has."),
  "rate_of.*": text("An arm.", empty=False),
  "budget.unit": word("What the arms' budgets are equal in.", ("steps", "tokens", "flops")),
  "budget.amount": number("The budget of an arm, in that unit.", above=0),
  "compared.domains": several("Domains that are scored.", text("a domain"), empty=False, unique=True),
  "compared.at": several("Steps that are scored on compared.prompts.", whole("a step")),
  "compared.prompts": whole("Held-out prompts of each domain, once each; at most evaluation.prompts."),
  "compared.full_at": several("Steps that are scored on all held-out prompts.", whole("a step")),
  "compared.full_completions": whole("Completions of each prompt there and at the end."),
  "compared.reach": number("Share of the gap at which an arm has come to its teacher.", above=0, high=1),
  "compared.pairs": several("Arms compared step by step: (ours, theirs).", several("a pair", text("an arm"), length=2)),
  "compared.ends": several(
    "Arms compared where each ends: (ours, theirs).", several("a pair", text("an arm"), length=2)
  ),
  "search.arms": several("Arms whose peak_lr is searched for.", text("an arm"), unique=True),
  "search.rates": several("Values of peak_lr that are tried.", number("a rate", above=0), empty=False),
  "search.steps": whole("Steps of a try."),
  "search.seeds": several("Seeds of the tries, none of them in seeds.", whole("a seed", 0), unique=True),
}

# Kind of config -> its own fields. A stage inside a cascade has only these, not the SHARED ones.
OWN = {
  "sft": STAGE | SFT, "rl": STAGE | RL, "reward_model": STAGE | REWARD_MODEL, "cascade": CASCADE, "ablation": ABLATION,
}  # fmt: skip
WHOLE = {kind: SEED | SHARED | own for kind, own in OWN.items()}
# An ablation has `seeds` instead of `seed`.
WHOLE["ablation"]["seed"] = dataclasses.replace(SEED["seed"], optional=True)
