"""Nemotron-3-Nano-30B-A3B. Nemotron-Cascade 2 trains it further without changing the architecture.

It has 31,577,940,288 parameters; 3,580,076,352 are active per token. Values and field names are those of the
published config.json on Hugging Face. The Nemotron-3-Nano report (arXiv 2512.20848) describes the model.
"""

from ml_collections import ConfigDict

from nemocascade.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
  if arg:
    raise UserError(f"unknown config argument {arg!r}: this config takes none")
  c = ConfigDict()
  c.model = dict(
    vocab_size=131072,
    hidden_size=2688,
    # 23 Mamba-2 blocks, 23 mixture-of-experts blocks, 6 attention blocks (5, 12, 19, 26, 33, 42).
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,  # No positional encoding: the config.json's rope_theta is not used.
    mamba_num_heads=64,
    mamba_head_dim=64,  # 64 heads x 64 = 4096 channels; the config.json's `expand` is not used.
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    use_conv_bias=True,
    chunk_size=128,
    time_step_min=0.001,  # These three are used only when parameters are initialized.
    time_step_max=0.1,
    time_step_floor=1e-4,
    time_step_limit=(0.0, float("inf")),  # No clamp, as in vLLM. transformers clamps at time_step_min.
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,  # The report's two shared experts of 1856, fused.
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=False,
    initializer_range=0.02,
    rescale_prenorm_residual=True,
    dtype="bfloat16",
    param_dtype="bfloat16",  # As in the checkpoint; A_log, D, dt_bias and the router are fp32.
    remat="block",  # A training step stores one residual per block and recomputes the rest.
    sequence_parallel=True,  # The chips of an expert group share a row where a batch has fewer rows than chips.
  )
  return c
