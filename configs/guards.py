"""What guards a stage at every scale: when it says that it is going wrong, and when it ends.

experiments/OBJECTIVES.md has the reasons. Each guard has an action: warn | stop | off.
"""

from ml_collections import ConfigDict


def fields() -> ConfigDict:
  c = ConfigDict()
  # Updates in a row that are not applied because they are not finite; then the stage stops.
  c.max_nonfinite = 3
  c.guards = dict(
    window=10,  # Steps of the moving average; nothing is judged before so many.
    entropy_collapse=dict(action="warn", threshold=0.01),  # Nats a token.
    reward_collapse=dict(action="warn", threshold=0.5),  # Share of the best average that is lost.
    length_explosion=dict(action="warn", threshold=3.0),  # In units of the first steps' length.
    sampler_mismatch=dict(action="warn", threshold=0.05),  # Nats a token.
    uniform_teacher=dict(action="warn", threshold=0.5),  # Share of tokens.
    few_signals=dict(action="warn", threshold=0.05),  # Share of groups.
    disk_full=dict(action="stop", threshold=2.0),  # Checkpoints that still fit.
  )
  return c
