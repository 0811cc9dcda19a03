"""Parts that blocks share: norms, initializers, and the MLP block."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from nemocascade.config import ModelConfig
from nemocascade.kernels.product import product


def normal(config: ModelConfig, *axes, residual: bool = False):
  """Normal initializer with logical axes and standard deviation initializer_range.

  Args:
    residual: for outputs to the residual stream; divides by sqrt(blocks) if rescale_prenorm_residual is set.
  """
  std = config.initializer_range
  if residual and config.rescale_prenorm_residual:
    std /= math.sqrt(len(config.hybrid_override_pattern))
  return nn.with_partitioning(nn.initializers.normal(std), axes)


def constant(init, *axes):
  """The initializer `init` with logical axes."""
  return nn.with_partitioning(init, axes)


def rms_norm(x, weight, eps: float):
  """x / rms(x) * weight over the last axis, in fp32, back in x's dtype."""
  shape, x = x.shape, without_ones(x, weight.ndim)
  x32 = x.astype(jnp.float32)
  x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
  return (x32 * weight).astype(x.dtype).reshape(shape)


def without_ones(x, kept: int):
  """x without axes of length 1 before its last `kept` axes: XLA on CPUs sums [1, T, D] over T far slower than [T, D]."""
  first = x.ndim - kept
  return x.reshape(*(n for n in x.shape[:first] if n > 1), *x.shape[first:])


def relu2(x):
  """Squared ReLU."""
  return jnp.square(jax.nn.relu(x))


class RMSNorm(nn.Module):
  config: ModelConfig

  def setup(self):
    c = self.config
    self.weight = self.param("weight", constant(nn.initializers.ones, "embed"), (c.hidden_size,), c.param_dtype)

  def __call__(self, x):
    return rms_norm(x, self.weight, self.config.layer_norm_epsilon)


class MLP(nn.Module):
  """Two matrices and a squared ReLU; no gate, no state."""

  config: ModelConfig

  def setup(self):
    c = self.config
    D, F = c.hidden_size, c.intermediate_size
    self.up_proj = self.param("up_proj", normal(c, "embed", "hidden"), (D, F), c.param_dtype)
    self.down_proj = self.param("down_proj", normal(c, "hidden", "embed", residual=True), (F, D), c.param_dtype)

  def __call__(self, x_BTD, segment_ids_BT):
    del segment_ids_BT  # The MLP treats each token independently.
    return product(relu2(product(x_BTD, self.up_proj)), self.down_proj)

  def prefill(self, x_BTD, segment_ids_BT):
    return self(x_BTD, segment_ids_BT), ()

  def extend(self, state, x_BTD, segment_ids_BT, length_B):
    del length_B
    return state, self(x_BTD, segment_ids_BT)

  def step(self, state, x_BD, length_B, active_B):
    del length_B, active_B
    return state, self(x_BD, None)
