"""The depthwise causal convolution of Mamba-2 and its SiLU, within documents."""

import jax
import jax.numpy as jnp

# W is the number of taps; the last tap weighs the token itself.


def causal_conv_ref(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC=None):
  """The definition: silu(bias + weighted sum of the last W tokens of the same document).

  Args:
    bias_C: None for no bias.
    before_BWC: [B, W - 1, C], the inputs before each row, which its first document continues; or None.

  Returns:
    [B, T, C] of x's dtype, computed in fp32.
  """
  past_BSC, same_WBT1 = _past(x_BTC, weight_WC, segment_ids_BT, before_BWC)
  return jax.nn.silu(_sum(past_BSC, weight_WC, bias_C, same_WBT1)).astype(x_BTC.dtype)


def _past(x_BTC, weight_WC, segment_ids_BT, before_BWC):
  """(the W - 1 earlier inputs and the row, same_WBT1: whether tap w of token t is in t's document)."""
  W, T = weight_WC.shape[0], x_BTC.shape[1]
  if before_BWC is None:
    past_BSC = jnp.pad(x_BTC, ((0, 0), (W - 1, 0), (0, 0)))
    past_BS = jnp.pad(segment_ids_BT, ((0, 0), (W - 1, 0)), constant_values=-1)
  else:
    past_BSC = jnp.concatenate([before_BWC, x_BTC], axis=1)
    past_BS = jnp.pad(segment_ids_BT, ((0, 0), (W - 1, 0)), mode="edge")
  return past_BSC, [(past_BS[:, w : w + T] == segment_ids_BT)[..., None] for w in range(W)]


def _sum(past_BSC, weight_WC, bias_C, same_WBT1):
  T, weight_W11C = same_WBT1[0].shape[1], weight_WC.astype(jnp.float32)[:, None, None]
  taps = [
    jnp.where(same_BT1, past_BSC[:, w : w + T].astype(jnp.float32), 0) * weight_W11C[w]
    for w, same_BT1 in enumerate(same_WBT1)
  ]
  return sum(taps) if bias_C is None else sum(taps) + bias_C[None, None].astype(jnp.float32)


@jax.custom_vjp
def causal_conv(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC=None):
  """`causal_conv_ref` that saves only its inputs for the backward pass."""
  return causal_conv_ref(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC)


def _forward(*args):
  return causal_conv_ref(*args), args


def _backward(saved, dy_BTC):
  """Hand-written: autodiff adds tap by tap, and rounds, writes and reads the sum at every tap."""
  x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC = saved
  W, T = weight_WC.shape[0], x_BTC.shape[1]
  past_BSC, same_WBT1 = _past(x_BTC, weight_WC, segment_ids_BT, before_BWC)
  y_BTC = _sum(past_BSC, weight_WC, bias_C, same_WBT1)
  gate_BTC = jax.nn.sigmoid(y_BTC)
  dy_BTC = dy_BTC.astype(jnp.float32) * gate_BTC * (1 + y_BTC * (1 - gate_BTC))
  dbias_C = None if bias_C is None else jnp.sum(dy_BTC, axis=(0, 1)).astype(bias_C.dtype)
  # In x's dtype to save traffic: it is read once per tap. Without the barrier libtpu 0.0.42 refuses a step for tpu7x with
  # 32,768 tokens of a row on a device: it computes dy together with the sums over it, and gives dy two layouts.
  dy_BTC = jax.lax.optimization_barrier(dy_BTC.astype(x_BTC.dtype))

  def of_tap(w):
    return jnp.where(same_WBT1[w], dy_BTC.astype(jnp.float32) * past_BSC[:, w : w + T].astype(jnp.float32), 0)

  dweight_WC = jnp.stack([jnp.sum(of_tap(w), axis=(0, 1)) for w in range(W)])
  # Tap w of token s - w reads past_BSC[:, s].
  first = W - 1 if before_BWC is None else 0
  ends = lambda a: jnp.pad(a, ((0, 0), (W - 1, W - 1), (0, 0)))
  at = lambda w: slice(first + W - 1 - w, 2 * (W - 1) - w + T)
  dy_BSC, weight_W11C = ends(dy_BTC), weight_WC.astype(jnp.float32)[:, None, None]
  dpast_BSC = sum(
    jnp.where(ends(same_WBT1[w])[:, at(w)], dy_BSC[:, at(w)].astype(jnp.float32), 0) * weight_W11C[w] for w in range(W)
  ).astype(x_BTC.dtype)
  dbefore_BWC = None if before_BWC is None else dpast_BSC[:, : W - 1]
  return dpast_BSC[:, W - 1 - first :], dweight_WC.astype(weight_WC.dtype), dbias_C, None, dbefore_BWC


causal_conv.defvjp(_forward, _backward)
