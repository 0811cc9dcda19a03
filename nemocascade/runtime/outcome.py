"""What a stage has cost so far, and what it returns at its end."""

import dataclasses
import sys

import jax

from nemocascade.rollout.samples import Samples
from nemocascade.types import Params


@dataclasses.dataclass(frozen=True)
class Spent:
  """Tokens that an RL stage has processed so far, by the kind of processing."""

  sampled: int = 0  # Decoded one at a time.
  prefilled: int = 0  # Prompts, once each.
  scored: int = 0  # By a teacher or a reference.
  trained: int = 0  # Forward and backward. Samples with no token to learn are not in a row.

  def plus(self, **more: int) -> "Spent":
    return dataclasses.replace(self, **{name: getattr(self, name) + n for name, n in more.items()})

  def __add__(self, other: "Spent") -> "Spent":
    return self.plus(**dataclasses.asdict(other))

  def minus(self, other: "Spent") -> "Spent":
    return self.plus(**{name: -n for name, n in dataclasses.asdict(other).items()})

  def plus_rollout(self, samples: Samples) -> "Spent":
    given_Q = (samples.length_QG - samples.sampled_QG)[:, 0]
    return self.plus(sampled=int(samples.sampled_QG.sum()), prefilled=int(given_Q.sum()))

  def flops(self, matmul_params: int) -> int:
    """FLOPs: 2 per parameter and token forward, 6 with the backward pass.

    Products of the attention and the scan themselves are left out; they are few at these lengths.

    Args:
      matmul_params: the result of model.size.matmul_params for the model.
    """
    return matmul_params * (2 * (self.sampled + self.prefilled + self.scored) + 6 * self.trained)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a finished stage."""

  params: Params
  checkpoint: str
  steps: int
  tokens: int  # Trained on or sampled, all steps.
  wall_s: float  # Seconds in this process. The caller adds those before a resumption.


def announce(outcome: Outcome) -> None:
  """Prints where a finished stage's checkpoint is, the CKPT of the next command; only in the first process."""
  if jax.process_index() == 0:
    print(f"{outcome.steps} steps done; checkpoint: {outcome.checkpoint}", file=sys.stderr)
