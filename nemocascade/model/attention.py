"""The grouped-query attention block, without positions; its decode state is a key-value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels import attention as kernel
from nemocascade.kernels.product import product
from nemocascade.kernels.scatter import put
from nemocascade.mesh import on_own_rows
from nemocascade.model.layers import normal
from nemocascade.model.sequence_parallel import layout


class Attention(nn.Module):
  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    c = self.config
    D, H, K = c.hidden_size, c.head_dim, c.num_key_value_heads
    R = c.num_attention_heads // K
    self.q_proj = self.param("q_proj", normal(c, "embed", "kv_heads", None, None), (D, K, R, H), c.param_dtype)
    self.k_proj = self.param("k_proj", normal(c, "embed", "kv_heads", None), (D, K, H), c.param_dtype)
    self.v_proj = self.param("v_proj", normal(c, "embed", "kv_heads", None), (D, K, H), c.param_dtype)
    self.o_proj = self.param(
      "o_proj", normal(c, "kv_heads", None, None, "embed", residual=True), (K, R, H, D), c.param_dtype
    )

  def _qkv(self, x):
    """x [..., D] -> q [..., K, R, H], k and v [..., K, H]."""
    return product(x, self.q_proj), product(x, self.k_proj), product(x, self.v_proj)

  def _attend(self, q, k, v, segment_ids_BT, *cache):
    return layout(self.config, self.mesh, q.shape[0]).attention(q, k, v, segment_ids_BT, *cache)

  def _out(self, y):
    return product(y, self.o_proj, 3)

  def __call__(self, x_BTD, segment_ids_BT):
    return self._out(self._attend(*self._qkv(x_BTD), segment_ids_BT))

  def prefill(self, x_BTD, segment_ids_BT):
    """(y_BTD, state). The cache has exactly T places; `Hybrid.prefill` adds room for more tokens."""
    q, k, v = self._qkv(x_BTD)
    state = {"k_BKSH": jnp.swapaxes(k, 1, 2), "v_BKSH": jnp.swapaxes(v, 1, 2)}
    return self._out(self._attend(q, k, v, segment_ids_BT)), state

  def extend(self, state, x_BTD, segment_ids_BT, length_B):
    """(state with the keys and values of the rows, y_BTD) of rows that continue caches of length_B tokens."""
    q, k, v = self._qkv(x_BTD)
    k_BKSH, v_BKSH = state["k_BKSH"], state["v_BKSH"]
    y = self._attend(q, k, v, segment_ids_BT, k_BKSH, v_BKSH, length_B)
    place_BT = length_B[:, None] + jnp.arange(x_BTD.shape[1])[None]
    place_BT = jnp.where(segment_ids_BT > 0, place_BT, k_BKSH.shape[2])  # Dropped: padding is not stored.
    write = jax.vmap(lambda cache_KSH, new_TKH, place_T: put(cache_KSH, (slice(None), place_T), new_TKH.swapaxes(0, 1)))
    return {"k_BKSH": write(k_BKSH, k, place_BT), "v_BKSH": write(v_BKSH, v, place_BT)}, self._out(y)

  def step(self, state, x_BD, length_B, active_B, at=None):
    """`at`: None, or the index of the caches to use in a state of several, [n, B, K, S, H]."""
    # An inactive row also writes, but its length does not grow, so its next token overwrites the entry.
    del active_B
    q, k, v = self._qkv(x_BD)
    # vmap instead of indexing by row number: XLA then knows that sharded rows stay on their device.
    place = () if at is None else (at,)
    write = lambda cache, new_KH, length: put(cache, (*place, slice(None), length), new_KH)
    write = jax.vmap(write, in_axes=(len(place), 0, 0), out_axes=len(place))
    k_BKSH, v_BKSH = write(state["k_BKSH"], k, length_B), write(state["v_BKSH"], v, length_B)
    # Each device reads the caches up to the end of its own longest row.
    caches = dict(second=(1, 2), shared=(4,)) if place else {}
    y = on_own_rows(kernel.decode_attention, self.mesh, **caches)(q, k_BKSH, v_BKSH, length_B + 1, *place)
    return {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}, self._out(y)
