"""Log-probability, entropy and normalizer of given tokens, without an [N, V] array for all N."""

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import product
from nemocascade.kernels.token_chunks import over_wanted


def token_logprob_ref(x_ND, head_DV, tokens_N, *, temperature=1.0):
  """The definition, of softmax(x @ head / temperature); all results are fp32 and in nats.

  Args:
    tokens_N: int32.
    temperature: scalar above 0, traced or not.

  Returns:
    (logprob_N of the tokens, entropy_N, log_normalizer_N: the logarithm of the sum of exponentials).
  """
  logits_NV = product(x_ND, head_DV, 1, jnp.float32) / temperature
  normalizer_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
  logprobs_NV = logits_NV - normalizer_N1
  entropy_N = -jnp.sum(jnp.exp(logprobs_NV) * logprobs_NV, axis=-1)
  return jnp.take_along_axis(logprobs_NV, tokens_N[:, None], axis=-1)[:, 0], entropy_N, normalizer_N1[:, 0]


def token_logprob(x_BTD, head_DV, tokens_BT, wanted_BT, temperature=1.0, *, chunk=2048):
  """`token_logprob_ref` of wanted tokens, about `chunk` at a time: three of [B, T], 0 elsewhere."""

  def part(x_ND, tokens_N):
    return token_logprob_ref(x_ND, head_DV, tokens_N, temperature=temperature)

  return over_wanted(part, (x_BTD, tokens_BT), wanted_BT, chunk=chunk)
