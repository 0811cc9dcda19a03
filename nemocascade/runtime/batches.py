"""The batches of an RL stage, each sampled when it is needed, or while the one before it is learned."""

import concurrent.futures

import jax
from ml_collections import ConfigDict

from nemocascade.report.metrics import Phases
from nemocascade.rollout.exact import Weights
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.resharding import for_sampling
from nemocascade.runtime.sampler import Sampled, sample
from nemocascade.types import TrainState


class Batches:
  """Samples the batch of each step, with the newest parameters or, at rollout.lag=1, with those of one update before.

  With a lag, `begin` samples the next batch in a thread, while this one is learned: the device is shared, and tools and
  verifiers run beside the update. Several devices must get their programs in one order, so the same batch is then
  sampled later, in `take`; so it is in a run with functions that only the main thread may call. Use it in a `with`.

  Args:
    key: the stage's random key.
  """

  def __init__(self, c: ConfigDict, parts: Parts, mixture: Mixture, key: jax.Array):
    self._c, self._parts, self._mixture, self._key = c, parts, mixture, key
    domains = [parts.domains[name] for name, share in c.mixture.items() if share]
    threads = all(domain.beside and (domain.turns == 1 or domain.in_threads) for domain in domains)
    self._ahead = bool(c.rollout.lag) and threads and parts.programs.mesh.size == 1
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._begun: concurrent.futures.Future[Sampled] | None = None
    self._cost: dict[str, float] = {}  # Of making the weights of the batch that was begun.

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown()

  def take(self, state: TrainState, step: int, phases: Phases) -> tuple[Sampled, dict[str, float]]:
    """(the batch of a step, metrics: of making its weights). `phases` is the step's timer."""
    if self._begun is not None:
      sampled, self._begun = self._begun.result(), None
      phases.end("rollout")
      return sampled, self._cost
    params = state.opt_state.before if self._c.rollout.lag else state.params
    weights, cost = for_sampling(self._parts.programs, params)
    if self._c.rollout.exact:
      weights = Weights(weights, params)
    return sample(self._c, self._parts, self._mixture, weights, self._key, step, phases), cost

  def begin(self, state: TrainState, step: int) -> None:
    """Begins the batch of the next step, if it is sampled with the parameters before this step's update.

    From now on the mixture belongs to the thread, until `take` has returned.
    """
    if self._ahead and step < self._c.steps:
      weights, self._cost = for_sampling(self._parts.programs, state.params, own=True)
      self._begun = self._pool.submit(
        sample, self._c, self._parts, self._mixture, weights, self._key, step, Phases()
      )  # fmt: skip
