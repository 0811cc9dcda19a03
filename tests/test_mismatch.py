"""The metrics of what sampler and trainer differ by: a loop over tokens and completions gives the same."""

import jax
import numpy as np
import pytest
from toy_policy import G, Q, T, gradient, gradient_of_rows, own_logprobs, rollout

from nemocascade.advantage import grpo
from nemocascade.mesh import make_mesh
from nemocascade.step import mismatch
from nemocascade.step.rows import lengths_of, pack_rows, to_rows

pytestmark = pytest.mark.usefixtures("compiled_fast")
NAMES = ("sampler_error", "sampler_error_max", "sampler_kl", "sampler_ess", "sampler_far")


def by_loop(r, places):
  gap_QGT = np.asarray(own_logprobs(r) - r.behaviour_logprobs_QGT, np.float64)
  gaps = [
    gap_QGT[q, g][np.asarray(r.loss_mask_QGT[q, g])] for q in range(Q) for g in range(G) if bool(r.valid_QG[q, g])
  ]
  gap, weight = np.concatenate(gaps), np.exp(np.concatenate(gaps))
  found = {
    "policy/sampler_error": np.abs(gap).mean(),
    "policy/sampler_error_max": np.abs(gap).max(),
    "policy/sampler_kl": np.mean(weight - 1 - gap),
    "policy/sampler_ess": weight.sum() ** 2 / len(gap) / (weight**2).sum(),
    "policy/sampler_far": np.mean([np.exp(np.abs(of_one)).mean() > 2 for of_one in gaps]),
  }
  for start, end in zip(places, [*places[1:], T], strict=True):
    found[f"sampler_error/from_{start}"] = np.abs(np.concatenate([of_one[start:end] for of_one in gaps])).mean()
  return found


@pytest.mark.parametrize("form", ["rows", "pieces", "packed"])
def test_they_are_a_loop_over_tokens_however_the_batch_is_split(monkeypatch, form):
  monkeypatch.setattr(mismatch, "PLACES", (0, 1, 2))
  r = rollout(noise=0.8)
  expected = by_loop(r, [0, 1, 2])
  assert 0.1 < expected["policy/sampler_far"] < 0.9 and expected["policy/sampler_ess"] < 0.9
  if form == "packed":
    rows, count = to_rows(r, grpo(r))
    mesh = make_mesh(1, 1)
    rows = pack_rows(rows, lengths_of(r, mesh), mesh=mesh, B=9, T=2 * T + 1, accumulate=3)
    _, got = gradient_of_rows(rows, count, accumulate=3)
  else:
    _, got = gradient(r, accumulate=8 if form == "pieces" else 1)
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_equal_policies_have_none_and_a_batch_with_nothing_to_learn_has_none():
  _, got = gradient(rollout())
  assert [float(got[f"policy/{name}"]) for name in NAMES] == pytest.approx([0, 0, 0, 1, 0], abs=1e-6)
  r = rollout(noise=0.8)
  _, got = gradient(r.replace(valid_QG=jax.numpy.zeros((Q, G), bool)))
  assert [float(got[f"policy/{name}"]) for name in NAMES] == [0] * 5


def test_a_far_gap_is_finite():
  r = rollout()
  _, got = gradient(r.replace(behaviour_logprobs_QGT=r.behaviour_logprobs_QGT - 1e4))
  assert all(np.isfinite(float(value)) for value in got.values()) and got["policy/sampler_far"] == 1
