"""How far the trainer is from the sampler on a batch: sums that the parts of a batch add up, and metrics of them.

Both give log-probabilities of the same tokens under the same parameters, so every difference is one of programs,
dtypes or routing. The numbers are those of the first pass over the batch, and cost no pass of their own.
"""

import jax
import jax.numpy as jnp

from nemocascade.segments import counted_before, document_mean
from nemocascade.step.loss import bounded_exp, k3
from nemocascade.types import Metrics, Routing

FAR = 2.0  # A completion is far off if its tokens' probabilities differ by more than this factor on average.
AGREEMENT = "expert/agreement"
PLACES = (0, 64, 512, 4096, 32768)  # The first learned token of each part of a completion that has its own mean.


def sums(gap_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> Metrics:
  """Sums over the learned tokens and completions of a part of the batch; fp32 scalars.

  Args:
    gap_BT: log pi_train - log pi_sampler in nats, 0 on tokens that are not learned.
    mask_BT: bool, the learned tokens.
  """
  total = lambda x_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0), dtype=jnp.float32)
  place_BT, error_BT, weight_BT = counted_before(mask_BT, segment_ids_BT), jnp.abs(gap_BT), bounded_exp(gap_BT)
  first_BT = mask_BT & (place_BT == 0)  # Stands for its completion.
  far_BT = document_mean(bounded_exp(error_BT), mask_BT, segment_ids_BT) > FAR
  found = {
    "tokens": total(mask_BT),
    "error": total(error_BT),
    "kl": total(k3(jnp.zeros_like(gap_BT), gap_BT)),
    "weight": total(weight_BT),
    "weight_squared": total(jnp.square(weight_BT)),
    "completions": total(first_BT),
    "far": total(first_BT & far_BT),
  }
  for start, end in _parts(mask_BT.shape[1]):
    here_BT = mask_BT & (place_BT >= start) & (place_BT < end)
    found |= {f"tokens_{start}": total(here_BT), f"error_{start}": total(jnp.where(here_BT, error_BT, 0.0))}
  return found


def _parts(T: int) -> list[tuple[int, int]]:
  """The parts of completions of at most T tokens: (first place, end)."""
  starts = [start for start in PLACES if start < T]
  return list(zip(starts, [*starts[1:], T], strict=True))


def metrics(of_batch: Metrics, largest: jax.Array, routing: Routing | None) -> Metrics:
  """Metrics of a whole batch; each is 0 where there is nothing to measure.

  policy/sampler_error: the mean of |log pi_train - log pi_sampler|; sampler_error/from_<n> is that of learned tokens
    from the n-th of their completion to the next such bound.
  policy/sampler_error_max: the largest.
  policy/sampler_kl: KL(sampler || trainer), by the estimator k3.
  policy/sampler_ess: the effective sample size of the weights pi_train / pi_sampler, as a share of the tokens (Kong,
    1992): 1 if all weights are equal.
  policy/sampler_far: the share of completions whose mean of exp |log pi_train - log pi_sampler| is above FAR
    (NeMo-RL's multiplicative probability error of a sequence).
  expert/agreement: the share of the sampler's recorded choices of experts that the trainer's routers make too.

  Args:
    of_batch: the result of `sums`, added up.
    largest: the largest |gap|.
  """
  share = lambda part, whole: part / jnp.maximum(whole, 1.0)
  s = of_batch
  found = {
    "policy/sampler_error": share(s["error"], s["tokens"]),
    "policy/sampler_error_max": largest,
    "policy/sampler_kl": share(s["kl"], s["tokens"]),
    # Divided one after the other, because the product of the two sums may overflow.
    "policy/sampler_ess": share(s["weight"], s["tokens"]) * s["weight"] / jnp.maximum(s["weight_squared"], 1e-30),
    "policy/sampler_far": share(s["far"], s["completions"]),
  }
  starts = [name.removeprefix("tokens_") for name in s if name.startswith("tokens_")]
  found |= {f"sampler_error/from_{n}": share(s[f"error_{n}"], s[f"tokens_{n}"]) for n in starts}
  if routing is not None and routing.agreed_L is not None and routing.recorded_L is not None:
    found[AGREEMENT] = share(jnp.sum(routing.agreed_L), jnp.sum(routing.recorded_L))
  return found
