"""Stage 6, long-context RL of 30B-A3B: questions about several documents.

See the Cascade 2 report (arXiv 2603.19220), section 4.6. No other domain is mixed in. Commands: if_rl.py.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage(
    "long_context_rl",
    arg,
    steps=30,  # Table 9. The text stops there too, because lengths grow.
    prompt_tokens=32_768,  # Inputs of at most 32K, 49K in all.
  )


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
