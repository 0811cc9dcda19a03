"""Fields that all stages of the tiny cascade share: model, tokenizer, evaluation, sandbox.

Only sizes differ from 30B-A3B: the block kinds, the chat template, the verifiers and the training steps are
the same. The sizes were chosen by trials on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import recipe
from nemocascade.errors import unknown

FINAL_FRACTION = 0.02  # Share of the peak learning rate at the end of SFT and of the reward model's training.


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "smoke"):
    raise unknown("config argument", arg, ("smoke",))
  c = recipe.shared()

  c.model = dict(
    vocab_size=1024,  # At least the tokenizer's size; embedding rows beyond that are unused.
    hidden_size=64,
    hybrid_override_pattern="MEM*E",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    initializer_range=0.05,  # Wider than the 30B's 0.02: hidden_size is 42 times smaller.
  )

  c.mesh = dict(data=1, expert=1)  # Mesh axes, in devices; data=-1 takes all devices.

  c.tokenizer = dict(
    path="",  # A tokenizer.json or tokenizer.model, or a folder with one; "" trains one.
    vocab_size=1024,  # 18 special tokens, 256 bytes, fixed phrases of template and domains, then words.
    conversations=200,  # Conversations per domain whose text trains the tokenizer.
  )

  c.evaluation.update(
    prompts=256,  # Held-out prompts per domain.
    completions=2,  # Per prompt, at temperature 1. Enough to resolve score differences of 0.1.
    batch=256,  # Rows decoded together.
    prompt_tokens=48,
    total_tokens=112,
    long_prompt_tokens=240,  # For the domains in `long_domains`.
    long_total_tokens=272,
    greedy=("sft", "swe_agentic_rl"),  # Stages also scored with greedy decoding.
  )

  c.sandbox = dict(workers=2)

  if arg == "smoke":
    shrink_model(c)
    c.evaluation.update(prompts=32, completions=1, batch=64, long_batch=64)
  return c


def shrink_model(c: ConfigDict) -> None:
  """Changes model and tokenizer to those of the `:smoke` forms."""
  c.model.hybrid_override_pattern = "M*E"  # Each block kind once; a smoke run mostly compiles.
  c.tokenizer.conversations = 60


def stage(arg: str, **fields) -> ConfigDict:
  """The shared fields, updated with one stage's own. `get_config` of a stage file returns it."""
  c = get_config(arg)
  c.update(ConfigDict(fields))
  if fields.get("kind") == "rl":
    recipe.follow_rollout(c)
  return c
