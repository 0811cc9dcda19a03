"""KL divergence between a policy and its teacher over the vocabulary, without a [T, V] array for all T.

A teacher sends either its hidden states (D numbers per token, and its head once), or its K most likely
tokens with their log-probabilities. The teacher gets no gradient. Both distributions are
softmax(logits / temperature), at the temperature that completions are sampled with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nemocascade.kernels.product import product
from nemocascade.kernels.token_chunks import over_wanted

TAIL = 1e-6  # Least probability of all tokens outside the top K; avoids log(0).

KL = Callable[[jax.Array, jax.Array], jax.Array]


def reverse_kl_ref(policy_NO, teacher_NO):
  """KL(policy || teacher)_N in nats, from log-probabilities [N, O] of the same outcomes O.

  The sum over o of p(o) (log p(o) - log q(o)), at every token that the policy generated:
  GKD (Agarwal et al., 2023, arXiv 2306.13649), in the direction of MiniLLM (arXiv 2306.08543).
  """
  return jnp.sum(jnp.exp(policy_NO) * (policy_NO - teacher_NO), axis=-1)


def forward_kl_ref(policy_NO, teacher_NO):
  """KL(teacher || policy)_N in nats: the cross-entropy of Hinton et al. (2015) minus the teacher's entropy."""
  return reverse_kl_ref(teacher_NO, policy_NO)


def kl_to_states(kl: KL, x_BTD, head_DV, wanted_BT, states_BTC, teacher_BT, heads_ZCV, temperature=1.0, *, chunk=512):
  """kl_BT, fp32, over the whole vocabulary at wanted tokens, 0 elsewhere; about `chunk` tokens at a time.

  Args:
    kl: function of the policy's and the teacher's log-probabilities, [N, V] each.
    x_BTD: hidden states that the policy predicts token t from; its logits are x @ head.
    wanted_BT: bool.
    states_BTC, heads_ZCV: hidden states and heads of Z teachers; C is their hidden size.
    teacher_BT: int32, the teacher that each token's states come from.
    temperature: scalar above 0, of policy and teachers.
  """
  states_BTC, heads_ZCV = jax.lax.stop_gradient((states_BTC, heads_ZCV))

  # Recomputed in the backward pass; otherwise the reordered tokens are saved for every teacher.
  @jax.checkpoint
  def of_teacher(z, head_CV):
    def part(x_ND, states_NC):
      return (kl(_logprobs(x_ND, head_DV, temperature), _logprobs(states_NC, head_CV, temperature)),)

    return over_wanted(part, (x_BTD, states_BTC), wanted_BT & (teacher_BT == z), chunk=chunk)[0]

  def add(total_BT, teacher):
    return total_BT + of_teacher(*teacher), None

  zero_BT = jnp.zeros(wanted_BT.shape, jnp.float32)
  return jax.lax.scan(add, zero_BT, (jnp.arange(len(heads_ZCV)), heads_ZCV))[0]


def kl_to_top(kl: KL, x_BTD, head_DV, wanted_BT, tokens_BTK, logprobs_BTK, temperature=1.0, *, chunk=512):
  """kl_BT, fp32, over the teacher's top K tokens and one outcome for all other tokens; 0 where not wanted.

  Args:
    kl: function of the policy's and the teacher's log-probabilities, [N, K + 1] each.
    x_BTD: hidden states that the policy predicts token t from; its logits are x @ head.
    wanted_BT: bool.
    tokens_BTK: the teacher's K most likely tokens, all different.
    logprobs_BTK: their log-probabilities in the teacher's whole distribution, at the same temperature.
    temperature: scalar above 0, of the policy.

  The result is at most the KL over the vocabulary, and equal to it if K = V. Without the last outcome
  a policy could lower the reverse KL by giving no probability to any of the K tokens.
  """
  logprobs_BTK = jax.lax.stop_gradient(logprobs_BTK)

  def part(x_ND, tokens_NK, logprobs_NK):
    own_NK = jnp.take_along_axis(_logprobs(x_ND, head_DV, temperature), tokens_NK, axis=-1)
    return (kl(_with_rest(own_NK), _with_rest(logprobs_NK)),)

  return over_wanted(part, (x_BTD, tokens_BTK, logprobs_BTK), wanted_BT, chunk=chunk)[0]


def top_logprobs(x_BTD, head_DV, wanted_BT, temperature=1.0, *, k, chunk=2048):
  """(tokens_BTK int32, logprobs_BTK fp32) of the k most likely tokens, descending; 0 where not wanted."""

  def part(x_ND):
    logprobs_NK, tokens_NK = jax.lax.top_k(_logprobs(x_ND, head_DV, temperature), k)
    return tokens_NK, logprobs_NK

  return over_wanted(part, (x_BTD,), wanted_BT, chunk=chunk)


def _logprobs(x_ND, head_DV, temperature):
  return jax.nn.log_softmax(product(x_ND, head_DV, 1, jnp.float32) / temperature, axis=-1)


def _with_rest(logprobs_NK):
  """[N, K + 1]: appends the log-probability of all other tokens."""
  rest_N1 = 1.0 - jnp.sum(jnp.exp(logprobs_NK), axis=-1, keepdims=True)
  return jnp.concatenate([logprobs_NK, jnp.log(jnp.maximum(rest_N1, TAIL))], axis=-1)
