"""Stage 3, multi-domain RL of 30B-A3B: STEM questions, tool calls, structured output.

See the Cascade 2 report (arXiv 2603.19220), section 4.3. Commands: if_rl.py.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage(
    "multi_domain_rl",
    arg,
    mixture=dict(stem=0.55, tools=0.3, structured=0.15),  # Section 4.3.
    steps=70,  # Table 8.
  )


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
