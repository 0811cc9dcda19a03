"""Stage 8, agentless SWE RL of 30B-A3B: SEARCH/REPLACE edits that repair a repository's code.

See the Cascade 2 report (arXiv 2603.19220), section 4.8. Commands: if_rl.py. In the report a judge model,
GPT-OSS-120B, gives the reward, and the loss of prompts without a reward above 0.5 is masked. Here tests give it,
as 0 or 1, and dynamic filtering leaves such prompts out. The stage is `swe_rl` in configs/tiny.
"""

from ml_collections import ConfigDict

from configs.nano_30b import base, rl


def stage(arg: str = "") -> ConfigDict:
  return rl.stage(
    "swe_rl",
    arg,
    steps=45,  # Section 4.8: converges in 40 to 50.
    total_tokens=98_304,  # Section 4.8.
    prompt_tokens=32_768,  # Our choice: five files and the issue fit in it. The total is published.
  )


def get_config(arg: str = "") -> ConfigDict:
  return base.stage(arg, stage(arg))
