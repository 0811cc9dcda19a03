"""Log-probability and entropy of chosen tokens, never holding [N, V] for all N."""

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import product
from nemocascade.kernels.token_chunks import over_wanted


def token_logprob_ref(x_ND, head_DV, tokens_N, *, temperature=1.0):
  """The definition: (logprob_N, entropy_N) in fp32, nats, of softmax(x @ head / temperature).

  `temperature`: scalar above 0, traced or not.
  """
  logits_NV = product(x_ND, head_DV, 1, jnp.float32) / temperature
  logprobs_NV = jax.nn.log_softmax(logits_NV, axis=-1)
  entropy_N = -jnp.sum(jnp.exp(logprobs_NV) * logprobs_NV, axis=-1)
  return jnp.take_along_axis(logprobs_NV, tokens_N[:, None], axis=-1)[:, 0], entropy_N


def token_logprob(x_BTD, head_DV, tokens_BT, wanted_BT, temperature=1.0, *, chunk=2048):
  """The same where wanted, and 0 elsewhere: (logprob_BT, entropy_BT), `chunk` tokens at a time."""

  def part(x_ND, tokens_N):
    return token_logprob_ref(x_ND, head_DV, tokens_N, temperature=temperature)

  return over_wanted(part, (x_BTD, tokens_BT), wanted_BT, chunk=chunk)
