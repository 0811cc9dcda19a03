"""What all stages at the published scale share: the model, its folder, evaluation, the sandbox.

Parameters and Adam's moments are fp32 (the report says nothing of them): at a weight of 0.02 bf16 has
steps of 1.2e-4, in which an update of 5e-5 or 3e-6 is lost. With gradients that is 16 bytes a
parameter, 7.4 GiB a chip on 64 chips. Products are bf16.
"""

from ml_collections import ConfigDict

from configs import guards
from configs.nano_30b import meshes, model

# A Hugging Face folder: the model that SFT starts from, and the tokenizer of every stage.
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
  c.tasks = {}  # Domain -> fields of it that are not as usual.
  c.evaluation = dict(
    prompts=128,
    completions=1,
    batch=512,
    prompt_tokens=4_096,
    total_tokens=49_152,  # paper.md 8 has up to 256K; these are scores between stages.
    long_prompt_tokens=32_768,  # paper.md 4.2: inputs of at most 32K.
    long_total_tokens=49_152,
    long_domains=("long_context",),
    long_batch=128,
    greedy=(),
  )
  c.sandbox = dict(workers=64)
  c.update(guards.fields())
  if smoke:  # The same stage with a small model, on what devices there are.
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
