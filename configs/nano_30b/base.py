"""Fields that all stages at the published scale share: model, tokenizer, domains, evaluation, sandbox.

The Cascade 2 report is arXiv 2603.19220; its sections and tables are named beside the numbers.

Parameters and Adam's moments are fp32. The report does not state their dtype. Near a weight of 0.02, bf16
values are 1.2e-4 apart, so updates of 5e-5 or 3e-6 would be lost. Parameters, moments and gradients take 16
bytes per parameter: 7.4 GiB per chip on 64 chips. Matrix products are bf16.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import meshes, model
from configs.tiny import base as tiny

# A Hugging Face folder. SFT starts from its model, and every stage uses its tokenizer.
FOLDER = "Nemotron-3-Nano-30B-A3B-Base"

# Domain -> the files of its prompts. Of a file with the rows of several domains each takes those that its verifier
# judges. docs/domains.md says which of the released rows no verifier here can judge.
DATA = "Nemotron-Cascade-2-RL-data"  # The folder of nvidia/Nemotron-Cascade-2-RL-data.
ROWS = dict(
  instruction=f"{DATA}/IF-RL/*.jsonl",
  math=f"{DATA}/MOPD/*.jsonl",
  stem=f"{DATA}/multi-domain-RL/*.jsonl",
  structured=f"{DATA}/multi-domain-RL/*.jsonl",
  tools=f"{DATA}/multi-domain-RL/*.jsonl",
  preference="rlhf/*.jsonl",  # This and the next two are not released.
  long_context="long_context/*.jsonl",
  code="code/*.jsonl",
  swe=f"{DATA}/SWE-RL/*.jsonl",
  swe_agentic=f"{DATA}/SWE-RL/*.jsonl",
)
TURNS = dict(swe_agentic=200)  # Domain -> most turns of an episode (section 4.8). Those of `tools` are not published.


def get_config(arg: str = "") -> ConfigDict:
  slice_, smoke = meshes.words(arg)
  c = recipe.shared()
  c.update(model.get_config())
  c.model.param_dtype = "float32"
  c.mesh = meshes.mesh(slice_)
  if not smoke:
    c.domains = {name: dict(rows=rows) for name, rows in ROWS.items()}
    for name, turns in TURNS.items():
      c.domains[name].max_turns = turns
  c.tokenizer = dict(path=FOLDER, vocab_size=c.model.vocab_size, conversations=0)
  c.evaluation.update(
    prompts=128,
    completions=1,
    batch=512,
    prompt_tokens=4_096,
    total_tokens=49_152,  # The report evaluates with up to 256K (appendix A).
    long_prompt_tokens=32_768,  # The report's long-context inputs have at most 32K tokens (section 4.6).
    long_total_tokens=49_152,
  )
  c.sandbox = dict(workers=64)
  if smoke:
    shrink(c)
  return c


def stage(arg: str, fields: ConfigDict) -> ConfigDict:
  """The shared fields, updated with one stage's own. `get_config` of a stage file returns it."""
  c = get_config(arg)
  c.update(fields)
  return c


def shrink(c: ConfigDict) -> None:
  """Changes `c` to the sizes of the tiny scale, on all devices of this machine."""
  small = tiny.get_config("smoke")
  del small.model.initializer_range, small.evaluation.greedy
  c.model.update(small.model)
  c.model.update(hybrid_override_pattern="M*EME", n_routed_experts=8)
  c.mesh.expert = small.mesh.expert  # mesh.data is -1: all devices.
  c.tokenizer = small.tokenizer
  c.evaluation.update(small.evaluation)
  c.sandbox = small.sandbox
