"""Fields that all stages at the published scale share: model, tokenizer, evaluation, sandbox.

Parameters and Adam's moments are fp32. The Cascade 2 report (arXiv 2603.19220) does not state their
dtype. Near a weight of 0.02, bf16 values are 1.2e-4 apart, so updates of 5e-5 or 3e-6 would be lost.
Parameters, moments and gradients take 16 bytes per parameter: 7.4 GiB per chip on 64 chips. Matrix
products are bf16.
"""

from ml_collections import ConfigDict

from configs import guards
from configs.nano_30b import meshes, model

# A Hugging Face folder. SFT starts from its model, and every stage uses its tokenizer.
FOLDER = "Nemotron-3-Nano-30B-A3B-Base"

DOMAINS = (
  "instruction", "math", "stem", "structured", "tools",
  "preference", "long_context", "code", "swe", "swe_agentic",
)  # fmt: skip


def get_config(slice_: str, smoke: bool) -> ConfigDict:
  c = ConfigDict()
  c.seed = 0
  c.model = model.get_config().model
  c.model.param_dtype = "float32"
  c.mesh = meshes.mesh(slice_)
  c.tokenizer = dict(path=FOLDER, vocab_size=131072, conversations=0)
  c.domains = DOMAINS
  c.tasks = {}  # Domain -> its fields that differ from the defaults.
  c.evaluation = dict(
    prompts=128,
    completions=1,
    batch=512,
    prompt_tokens=4_096,
    total_tokens=49_152,  # The report evaluates with up to 256K (appendix A).
    long_prompt_tokens=32_768,  # The report's long-context inputs have at most 32K tokens (section 4.6).
    long_total_tokens=49_152,
    long_domains=("long_context",),
    long_batch=128,
    greedy=(),
  )
  c.sandbox = dict(workers=64)
  c.update(guards.fields())
  if smoke:  # The same stage with a small model, on all devices of this machine.
    c.model.update(
      vocab_size=1024, hidden_size=64, hybrid_override_pattern="M*EME", num_attention_heads=4, head_dim=16,
      mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16,
      n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
    )  # fmt: skip
    c.mesh = dict(data=-1, expert=1)
    c.tokenizer = dict(path="", vocab_size=1024, conversations=60)
    c.evaluation.update(
      prompts=32, batch=64, prompt_tokens=48, total_tokens=112,
      long_prompt_tokens=240, long_total_tokens=272, long_batch=64,
    )  # fmt: skip
    c.sandbox.workers = 2
  return c
