"""How routers are kept in balance: not at all, by their bias's sign update, or by a loss; and its metrics."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.errors import UserError
from nemocascade.field_table import check_values
from nemocascade.types import Metrics, Params, Routing

# (params, change_LE) -> params with the change added to the routers' biases.
AddToBias = Callable[[Params, jax.Array], Params]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterBalance:
  """What keeps the experts' loads alike (paper.md 1.4, 3.1, 4.1).

  frozen: nothing; the bias keeps its values. sign: after each step the bias of an expert moves by
  `rate` towards fewer tokens where it had more than the mean, else towards more (DeepSeek-V3, arXiv
  2412.19437, 2.1.2). auxiliary: `weight` times the balance loss of model/moe.py, summed over blocks,
  mean over real tokens, is added to the loss; the bias keeps its values. both: sign and auxiliary.
  No kind lets the optimizer touch the bias.

  Raises:
    UserError: an unknown kind, or a rate or weight that is not positive where it is used.
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
    """What a part of the batch adds to its summed loss.

    Args:
      scale: the batch's divisor of the summed loss over its real tokens, so that after that division
        the whole batch has added weight times the mean over its real tokens.
    """
    if not self.has_loss or routing is None:
      return 0.0
    if routing.loss is None:
      raise ValueError("the model's scores hold no balance loss: ModelConfig.router_loss is off")
    return self.weight * scale * routing.loss

  def move(self, params: Params, routing: Routing | None, add_to_bias: AddToBias | None) -> Params:
    """The parameters after the sign update by the whole batch's loads."""
    if not self.moves_bias or routing is None:
      return params
    load_LE = routing.load_LE
    return add_to_bias(params, self.rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE))


def routing_metrics(routing: Routing | None, real: jax.Array) -> Metrics:
  """Of a whole batch of `real` tokens; loads are in units of the fair share.

  expert/load_max is that of the busiest expert of any block, expert/imbalance the mean over blocks
  and experts of |load - 1|; both are there for each block too. A block without tokens counts as balanced.
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
    metrics["loss/balance"] = routing.loss / (L * jnp.maximum(real, 1.0))  # 1 where loads are equal.
  return metrics
