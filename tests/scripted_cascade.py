"""A cascade whose stages train nothing: a script gives the scores of each prompt after each of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict

from configs.recipe import generated
from configs.tiny import cascade as config
from experiments import cascade
from nemocascade.evaluate.suites import DomainScore
from nemocascade.runtime.outcome import Outcome
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.teachers import Probe
from nemocascade.runtime.text import Text

PROMPTS = 64
DOMAINS = ("instruction", "math", "code", "swe")
LINE = ("sft", "if_rl", "multi_domain_rl", "mopd", "code_rl", "swe_rl")


def cascade_config(**gates) -> ConfigDict:
  """The smoke cascade's stages of LINE, without a judge; `gates` are those of some stages."""
  c = config.get_config("smoke")
  c.domains = generated(*DOMAINS)
  c.order, c.side_line, c.recovery = LINE, (), "mopd"
  c.stages = {name: c.stages[name] for name in LINE}
  c.evaluation.greedy = ()
  c.stages.multi_domain_rl.mixture = {"math": 1.0}
  c.stages.mopd.mixture = {"math": 0.5, "instruction": 0.5}
  c.stages.mopd.teachers = {"math": "best", "instruction": "best"}
  for name, of in gates.items():
    c.stages[name].gates = ConfigDict(of)
  return c


def score(share: float) -> DomainScore:
  """Of PROMPTS prompts the first `share` have the score 1, the others 0."""
  of_prompts = tuple(float(i < round(share * PROMPTS)) for i in range(PROMPTS))
  mean = float(np.mean(of_prompts))
  return DomainScore(mean, mean, mean, mean, PROMPTS, 0, 0, 0, of_prompts)


class Script:
  """Replaces what trains and scores in experiments.cascade.

  Attributes:
    runs: (stage, the stage whose checkpoint it started from, steps, domain -> stage that teaches it), in order.
    scores: stage -> {domain: share of solved prompts}; 0.5 where nothing is said.
  """

  def __init__(self, monkeypatch, **scores):
    self.runs, self.scores = [], scores
    parts = Parts(SimpleNamespace(score=None), Text(None), {})
    heldout = SimpleNamespace(rows={}, evaluate=self.evaluate)
    of_teachers = lambda programs, tokenizer, found, *_: {t.domain: t.stage for t in found}  # noqa: E731
    for name, value in dict(
      train=self.train, gather=of_teachers, check_programs=lambda *_: None, draw_heldout=lambda *_: heldout,
      probe_tokens=lambda *_: None, take_probe=lambda *_: Probe(((1, 2),), ((0.0, -1.0),), 1.0),
    ).items():  # fmt: skip
      monkeypatch.setattr(cascade, name, value)
    monkeypatch.setattr(cascade.parts, "build", lambda *_: parts)
    monkeypatch.setattr(cascade.pages, "write", lambda _: None)

  def train(self, stage, stage_dir, p, heldout, init, teachers):
    self.runs.append((stage_dir.name, Path(init).parts[-3] if init else "", stage.steps, teachers))
    checkpoint = stage_dir / "checkpoints" / str(stage.steps)
    (checkpoint / "params").mkdir(parents=True, exist_ok=True)
    return Outcome(stage_dir.name, str(checkpoint), stage.steps, 1, 1.0)

  def evaluate(self, p, params, *, temperature, completions=1):
    of = self.scores.get(params, {})
    return {domain: score(of.get(domain, 0.5)) for domain in DOMAINS}

  @property
  def stages(self) -> list[str]:
    """The stages that were trained, in order."""
    return [name for name, *_ in self.runs]
