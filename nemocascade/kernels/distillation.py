"""KL between a policy and its teacher over the vocabulary, never holding [T, V] for all T.

A teacher sends what its distribution can be made from again: the states that it predicts tokens
from (D numbers a token, and its head once), or its K likeliest tokens with their log-probabilities.
No gradient goes to it. Both distributions are softmax(logits / temperature), the one that completions are
sampled from.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import product
from nemocascade.kernels.token_chunks import over_wanted

TAIL = 1e-6  # Probability that is left at least for what is outside of the K: its logarithm is taken.

KL = Callable[[jax.Array, jax.Array], jax.Array]


def reverse_kl_ref(policy_NO, teacher_NO):
  """KL(policy || teacher)_N in nats, of log-probabilities of the same outcomes O.

  The sum over o of p(o) (log p(o) - log q(o)), taken at every token of what the policy itself said:
  GKD (Agarwal et al., 2023, arXiv 2306.13649), with the direction of MiniLLM (arXiv 2306.08543).
  """
  return jnp.sum(jnp.exp(policy_NO) * (policy_NO - teacher_NO), axis=-1)


def forward_kl_ref(policy_NO, teacher_NO):
  """KL(teacher || policy)_N: distillation's cross-entropy (Hinton et al., 2015), less a constant."""
  return reverse_kl_ref(teacher_NO, policy_NO)


def kl_to_states(
  kl: KL, x_BTD, head_DV, wanted_BT, states_BTC, teacher_BT, heads_ZCV, temperature=1.0, *, chunk=2048
):
  """kl_BT over the whole vocabulary where wanted, 0 elsewhere; `chunk` tokens at a time.

  Args:
    kl: of log-probabilities, [N, V] each.
    x_BTD: what the policy predicts token t from; its logits are x @ head.
    states_BTC, heads_ZCV: the teachers' same; C is their width, Z how many there are.
    teacher_BT: int32, whose states they are.
    temperature: scalar above 0, of policy and teachers.
  """
  states_BTC, heads_ZCV = jax.lax.stop_gradient((states_BTC, heads_ZCV))

  # Again in the backward pass, or the tokens in the order of every teacher would be kept.
  @jax.checkpoint
  def of_teacher(z, head_CV):
    def part(x_ND, states_NC):
      return (kl(_logprobs(x_ND, head_DV, temperature), _logprobs(states_NC, head_CV, temperature)),)

    return over_wanted(part, (x_BTD, states_BTC), wanted_BT & (teacher_BT == z), chunk=chunk)[0]

  def add(total_BT, teacher):
    return total_BT + of_teacher(*teacher), None

  zero_BT = jnp.zeros(wanted_BT.shape, jnp.float32)
  return jax.lax.scan(add, zero_BT, (jnp.arange(len(heads_ZCV)), heads_ZCV))[0]


def kl_to_top(
  kl: KL, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature=1.0, *, chunk=2048
):
  """kl_BT over K tokens and, as one outcome more, all others; where wanted, 0 elsewhere.

  Args:
    kl: of log-probabilities, [N, K + 1] each.
    tokens_BTK: the teacher's likeliest, all different.
    logprobs_BTK: of its whole distribution, at the same temperature.
    temperature: scalar above 0, of the policy.

  At most the KL over the vocabulary, and equal to it where K = V. Without the last outcome a policy
  could lower the reverse KL by leaving all of the K alone.
  """
  logprobs_BTK = jax.lax.stop_gradient(logprobs_BTK)

  def part(x_ND, tokens_NK, logprobs_NK):
    own_NK = jnp.take_along_axis(_logprobs(x_ND, head_DV, temperature), tokens_NK, axis=-1)
    return (kl(_with_rest(own_NK), _with_rest(logprobs_NK)),)

  return over_wanted(part, (x_BTD, tokens_BTK, logprobs_BTK), wanted_BT, chunk=chunk)[0]


def top_logprobs(x_BTD, head_DV, wanted_BT, temperature=1.0, *, k, chunk=2048):
  """(tokens_BTK, logprobs_BTK) of the k likeliest, the likeliest first; 0 where not wanted."""

  def part(x_ND):
    logprobs_NK, tokens_NK = jax.lax.top_k(_logprobs(x_ND, head_DV, temperature), k)
    return tokens_NK, logprobs_NK

  return over_wanted(part, (x_BTD,), wanted_BT, chunk=chunk)


def _logprobs(x_ND, head_DV, temperature):
  return jax.nn.log_softmax(product(x_ND, head_DV, 1, jnp.float32) / temperature, axis=-1)


def _with_rest(logprobs_NK):
  """[N, K + 1]: and the log-probability of everything else."""
  rest_N1 = 1.0 - jnp.sum(jnp.exp(logprobs_NK), axis=-1, keepdims=True)
  return jnp.concatenate([logprobs_NK, jnp.log(jnp.maximum(rest_N1, TAIL))], axis=-1)
