"""What a stage holds on each chip beside the arguments of a program, and on each host: sizes from shapes alone."""

import dataclasses

from ml_collections import ConfigDict

from nemocascade.mesh import device_bytes
from nemocascade.runtime import checks, objective, signals, traced
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.sampler import ahead
from nemocascade.types import TrainState

TOKEN = 10  # Bytes of a token that SFT reads ahead: id, document, and its place in the order.
SAMPLE = 4  # Bytes of a token of a completion that its process reads back.


@dataclasses.dataclass(frozen=True)
class Footprint:
  """The sizes of a stage, in bytes.

  Attributes:
    chip: what stays on a device while the stage runs -> bytes of a device.
    host: what is in a host's memory -> bytes of a host.
  """

  chip: dict[str, int]
  host: dict[str, int]

  def resident(self, arguments: tuple[str, ...]) -> int:
    """Bytes of a device that are not among the arguments of a program.

    Args:
      arguments: the names in `chip` of what the program is given.
    """
    return sum(size for name, size in self.chip.items() if name not in arguments)


def footprint(c: ConfigDict, programs: Programs, state: TrainState, devices: int) -> Footprint:
  """The footprint of a stage.

  Args:
    state: the stage's abstract state.
    devices: of a host.
  """
  of_host = lambda tree: devices * device_bytes(tree)  # noqa: E731
  chip = {"params": device_bytes(state.params), "moments": device_bytes(state.opt_state)}
  host = {"saving": of_host(state)}  # A checkpoint is copied to the host before it is written.
  if c.kind == "sft":
    host["look_ahead"] = TOKEN * c.look_ahead * devices // programs.mesh.size
  if c.kind == "rl":
    r = c.rollout
    if ahead(c, programs.mesh):  # The next batch is decoded beside the update.
      chip["sampler"] = device_bytes(programs.sampling_template)
      chip["decoding"] = device_bytes(traced.of_rollout(c, programs))
    host["samples"] = SAMPLE * r.prompts * r.completions * r.total_tokens * devices // programs.mesh.size
    checkpoints = len(set(c.teachers.values())) if objective.taught(c) else 0
    host["teachers"] = min(c.teachers_in_memory, checkpoints) * of_host(programs.template)
    if signals.by_states(c):
      chip["heads"] = device_bytes(programs.heads_template(checkpoints))
    if c.kl_weight:
      host["reference"] = of_host(programs.template)
    if checks.judged(c, c):
      host["judge"] = of_host(programs.reward_template)
  return Footprint(chip, host)
