"""The Mamba-2 block: project, convolve, scan, gate, project.

It follows Nemotron-3-Nano (arXiv 2512.20848) as implemented by nemotron_h in transformers and vLLM.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels import ssd as kernel
from nemocascade.kernels.causal_conv import causal_conv
from nemocascade.kernels.product import product
from nemocascade.model.layers import constant, normal, rms_norm, without_ones
from nemocascade.model.sequence_parallel import layout


def _init_a_log(key, shape, dtype):
  del key
  return jnp.log(jnp.arange(1, shape[0] + 1, dtype=jnp.float32)).astype(dtype)


def _init_dt_bias(config: ModelConfig):
  """softplus(dt_bias) is log-uniform in [time_step_min, time_step_max], and at least time_step_floor."""
  c = config

  def init(key, shape, dtype):
    low, high = math.log(c.time_step_min), math.log(c.time_step_max)
    dt = jnp.exp(jax.random.uniform(key, shape) * (high - low) + low)
    dt = jnp.maximum(dt, c.time_step_floor)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)  # The inverse of softplus.

  return init


def _init_conv(key, shape, dtype):
  """Uniform in [-1 / sqrt(W), 1 / sqrt(W)], where W is the number of taps."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


class Mamba(nn.Module):
  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    c = self.config
    D, I, M = c.hidden_size, c.mamba_inner_size, c.mamba_num_heads
    conv = I + 2 * c.n_groups * c.ssm_state_size
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    f32 = jnp.float32  # A_log, D and dt_bias are fp32 in checkpoints.
    self.in_proj = self.param("in_proj", normal(c, "embed", "mamba_inner"), (D, I + conv + M), c.param_dtype)
    self.conv1d = self.param("conv1d", constant(_init_conv, None, "mamba_inner"), (c.conv_kernel, conv), c.param_dtype)
    self.conv1d_bias = (
      self.param("conv1d_bias", constant(zeros, "mamba_inner"), (conv,), c.param_dtype) if c.use_conv_bias else None
    )
    self.A_log = self.param("A_log", constant(_init_a_log, "mamba_heads"), (M,), f32)
    self.D = self.param("D", constant(ones, "mamba_heads"), (M,), f32)
    self.dt_bias = self.param("dt_bias", constant(_init_dt_bias(c), "mamba_heads"), (M,), f32)
    self.norm = self.param("norm", constant(ones, "mamba_inner"), (I,), c.param_dtype)
    self.out_proj = self.param("out_proj", normal(c, "mamba_inner", "embed", residual=True), (I, D), c.param_dtype)

  def _project(self, x):
    """x [..., D] -> z [..., I], xbc [..., I + 2 U N], dt [..., M] (fp32, after softplus)."""
    c = self.config
    I, M = c.mamba_inner_size, c.mamba_num_heads
    zxbcdt = product(x, self.in_proj)
    z, xbc, dt = jnp.split(zxbcdt, (I, zxbcdt.shape[-1] - M), axis=-1)
    bias = self.dt_bias.reshape((1,) * (dt.ndim - 1) + (M,))
    dt = jax.nn.softplus(dt.astype(jnp.float32) + bias)
    low, high = c.time_step_limit
    return z, xbc, dt if (low, high) == (0.0, math.inf) else jnp.clip(dt, low, high)

  def _split(self, xbc):
    """xbc [..., I + 2 U N] -> x [..., M, P], b and c [..., U, N]."""
    c = self.config
    I, U, N = c.mamba_inner_size, c.n_groups, c.ssm_state_size
    lead = xbc.shape[:-1]
    x, b, c_ = jnp.split(xbc, (I, I + U * N), axis=-1)
    x = x.reshape(*lead, c.mamba_num_heads, c.mamba_head_dim)
    return x, b.reshape(*lead, U, N), c_.reshape(*lead, U, N)

  def _log_decay(self, dt):
    return dt * -jnp.exp(self.A_log.astype(jnp.float32)).reshape((1,) * (dt.ndim - 1) + (-1,))

  def _finish(self, y, x, z):
    """Adds D * x, gates with silu(z), then normalizes by group (norm_before_gate=False) and projects.

    y, x: [..., M, P]; z: [..., I].
    """
    c = self.config
    y, x = without_ones(y, 2), without_ones(x, 2)
    skip = self.D.astype(jnp.float32).reshape((1,) * (y.ndim - 2) + (-1, 1))
    y = (y + skip * x.astype(jnp.float32)).astype(z.dtype).reshape(z.shape)
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    grouped = gated.reshape(*z.shape[:-1], c.n_groups, -1)
    y = rms_norm(grouped, self.norm.reshape(c.n_groups, -1), c.layer_norm_epsilon)
    return product(y.reshape(z.shape).astype(z.dtype), self.out_proj)

  def _rows(self, x_BTD, segment_ids_BT, before=None):
    """(y_BTD, final SSM state, inputs of the conv); `before`: the state that the rows continue, or None."""
    on = layout(self.config, self.mesh, x_BTD.shape[0])
    z, xbc_in, dt = self._project(x_BTD)
    xbc = on.causal_conv(xbc_in, self.conv1d, self.conv1d_bias, segment_ids_BT, before and before["conv_BWC"])
    x, b, c = self._split(xbc)
    by_dt = without_ones(x, 2).astype(jnp.float32) * without_ones(dt, 1)[..., None]
    y, state = on.ssd(
      by_dt.reshape(x.shape), self._log_decay(dt), b, c, segment_ids_BT,
      chunk=self.config.chunk_size, initial_state=before and before["ssm_BMPN"],
    )  # fmt: skip
    return self._finish(y, x, z), state, xbc_in

  def __call__(self, x_BTD, segment_ids_BT):
    return self._rows(x_BTD, segment_ids_BT)[0]

  def prefill(self, x_BTD, segment_ids_BT):
    """(y_BTD, state after each row's last token): the SSM state and the last W - 1 inputs of the conv."""
    y_BTD, ssm, xbc_BTC = self._rows(x_BTD, segment_ids_BT)
    return y_BTD, {"ssm_BMPN": ssm, "conv_BWC": self._last_inputs(xbc_BTC, segment_ids_BT)}

  def extend(self, state, x_BTD, segment_ids_BT, length_B):
    """(state after each row's last token, y_BTD) of rows that continue `state`; rows of padding keep it."""
    del length_B
    y_BTD, ssm, xbc_BTC = self._rows(x_BTD, segment_ids_BT, state)
    # Padding leaves the SSM state as it is. A select of the state of such rows makes libtpu 0.0.42 abort.
    return {"ssm_BMPN": ssm, "conv_BWC": self._last_inputs(xbc_BTC, segment_ids_BT, state["conv_BWC"])}, y_BTD

  def _last_inputs(self, xbc_BTC, segment_ids_BT, before_BWC=None):
    """The last W - 1 inputs of the conv [B, W - 1, C]; those before the row are before_BWC, or 0."""
    past = self.config.conv_kernel - 1
    first_BW = jnp.sum(segment_ids_BT > 0, axis=1)[:, None] + jnp.arange(past)[None]  # In `before` and the row, joined.
    conv_BWC = layout(self.config, self.mesh, xbc_BTC.shape[0]).take(xbc_BTC, first_BW - past)
    if before_BWC is None or not past:
      return conv_BWC
    old_BWC = jnp.take_along_axis(before_BWC, jnp.minimum(first_BW, past - 1)[..., None], axis=1)
    return jnp.where((first_BW < past)[..., None], old_BWC, conv_BWC)

  def step(self, state, x_BD, length_B, active_B):
    del length_B
    z, xbc_in, dt = self._project(x_BD)
    # dt = 0 leaves the SSM state unchanged, so that inactive rows need no select over their state.
    dt = jnp.where(active_B[:, None], dt, 0.0)
    window_BWC = jnp.concatenate([state["conv_BWC"], xbc_in[:, None]], axis=1)
    here_B1 = jnp.ones((x_BD.shape[0], 1), jnp.int32)
    xbc_B1C = causal_conv(xbc_in[:, None], self.conv1d, self.conv1d_bias, here_B1, state["conv_BWC"])
    x, b, c = self._split(xbc_B1C[:, 0])
    per_group = self.config.mamba_num_heads // self.config.n_groups
    b, c = (jnp.repeat(a.astype(jnp.float32), per_group, axis=1) for a in (b, c))
    ssm, y = kernel.ssd_step(state["ssm_BMPN"], x.astype(jnp.float32) * dt[..., None], self._log_decay(dt), b, c)
    conv_BWC = jnp.where(active_B[:, None, None], window_BWC[:, 1:], state["conv_BWC"])
    return {"ssm_BMPN": ssm, "conv_BWC": conv_BWC}, self._finish(y, x, z)
