"""Tests of the optimizer: schedules computed by hand, AdamW by its definition, and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemocascade.errors import UserError
from nemocascade.step.optimizer import make_optimizer, make_schedule, new_state, path_name, with_schedule_of

PARAMS = {
  "embedding": jnp.ones((3, 2)),
  "units_0": {
    "norm": {"weight": jnp.ones((2, 2))},
    "mixer": {
      "A_log": jnp.ones((2, 2)),
      "D": jnp.ones((2, 2)),
      "dt_bias": jnp.ones((2, 2)),
      "conv1d_bias": jnp.ones((2, 2)),
      "norm": jnp.ones((2, 2)),
      "in_proj": jnp.ones((2, 2)),
      "gate": jnp.ones((2, 2)),
      "e_score_correction_bias": jnp.ones((2,)),
    },
  },
}


def schedule(**fields):
  fields = dict(peak_lr=1.0, warmup_steps=4, total_steps=14, schedule="constant", final_fraction=0.1) | fields
  return make_schedule(**fields)


def optimizer(**fields):
  return make_optimizer(**dict(peak_lr=0.1, warmup_steps=0, total_steps=10) | fields)


def moved(tx, grads, params=PARAMS):
  """Names of the parameters that one update changes."""
  updates, _ = tx.update(grads, tx.init(params), params)
  leaves = jax.tree_util.tree_leaves_with_path(updates)
  return {path_name(path) for path, update in leaves if np.any(update)}


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_warm_up_is_linear_from_the_first_step_and_meets_the_peak(name):
  lr = schedule(schedule=name)
  np.testing.assert_allclose([lr(i) for i in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("name, middle, end", [("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1)])
def test_decay_ends_at_its_fraction_and_stays_there(name, middle, end):
  lr = schedule(schedule=name)
  np.testing.assert_allclose([lr(9), lr(14), lr(99)], [middle, end, end], rtol=1e-5)


def test_without_warm_up_the_first_step_has_the_peak():
  assert float(schedule(warmup_steps=0)(0)) == 1.0


def test_two_updates_are_adamw_by_its_definition():
  b1, b2, eps, wd, lr = 0.9, 0.95, 1e-8, 0.1, 0.1
  p = np.array([[1.0, -2.0]])
  grads = [np.array([[0.3, -0.1]]), np.array([[-0.2, 0.4]])]
  tx = optimizer(b1=b1, b2=b2, eps=eps, weight_decay=wd, clip_norm=1e9)
  params = {"w": jnp.asarray(p, jnp.float32)}
  opt_state, m, v = tx.init(params), 0.0, 0.0
  for i, g in enumerate(grads, start=1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    p = p - lr * (m / (1 - b1**i) / (np.sqrt(v / (1 - b2**i)) + eps) + wd * p)
    updates, opt_state = tx.update({"w": jnp.asarray(g, jnp.float32)}, opt_state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["w"], p, rtol=1e-5)


def test_muon_orthogonalizes_each_matrix_of_a_stack_and_leaves_the_rest_to_adam():
  """Two experts, two repeats, and heads that are one matrix: singular values are about 1 before the scale."""
  shapes = {"up_proj": (2, 8, 4), "in_proj": (2, 4, 6), "o_proj": (2, 2, 2, 6), "embedding": (5, 3), "gate": (4, 3)}
  params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  grads = {name: jax.random.normal(jax.random.key(i), s) for i, (name, s) in enumerate(shapes.items())}
  tx = optimizer(kind="muon", clip_norm=1e9)
  updates, _ = tx.update(grads, tx.init(params), params)
  for name, matrices in (("up_proj", (2, 8, 4)), ("in_proj", (2, 4, 6)), ("o_proj", (1, 8, 6))):
    scale = 0.1 * 0.2 * max(matrices[1:]) ** 0.5
    for update, grad in zip(updates[name].reshape(matrices), grads[name].reshape(matrices), strict=True):
      u, s, v = np.linalg.svd(update / -scale, full_matrices=False)
      assert s.min() > 0.6 and s.max() < 1.3
      left, _, right = np.linalg.svd(grad, full_matrices=False)
      assert np.sum((u @ v) * (left @ right)) > 0.99 * len(s)
  for name in ("embedding", "gate"):
    np.testing.assert_allclose(updates[name], -0.1 * np.sign(grads[name]), rtol=1e-4)


def test_the_gradient_is_clipped_by_the_norm_of_what_is_trained():
  # With eps far above the gradient, Adam's first update is proportional to the gradient.
  params = {"a": jnp.zeros((2, 2)), "still": jnp.zeros((2, 2))}
  grads = {"a": jnp.full((2, 2), 2.0), "still": jnp.full((2, 2), 1e6)}

  def first(clip_norm):
    tx = optimizer(clip_norm=clip_norm, eps=1e6, frozen=("still",))
    return tx.update(grads, tx.init(params), params)[0]["a"]

  np.testing.assert_allclose(first(1.0), first(1e9) / 4, rtol=1e-4)  # The norm of four twos is 4.


def test_frozen_and_load_balanced_parameters_never_move():
  names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)}
  bias, gate = "units_0/mixer/e_score_correction_bias", "units_0/mixer/gate"
  tx = optimizer(weight_decay=0.1)
  assert moved(tx, PARAMS) == names - {bias}
  assert moved(optimizer(weight_decay=0.1, frozen=("/gate$",)), PARAMS) == names - {bias, gate}


def test_weight_decay_spares_vectors_even_where_a_scan_stacks_them_to_matrices():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  decayed = {"embedding", "units_0/mixer/in_proj", "units_0/mixer/gate"}
  assert moved(optimizer(weight_decay=0.1), zeros) == decayed


def test_optimizers_that_differ_in_their_schedule_share_a_compiled_update():
  slow = dict(peak_lr=0.01, warmup_steps=2, total_steps=4, schedule="linear", final_fraction=0.5)
  fast = slow | dict(peak_lr=0.1, warmup_steps=0, total_steps=2, final_fraction=0.0)
  shared = jax.jit(optimizer(schedule="linear").update)  # Compiled with a schedule that neither of the two has.
  params = {"w": jnp.ones((2, 2))}
  for fields, rates in ((slow, [0.005, 0.01, 0.01, 0.0075]), (fast, [0.1, 0.05, 0.0, 0.0])):
    state = optimizer(**fields).init(params)
    for rate in rates:  # The gradient is constant, so the size of each Adam step is the learning rate.
      updates, state = shared({"w": jnp.full((2, 2), 0.1)}, state, params)
      np.testing.assert_allclose(updates["w"], -rate, rtol=1e-3, atol=1e-9)
  assert shared._cache_size() == 1


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(schedule="cosin"), "did you mean 'cosine'"),
    (dict(kind="moun"), "did you mean 'muon'"),
    (dict(peak_lr=0.0), "peak_lr=0.0"),
    (dict(clip_norm=0.0), "clip_norm=0.0"),
  ],
)
def test_a_bad_setting_is_named(fields, said):
  with pytest.raises(UserError, match=said):
    optimizer(**fields)


def test_a_frozen_pattern_that_matches_nothing_is_refused():
  with pytest.raises(UserError, match="/router"):
    optimizer(frozen=("/router$",)).init(PARAMS)


def test_a_restored_state_takes_the_schedule_of_more_steps_and_keeps_its_moments():
  params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  short, long = (optimizer(total_steps=steps, schedule="linear", frozen=("bias$",)) for steps in (10, 20))
  state = new_state(short, params)
  _, moments = short.update(params, state.opt_state, params)
  state = with_schedule_of(long, state.replace(opt_state=moments))
  # At step 1 of 20 the rate is 0.95 of the peak; of 10 steps it were 0.9. Adam's second equal update has size 1.
  updates, _ = long.update(params, state.opt_state, params)
  np.testing.assert_allclose(updates["w"], -0.1 * 0.95, rtol=1e-5)
  again = with_schedule_of(short, state)
  jax.tree.map(np.testing.assert_array_equal, again.opt_state, moments)


def test_an_optimizer_that_would_train_nothing_is_refused():
  with pytest.raises(UserError, match="matches all parameters"):
    optimizer(frozen=(".*",)).init({"a": jnp.ones(2), "b": jnp.ones(2)})
