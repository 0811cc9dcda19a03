"""Load balancing of the experts (none, sign update of the router's bias, auxiliary loss), and its metrics."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.errors import UserError
from nemocascade.field_check import check_values
from nemocascade.types import Metrics, Params, Routing

# (params, change_LE) -> params, with change_LE added to the routers' e_score_correction_bias.
AddToBias = Callable[[Params, jax.Array], Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterBalance:
  """How the loads of the experts are balanced.

  Kinds:
    frozen: no balancing; the router's bias keeps its values.
    sign: after each step the bias of an expert falls by `rate` if its load was above the mean, and rises
      by `rate` if it was below (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    auxiliary: `weight` times the balance loss of model/moe.py is added to the training loss. The balance
      loss is summed over blocks and averaged over real tokens. The bias keeps its values.
    both: sign and auxiliary.
  Under every kind the optimizer leaves the bias alone. NVIDIA's SFT of Nemotron-3-Nano (report: arXiv
  2512.20848) uses rate 1e-3 and weight 1e-4. The open recipe of its RL freezes the router's weights and has no
  balance loss, but still updates the bias, at rate 1e-3.

  Attributes:
    kind: one of the above.
    rate: change of the bias a step, under sign and both.
    weight: factor of the balance loss, under auxiliary and both.

  Raises:
    UserError: an unknown kind, or a rate or weight that its kind uses and that is not positive.
  """

  kind: str = "frozen"
  rate: float = 1e-3
  weight: float = 1e-4

  def __post_init__(self):
    check_values("router_balance", **vars(self))
    for name, used in (("rate", self.moves_bias), ("weight", self.has_loss)):
      value = getattr(self, name)
      if used and not value > 0:
        raise UserError(
          f"router_balance.{name}={value}: must be above 0 under kind={self.kind!r}; kind='frozen' turns it off"
        )

  @property
  def moves_bias(self) -> bool:
    return self.kind in ("sign", "both")

  @property
  def has_loss(self) -> bool:
    return self.kind in ("auxiliary", "both")

  def loss(self, routing: Routing | None, scale: jax.Array) -> jax.Array | float:
    """The balance loss of a part of the batch, to be added to its summed loss; 0 if none is used.

    Args:
      routing: of this part; None if the model has no router.
      scale: (divisor of the batch's summed loss) / (real tokens of the batch). After the division by that
        divisor the parts add up to `weight` times the mean over the batch's real tokens.
    """
    if not self.has_loss or routing is None:
      return 0.0
    if routing.loss is None:
      raise ValueError("the model's scores hold no balance loss: ModelConfig.router_loss is off")
    return self.weight * scale * routing.loss

  def move(self, params: Params, routing: Routing | None, add_to_bias: AddToBias | None) -> Params:
    """The parameters after the sign update of the biases; `routing` holds the loads of the whole batch."""
    if not self.moves_bias or routing is None:
      return params
    if add_to_bias is None:
      raise ValueError(f"kind={self.kind!r} moves the routers' bias: give add_to_bias")
    load_LE = routing.load_LE
    return add_to_bias(params, self.rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE))


def routing_metrics(routing: Routing | None, real: jax.Array) -> Metrics:
  """Metrics of the routers over a whole batch; {} if nothing is routed. A load of 1 is the mean load.

  expert/load_max: the largest load of an expert in any block; load_max/block_<i> is that of block i.
  expert/imbalance: the mean of |load - 1| over blocks and experts; imbalance/block_<i> is that of block i.
  expert/unused: the share of experts without a token.
  expert/dropped: the number of choices that no expert worked on.
  loss/balance: the mean balance loss of a block and real token, if it was computed.
  A block without tokens counts as balanced.

  Args:
    real: number of tokens of the batch that are not padding.
  """
  if routing is None:
    return {}
  L, E = routing.load_LE.shape
  total_L1 = jnp.sum(routing.load_LE, axis=1, keepdims=True)
  load_LE = jnp.where(total_L1 > 0, routing.load_LE * E / jnp.maximum(total_L1, 1.0), 1.0)
  max_L, imbalance_L = jnp.max(load_LE, axis=1), jnp.mean(jnp.abs(load_LE - 1.0), axis=1)
  metrics = {
    "expert/load_max": jnp.max(max_L),
    "expert/imbalance": jnp.mean(imbalance_L),
    "expert/unused": jnp.mean(load_LE == 0, dtype=jnp.float32),
    "expert/dropped": jnp.sum(routing.dropped_L),
  }
  for block in range(L):
    metrics |= {f"load_max/block_{block}": max_L[block], f"imbalance/block_{block}": imbalance_L[block]}
  if routing.loss is not None:
    metrics["loss/balance"] = routing.loss / (L * jnp.maximum(real, 1.0))  # 1 if all loads are equal.
  return metrics
