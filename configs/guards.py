"""Thresholds at which a training stage warns or stops; the same at every scale.

docs/objectives.md gives the reasons. The action of each guard is warn | stop | off.
"""

from ml_collections import ConfigDict


def fields() -> ConfigDict:
  c = ConfigDict()
  # A non-finite update is not applied. The stage stops after this many in a row.
  c.max_nonfinite = 3
  c.guards = dict(
    window=10,  # Steps of the moving average. Guards wait for this many steps.
    entropy_collapse=dict(action="warn", threshold=0.01),  # Entropy, nats per token.
    reward_collapse=dict(action="warn", threshold=0.5),  # Fall of the average, as a share of its best.
    length_explosion=dict(action="warn", threshold=3.0),  # Completion length over that of the first steps.
    sampler_mismatch=dict(action="warn", threshold=0.05),  # Nats per token.
    uniform_teacher=dict(action="warn", threshold=0.5),  # Share of tokens on which a teacher is uniform.
    few_signals=dict(action="warn", threshold=0.05),  # Share of groups whose verdicts differ.
    disk_full=dict(action="stop", threshold=2.0),  # Checkpoints that still fit on the disk.
  )
  return c
