"""Stage 1, SFT of 30B-A3B (Cascade 2 report, arXiv 2603.19220, section 3.1 and table 7).

  python -m experiments.compile --config=configs/nano_30b/sft.py --topology=v5p:4x4x4
  python -m experiments.sft --config=configs/nano_30b/sft.py --workdir=DIR
  python -m experiments.sft --config=configs/nano_30b/sft.py:smoke --workdir=DIR

A step has 64 rows of 256K tokens, as in the report. A row lies over the devices of an expert group. 8 rows are processed
at a time on 64 v5p chips, 16 on the slices of v6e and tpu7x, and all on 512 v5p chips. On v5e a row is as long as one chip
holds (meshes.py). Longer conversations are split.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.nano_30b import base, meshes
from configs.tiny import sft as tiny

# A folder with one folder of JSONL or Parquet files for each source of BLEND. The released data
# (nvidia/Nemotron-Cascade-2-SFT-Data) has eight folders; all but code are in it.
DATA = "Nemotron-Cascade-2-SFT-Data"
# Source -> conversations of an epoch: the report's blend (section 3.2), 26.6M in all.
BLEND = dict(
  math_tool=1_800_000,  # With calls of Python.
  math=1_900_000,
  math_genselect=676_000,
  proof_generation=410_000,
  proof_verification=400_000,
  code_python=1_900_000,
  code_cpp=1_000_000,
  code_tool=1_300_000,
  scientific_code=1_100_000,
  science=1_400_000,
  science_nano3=1_300_000,
  long_context=160_000,  # Of 128K tokens on average.
  long_context_chatqa2=74_000,
  chat=4_900_000,
  chat_non_thinking=372_000,
  multi_turn_chat=700_000,
  chat_nano3=4_600_000,
  instruction=230_000,
  instruction_non_thinking=64_000,
  instruction_nano3=497_000,
  safety=4_000,
  conversational_agent=822_000,
  swe_agentic=125_000,
  swe_agentless=389_000,
  terminal_agent=490_000,
)


def stage(arg: str = "") -> ConfigDict:
  slice_, smoke = meshes.words(arg)
  c = recipe.sft()
  c.sources = {name: dict(path=f"{DATA}/{name}", count=count) for name, count in BLEND.items()}
  c.long_documents = "split"
  c.look_ahead = 2**25  # 340 MB on a host that runs all streams.
  c.streams = 16  # Hosts of 64 v5p chips. Of more hosts, several read the same stream.
  c.rows = meshes.SLICES[slice_]["rows"]  # 64 on all slices but v5e's.
  c.row_tokens = meshes.SLICES[slice_]["row_tokens"]
  c.pieces = meshes.SLICES[slice_].get("pieces", 1)
  c.steps = 40_000  # Length of the schedule. The report stops at 33,000, about 1.5 epochs.
  c.optimizer.update(
    peak_lr=5e-5,
    warmup_steps=200,
    final_fraction=0.1,  # The rate ends at 5e-6.
    b2=0.98,
    weight_decay=0.1,
  )
  c.router_balance.kind = "both"  # Not published for Cascade 2; as in Nano-3's SFT (arXiv 2512.20848).
  c.save_every = 500
  if smoke:
    small = tiny.stage("smoke")
    c.sources = small.sources
    c.look_ahead, c.streams = 2**20, 2
    c.rows, c.row_tokens, c.pieces, c.steps, c.save_every = 8, small.row_tokens, 1, 4, 2
    # The check of teachers refuses near-uniform models.
    c.optimizer.update(peak_lr=5e-3, warmup_steps=small.optimizer.warmup_steps)
  else:
    c.init_from = f"hf:{base.FOLDER}"
    c.data_workers = 16
  return c


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
