"""What all stages of the tiny cascade share: the model, its tokenizer, evaluation, the sandbox.

Small in size, never in kind: the block kinds, the template, the verifiers and the steps are those
of 30B-A3B. Sizes from a feasibility study on two cores.
"""

from ml_collections import ConfigDict

from configs import guards
from nemocascade.errors import unknown

# Every domain, in the order of the report's columns.
DOMAINS = (
  "instruction", "math", "stem", "structured", "tools",
  "preference", "long_context", "code", "swe", "swe_agentic",
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
  if arg not in ("", "smoke"):
    raise unknown("config argument", arg, ("smoke",))
  c = ConfigDict()
  c.seed = 0

  c.model = dict(
    vocab_size=1024,  # At least the tokenizer's; rows beyond it are never used.
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

  c.mesh = dict(data=1, expert=1)  # Devices that share rows, and experts; data=-1 takes all there are.

  c.tokenizer = dict(
    path="",  # A tokenizer.json or tokenizer.model, or a folder with one; "" trains one.
    vocab_size=1024,  # 18 special, 256 bytes, the template's and domains' phrases, then words.
    conversations=200,  # a domain, whose text trains it.
  )

  c.domains = DOMAINS
  c.tasks = {}  # Domain -> fields of it that are not as usual: of its style (`sloppy_rate`), or its own.

  c.evaluation = dict(
    prompts=256,  # held out, a domain.
    completions=2,  # of each, at temperature 1: gaps of a tenth are to be told from noise.
    batch=256,  # rows that are decoded together.
    prompt_tokens=48,
    total_tokens=112,
    long_prompt_tokens=240,  # For the domains in `long_domains`.
    long_total_tokens=272,
    long_domains=("long_context",),
    long_batch=128,
    greedy=("sft", "swe_agentic_rl"),  # Stages that are scored greedily too, beside temperature 1.
  )

  c.sandbox = dict(workers=2)

  c.update(guards.fields())

  if arg == "smoke":
    c.model.hybrid_override_pattern = "M*E"  # Each kind once: nearly all of its time is compilation.
    c.evaluation.update(prompts=32, completions=1, batch=64, long_batch=64)
    c.tokenizer.conversations = 60
  return c


def stage(arg: str, **fields) -> ConfigDict:
  """One stage's own fields on top of the shared ones: what `get_config` of its file returns."""
  c = get_config(arg)
  c.update(ConfigDict(fields))
  return c
