"""The batches of an RL stage, each sampled when it is needed, or while the one before it is learned."""

import concurrent.futures
import threading
from typing import Any

import jax
from ml_collections import ConfigDict

from nemocascade.domains.domain import Domain
from nemocascade.domains.own import OwnEnvironment
from nemocascade.report.metrics import Phases
from nemocascade.rollout.exact import Weights
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.resharding import for_sampling
from nemocascade.runtime.sampler import Sampled, ahead, sample
from nemocascade.types import Params, TrainState

LEAVE_S = 10.0  # Time that a batch which nobody needs any more has to end.


class _NotNeeded(Exception):
  """Ends the sampling of a batch that the stage does not wait for any more."""


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
    threads = all(_in_threads(domain) for domain in domains)
    self._ahead = threads and ahead(c, parts.programs.mesh)
    self._thread: threading.Thread | None = None
    self._left = threading.Event()  # Set when the stage ends.
    self._begun: concurrent.futures.Future[Sampled] | None = None
    self._cost: dict[str, float] = {}  # Of making the weights of the batch that was begun.

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the batch that was begun, if the stage ends before it is needed. A verifier that hangs is left behind."""
    self._left.set()
    if self._thread is not None:
      self._thread.join(LEAVE_S)

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
      self._begun = concurrent.futures.Future()
      # A daemon, so that what hangs in it does not keep the process from ending.
      self._thread = threading.Thread(target=self._sample, args=(self._begun, weights, step), daemon=True)
      self._thread.start()

  def _sample(self, result: concurrent.futures.Future, weights: Params, step: int) -> None:
    try:
      args = self._c, self._parts, self._mixture, weights, self._key, step, Phases()
      result.set_result(sample(*args, exchange=self._exchange))
    except BaseException as error:  # noqa: BLE001  `take` raises it.
      result.set_exception(error)

  def _exchange(self, value: Any, what: str) -> list:
    """The exchange of a run in one process, which ends the batch if it is not needed any more."""
    if self._left.is_set():
      raise _NotNeeded
    return exchange(value, what)


def _in_threads(domain: Domain) -> bool:
  """Whether another thread than the main one may sample and judge the domain's episodes."""
  own = isinstance(domain.environment, OwnEnvironment)  # Its time limit needs the main thread.
  return domain.beside and not own and (domain.turns == 1 or domain.in_threads)
