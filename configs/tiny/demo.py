"""A cascade of 214 s of CPU time, in which every stage visibly learns.

  python -m experiments.cascade --config=configs/tiny/demo.py --workdir=runs/demo

    sft ─┬─ if_rl                  the teacher: GRPO on instructions
         └─ mopd ── stem_rl        the model: distilled from the teacher, then GRPO on questions about facts

SFT learns three domains from demonstrations most of whose steps are sloppy. if_rl learns by GRPO to follow
instructions. mopd starts from the SFT checkpoint and learns the same from if_rl, token by token. stem_rl then trains
on the questions alone. No RL stage trains on `structured`: it is the control, whose score should stay.
"""

from ml_collections import ConfigDict

from configs import recipe
from configs.tiny import base, mopd, rl, sft

DOMAINS = ("instruction", "stem", "structured")
TOKENS = 96  # A prompt and its completion have at most this many. Rollouts and evaluation share one compiled sampler.


def get_config(arg: str = "") -> ConfigDict:
  c = base.get_config(arg)
  c.about = (
    "SFT learns three domains from demonstrations, most of which are sloppy on purpose, so that reinforcement learning"
    " has something to mend. No later stage trains on the domain structured: it is the control, whose score should stay."
  )
  c.domains = recipe.generated(*DOMAINS)
  c.tokenizer.vocab_size = c.model.vocab_size = 512
  c.evaluation.update(recipe.PLAIN | dict(total_tokens=TOKENS))
  c.order = ("sft", "if_rl", "mopd", "stem_rl")
  c.side_line = ("if_rl",)
  c.stages = dict(
    sft=supervised(arg), if_rl=reinforced(arg, "instruction"), mopd=distilled(arg), stem_rl=questioned(arg)
  )
  return c


def supervised(arg: str) -> ConfigDict:
  c = sft.stage(arg)
  if arg == "smoke":
    c.sources = recipe.conversations(**dict.fromkeys(DOMAINS, 60))
    return c
  c.sources = recipe.conversations(instruction=4000, stem=3000, structured=2000)
  c.update(rows=16, pieces=2, steps=480, save_every=480)
  return c


def reinforced(arg: str, domain: str) -> ConfigDict:
  """GRPO on the prompts of one domain."""
  c = rl.fields()
  c.mixture = {domain: 1.0}
  if arg == "smoke":
    rl.shrink(c)
  return short(c, arg, steps=20)


def distilled(arg: str) -> ConfigDict:
  c = short(mopd.stage(arg), arg, steps=24)
  c.init_from = "sft"
  c.mixture = ConfigDict(dict(instruction=1.0))
  c.teachers = ConfigDict(dict(instruction="if_rl"))
  c.optimizer.peak_lr = 1e-3  # At 2e-3 the score of `structured` fell by 0.08.
  return c


def questioned(arg: str) -> ConfigDict:
  c = reinforced(arg, "stem")
  c.optimizer.peak_lr = 5e-4  # At 1e-3 the score of `structured` fell by 0.07.
  return c


def short(c: ConfigDict, arg: str, steps: int) -> ConfigDict:
  """The stage with `steps` steps, in the shapes that all stages of the demo share."""
  c.rollout.total_tokens = TOKENS
  if arg != "smoke":
    c.update(steps=steps, save_every=steps, samples_every=steps)
  return c
