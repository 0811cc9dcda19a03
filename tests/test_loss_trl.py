"""The functions of the policy-gradient loss equal TRL's GRPOTrainer in value and gradient on the same inputs."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer import grpo_trainer

from nemocascade.step import loss

B, T = 6, 9
LENGTHS = (9, 4, 1, 7, 9, 3)
LOW, HIGH = 0.2, 0.28


@pytest.fixture(scope="module")
def numbers():
  """Random log-probabilities of three policies, far enough apart to reach every clipping bound."""
  rng = np.random.default_rng()
  draw = lambda scale: rng.normal(0, scale, (B, T))
  logprobs_BT = -np.abs(draw(1.0)) - 0.1
  return SimpleNamespace(
    logprobs_BT=logprobs_BT,
    proximal_BT=logprobs_BT + draw(0.5),
    reference_BT=logprobs_BT + draw(0.5),
    advantages_B=rng.permutation([-1.5, -0.8, -0.3, 0.4, 0.9, 1.6]),
    mask_BT=np.arange(T) < np.array(LENGTHS)[:, None],
  )


def theirs(n, kind: str, *, level: str = "token", beta: float = 0.0, delta: float | None = None, high: float = HIGH):
  """(loss, gradient by log-probability) as TRL's trainer computes them, in fp64."""
  logprobs_BT = torch.tensor(n.logprobs_BT, requires_grad=True)
  entropies_BT = torch.zeros(B, T, dtype=torch.float64)
  same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
  trainer = SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs_BT, entropies_BT, None),
    aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
    importance_sampling_level=level, beta=beta, loss_type=kind, epsilon_low=LOW, epsilon_high=high,
    args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1),
    model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=T,
    accelerator=same, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
  )  # fmt: skip
  ids = torch.zeros(B, T, dtype=torch.long)
  value = grpo_trainer.GRPOTrainer._compute_loss(
    trainer, None,
    {
      "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
      "completion_mask": torch.tensor(n.mask_BT, dtype=torch.float64),
      "advantages": torch.tensor(n.advantages_B), "old_per_token_logps": torch.tensor(n.proximal_BT),
      "ref_per_token_logps": torch.tensor(n.reference_BT), "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    },
  )  # fmt: skip
  value.backward()
  return value.item(), logprobs_BT.grad.numpy()


def ours(n, ratio, aggregation, *, kl_weight: float = 0.0, **bounds):
  """The same by our functions: the weighted sum of per-token losses over the count."""
  mask_BT = jnp.asarray(n.mask_BT)
  weights_BT, count = aggregation(mask_BT)

  def mean_of(x_BT):
    x_BT = jnp.where(mask_BT, x_BT, 0.0)
    return jnp.broadcast_to(x_BT.sum(1, keepdims=True) / mask_BT.sum(1, keepdims=True), x_BT.shape)

  def value(logprobs_BT):
    a_BT = jnp.broadcast_to(jnp.asarray(n.advantages_B, jnp.float32)[:, None], mask_BT.shape)
    gain_BT, _ = ratio(logprobs_BT, jnp.asarray(n.proximal_BT, jnp.float32), a_BT, mean_of, **bounds)
    cost_BT = kl_weight * loss.k3(logprobs_BT, jnp.asarray(n.reference_BT, jnp.float32)) - gain_BT
    return jnp.sum(weights_BT * cost_BT) / count

  return jax.value_and_grad(value)(jnp.asarray(n.logprobs_BT, jnp.float32))


CLIP = dict(low=LOW, high=HIGH)


@pytest.mark.parametrize(
  "of_trl, ratio, aggregation, options",
  [
    (dict(kind="grpo"), loss.token_clip, loss.sequence_mean, CLIP),
    (dict(kind="bnpo"), loss.token_clip, loss.token_mean, CLIP),
    (dict(kind="dapo"), loss.token_clip, loss.token_mean, CLIP),
    (dict(kind="dr_grpo"), loss.token_clip, loss.constant_length, CLIP),
    (dict(kind="bnpo", delta=1.5), loss.dual_clip, loss.token_mean, CLIP | dict(cap=1.5)),
    (dict(kind="grpo", level="sequence"), loss.gspo, loss.sequence_mean, CLIP),
    (dict(kind="cispo", high=1 + HIGH), loss.cispo, loss.token_mean, dict(low=1.0, high=HIGH)),
    (dict(kind="bnpo", beta=0.3), loss.token_clip, loss.token_mean, CLIP | dict(kl_weight=0.3)),
  ],
  ids=["sequence_mean", "token_mean", "dapo", "constant_length", "dual_clip", "gspo", "cispo", "k3"],
)
def test_value_and_gradient_are_trls(numbers, of_trl, ratio, aggregation, options):
  """Ours is in fp32, so sums of about 50 terms of size 1 are rounded a few times."""
  value, gradient_BT = theirs(numbers, **of_trl)
  own, own_BT = ours(numbers, ratio, aggregation, **options)
  np.testing.assert_allclose(own, value, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(own_BT, gradient_BT, rtol=1e-4, atol=1e-6)
  assert np.any(gradient_BT) and not np.any(np.asarray(own_BT)[~numbers.mask_BT])
