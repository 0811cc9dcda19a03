"""Routed matmul: every form equals a loop over rows, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.errors import UserError
from nemocascade.kernels import routed_matmul as kernel
from nemocascade.kernels import routed_matmul_gpu as gpu
from nemocascade.kernels import routed_matmul_tpu as tpu
from nemocascade.kernels.groups import group_bounds, group_tiles, in_halves, parts_of_visits, tile_visits
from nemocascade.kernels.routed_matmul_blocked import FEWEST, MOST, choose_block
from nemocascade.kernels.routed_matmul_tpu import Tile, choose_tile
from nemocascade.kernels.routed_mlp_padded import capacity

E, D, F, N = 5, 136, 200, 44  # Not divisible by the tiles' rows or columns.
TILE = Tile(rows=16, chunk=128, part=8)
FORMS = {
  "definition": dict(form="definition"),
  "blocked": dict(form="blocked", block=8),
  "tpu": dict(form="tpu", tile=TILE, interpret=True),
  "gpu": dict(form="gpu", tile=gpu.Tile(rows=16, columns=64, depth=32), interpret=True),
}
# The default forms of a CPU, a TPU and a GPU.
MLP_FORMS = {
  "own": {},
  "tpu": dict(form="tpu", tile=Tile(rows=256, chunk=128, part=64), interpret=True),
  "gpu": dict(form="gpu", tile=gpu.Tile(rows=128, columns=64, depth=64), interpret=True),
}
# Relative to the largest value: fp32 sums in another order; bf16 rounds results once or twice.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}
LAYOUTS = st.one_of(
  st.lists(st.integers(0, 9), min_size=E, max_size=E),  # Some rows may belong to no expert.
  st.integers(0, E - 1).map(lambda e: [N if i == e else 0 for i in range(E)]),  # One expert has all rows.
  st.lists(st.sampled_from([0, 0, 8, 16]), min_size=E, max_size=E),  # Whole tiles; the sum may exceed N.
)


def loop(x, w, dy, sizes, offset=0):
  """(y, dx, dw) in fp64 by a loop over rows; w holds the experts from `offset` on."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
  for n, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)[: len(x)] - offset):
    if 0 <= e < len(w):
      y[n], dx[n] = x[n] @ w[e], w[e] @ dy[n]
      dw[e] += np.outer(x[n], dy[n])
  return y, dx, dw


@functools.partial(jax.jit, static_argnames=("form",))
def value_and_gradients(x, w, dy, sizes, offset, form):
  y, back = jax.vjp(lambda x, w: kernel.routed_matmul(x, w, sizes, offset=offset, **FORMS[form]), x, w)
  return y, *back(dy)


@functools.cache
def inputs(dtype, experts=E):
  shapes = (N, D), (experts, D, F), (N, F)
  return [jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate(shapes)]


def compare(got, expected, dtype):
  for mine, theirs in zip(got, expected, strict=True):
    assert mine.dtype == dtype
    scale = max(np.abs(theirs).max(), 1.0)
    np.testing.assert_allclose(np.asarray(mine, np.float64) / scale, theirs / scale, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(sizes=LAYOUTS, dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_value_and_gradients_are_those_of_a_loop_for_any_groups(form, sizes, dtype):
  x, w, dy = inputs(dtype)
  got = value_and_gradients(x, w, dy, jnp.array(sizes, jnp.int32), 0, form)
  compare(got, loop(x, w, dy, sizes), dtype)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=10)
@given(sizes=LAYOUTS, offset=st.integers(0, E - 2))
def test_a_shard_of_the_experts_does_its_own_rows(form, sizes, offset):
  x, w, dy = inputs(jnp.float32, experts=2)
  got = value_and_gradients(x, w, dy, jnp.array(sizes, jnp.int32), offset, form)
  compare(got, loop(x, w, dy, sizes, offset), jnp.float32)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_nobodys_may_hold_anything(form):
  x, w, dy = inputs(jnp.float32)
  sizes = [3, 0, 17, 1, 0]
  got = value_and_gradients(x.at[21:].set(jnp.nan), w, dy.at[21:].set(jnp.inf), jnp.array(sizes, jnp.int32), 0, form)
  compare(got, loop(x.at[21:].set(0), w, dy.at[21:].set(0), sizes), jnp.float32)


def test_the_platforms_own_form_equals_ragged_dot():
  x, w, _ = inputs(jnp.float32)
  sizes = jnp.array([3, 0, 40, 1, 0], jnp.int32)
  np.testing.assert_allclose(kernel.routed_matmul(x, w, sizes), jax.lax.ragged_dot(x, w, sizes), atol=1e-4)


def test_every_row_is_visited_once_by_its_own_group():
  sizes = np.array([3, 0, 40, 1, 0, 9])
  bounds = group_bounds(jnp.array(sizes), 60, 6)
  group_V, tile_V, count = tile_visits(bounds[:-1], bounds[1:], 60, 16, empty=True)
  seen = [
    (int(g), row)
    for g, t in zip(group_V[:count], tile_V[:count], strict=True)
    for row in range(16 * int(t), 16 * int(t) + 16)
    if bounds[g] <= row < bounds[g + 1]
  ]
  assert seen == list(zip(np.repeat(np.arange(6), sizes), range(53), strict=True))
  assert set(np.asarray(group_V[:count])) == set(range(6))


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 40), min_size=4, max_size=4), before=st.integers(0, 20), whole=st.booleans())
def test_two_halves_have_every_visit_once_and_equal_work_but_for_a_tile(sizes, before, whole):
  N, tile, part = 200, 8, 4
  bounds = before + group_bounds(jnp.array(sizes, jnp.int32), N, 4)
  group_V, tile_V, count = tile_visits(bounds[:-1], bounds[1:], N, tile, empty=True)
  work_V = parts_of_visits(bounds[:-1], bounds[1:], group_V, tile_V, tile, part)
  first_H, last_H = in_halves(work_V, tile_V, count, whole_tiles=whole)
  visits = [list(range(first, last)) for first, last in zip(first_H.tolist(), last_H.tolist(), strict=True)]
  assert all(visits) and (sum(visits, []) == list(range(count)) or len(set(tile_V[:count].tolist())) == 1)
  rows = [{(int(tile_V[v]) * tile + i) // part for i in range(tile)} for v in range(count)]
  low, high = np.asarray(bounds)[group_V], np.asarray(bounds)[group_V + 1]
  by_hand = [len({p for p in rows[v] if p * part < high[v] and (p + 1) * part > low[v]}) if high[v] > low[v] else 0
             for v in range(count)]  # fmt: skip
  assert work_V[:count].tolist() == by_hand
  work = [sum(by_hand[v] for v in half) for half in visits]
  assert abs(work[0] - work[1]) <= (4 * tile // part if whole else tile // part)


def test_a_single_visit_is_in_both_halves():
  first_H, last_H = in_halves(jnp.ones(2, jnp.int32), jnp.zeros(2, jnp.int32), jnp.int32(1), whole_tiles=True)
  assert first_H.tolist() == [0, 0] and last_H.tolist() == [1, 1]


@pytest.mark.parametrize("weights", [False, True])
def test_both_cores_of_a_chip_share_the_kernels_for_tpus(weights):
  """The first dimension of the grid is parallel and has two halves, which XLA gives to the two cores."""
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  bounds = jax.ShapeDtypeStruct((5,), jnp.int32)
  if weights:
    traced = functools.partial(tpu.weight_product, dtype=jnp.bfloat16), of(4096, 256), of(4096, 200), bounds
  else:
    traced = tpu.product, of(4096, 256), of(4, 256, 200), bounds
  text = str(jax.make_jaxpr(traced[0])(*traced[1:]))
  assert "dimension_semantics=('parallel', 'parallel', 'arbitrary')" in text and "grid=(2, 1, " in text


def test_every_row_is_in_one_tile_of_its_own_group():
  sizes = np.array([3, 0, 40, 1, 0, 16])
  bounds = group_bounds(jnp.array(sizes), 60, 6)
  group_V, start_V, end_V = group_tiles(bounds[:-1], bounds[1:], 60, 16)
  seen = [
    (int(g), row)
    for g, start, end in zip(group_V, start_V, end_V, strict=True)
    for row in range(int(start), min(int(start) + 16, int(end)))
  ]
  assert seen == list(zip(np.repeat(np.arange(6), sizes), range(60), strict=True))


def test_blocks_pad_few_rows_of_a_mean_group():
  sizes = [(N, E, choose_block(N, E)) for E in (4, 16, 128) for N in (1, 500, 4096, 20480, 10**6)]
  assert all(FEWEST <= block <= MOST for _, _, block in sizes)
  assert all(block == FEWEST or 8 * block * E <= N for N, E, block in sizes)
  assert {block for *_, block in sizes} >= {FEWEST, MOST}


def test_equal_groups_have_room_for_nearly_all_random_loads():
  rng = np.random.default_rng(0)
  for N, E in ((64, 16), (256, 16), (20480, 16), (10**6, 128)):
    loads = rng.multinomial(N, np.full(E, 1 / E), size=200)
    assert np.mean(loads <= capacity(N, E)) > 0.95
    assert capacity(N, E) % 8 == 0 and capacity(N, E) < N / E + 2 * (N / E) ** 0.5 + 9


def test_tiles_are_cut_to_the_shapes():
  assert choose_tile(32768 * 6, 128, 2688, 1856).chunk == 384
  assert choose_tile(4096 * 6, 128, 2688, 1856).rows < choose_tile(262144 * 6, 128, 2688, 1856).rows
  assert choose_tile(64, 8, 64, 64).chunk == 128
  assert gpu.choose_tile(32768 * 6, 128, 2688, 1856) == gpu.Tile()
  assert gpu.choose_tile(4096 * 6, 128, 2688, 1856) == gpu.Tile(rows=128)
  small = gpu.choose_tile(64, 8, 40, 24, jnp.float32)  # Tile sides are powers of two, at least 16.
  assert (small.rows, small.columns, small.depth, small.warps) == (16, 32, 32, 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_programs_for_gpus_are_lowered_to_kernels_that_are_well_formed(dtype, monkeypatch):
  """Lowers the MLP at Nano's shapes on any machine; it uses `finish` and `extras`."""
  from jax._src.pallas.triton import lowering  # JAX itself does not verify a kernel.

  lower, sound = lowering.lower_jaxpr_to_triton_module, []

  def verified(*args, **kwargs):
    result = lower(*args, **kwargs)
    sound.append(result.module.operation.verify())
    return result

  monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", verified)
  T, X, D, F = 4096, 6, 2688, 1856
  of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  loss = lambda x, u, d, e, w: jnp.sum(kernel.routed_mlp(x, u, d, e, w)[0].astype(jnp.float32))
  gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 4)))
  traced = gradients.trace(of(T, D), of(128, D, F), of(128, F, D), of(T, X, dtype=jnp.int32), of(T, X))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("xla.gpu.triton") == 6  # Two products, two with transposed experts, two for weight gradients.
  assert all(sound) and sound


def mlp_inputs(experts, tokens, dtype=jnp.float32, crowded=False):
  """`crowded`: nearly all tokens choose the same expert."""
  keys = jax.random.split(jax.random.key(1), 6)
  x_TD = jax.random.normal(keys[0], (tokens, 72), dtype)
  up = jax.random.normal(keys[1], (experts, 72, 40), dtype) / 72**0.5
  down = jax.random.normal(keys[2], (experts, 40, 72), dtype) / 40**0.5
  liked_TE = jax.random.uniform(keys[3], (tokens, experts)).at[:, 1].add(0.9 * crowded)
  expert_TX = jax.lax.top_k(liked_TE, 2)[1]
  return x_TD, up, down, expert_TX, jax.random.uniform(keys[4], (tokens, 2), dtype)


@pytest.mark.parametrize("form", MLP_FORMS)
@pytest.mark.parametrize(
  "experts, tokens, crowded", [(4, 300, False), (16, 700, False), (16, 700, True), (16, 9, True)]
)
def test_routed_mlp_is_a_loop_over_tokens(experts, tokens, crowded, form):
  x_TD, up, down, expert_TX, weight_TX = mlp_inputs(experts, tokens, crowded=crowded)
  x64, up64, down64 = (np.asarray(a, np.float64) for a in (x_TD, up, down))
  expected = np.zeros(x64.shape)
  for t in range(tokens):
    for e, w in zip(np.asarray(expert_TX[t]), np.asarray(weight_TX[t]), strict=True):
      expected[t] += w * (np.maximum(x64[t] @ up64[e], 0) ** 2 @ down64[e])
  mlp = jax.jit(functools.partial(kernel.routed_mlp, **MLP_FORMS[form]))
  got, rows = mlp(x_TD, up, down, expert_TX, weight_TX)
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)  # fp32 against fp64.
  assert int(rows) == expert_TX.size
  lost_TX = expert_TX.at[:3, 0].set(jnp.array([experts, -1, experts + 9]))
  got, rows = mlp(x_TD, up, down, lost_TX, weight_TX)
  assert int(rows) == expert_TX.size - 3
  alone, _ = mlp(x_TD, up, down, expert_TX, weight_TX.at[:3, 0].set(0))
  np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-6)])
def test_all_experts_side_by_side_are_the_routed_mlp_and_the_shared_expert(dtype, tolerance):
  x_TD, up, down, expert_TX, weight_TX = mlp_inputs(8, 9, dtype)
  side_by_side = lambda up: jnp.concatenate(list(up), axis=1)
  up_DN, down_ND = side_by_side(jnp.concatenate([up, up[:2]])), jnp.concatenate([down, down[2:4]]).reshape(-1, 72)
  got, rows = jax.jit(kernel.dense_mlp, static_argnums=(5, 6))(x_TD, up_DN, down_ND, expert_TX, weight_TX, 8, 40)
  assert int(rows) == expert_TX.size and got.dtype == dtype
  x, up, down, weight_TX = (a.astype(jnp.float32) for a in (x_TD, up, down, weight_TX))
  shared = jnp.square(jax.nn.relu(x @ side_by_side(up[:2]))) @ down[2:4].reshape(-1, 72)
  expected = kernel.routed_mlp(x, up, down, expert_TX, weight_TX, form="definition")[0] + shared
  np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("form", MLP_FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-5)])
@pytest.mark.parametrize("crowded", [False, True])
def test_gradients_of_routed_mlp_are_the_definitions(form, crowded, dtype, tolerance):
  """Gradients of x, of both matrices and of the weights; bf16 against the fp32 definition on the same inputs."""
  x_TD, up, down, expert_TX, weight_TX = mlp_inputs(16, 700, dtype, crowded)

  def gradients(form, *args):
    loss = lambda x, u, d, w: jnp.sum(jnp.sin(kernel.routed_mlp(x, u, d, expert_TX, w, **form)[0].astype(jnp.float32)))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)

  inputs = x_TD, up, down, weight_TX
  expected = gradients(FORMS["definition"], *(a.astype(jnp.float32) for a in inputs))
  for mine, theirs in zip(gradients(MLP_FORMS[form], *inputs), expected, strict=True):
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(np.asarray(mine, np.float32) / scale, theirs / scale, atol=tolerance)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("tokens", (60, 700))
def test_a_row_has_the_same_bits_within_an_expert_s_equal_share_and_beyond_it(tokens, dtype):
  """Rows change places, so that other rows are beyond the equal share of the crowded expert."""
  *args, weight_TX = mlp_inputs(16, tokens, dtype, crowded=True)
  order_T = jax.random.permutation(jax.random.key(7), tokens)

  @jax.jit
  def with_gradient(x_TD, up, down, expert_TX, weight_TX):
    y_TD, pull = jax.vjp(lambda x: kernel.routed_mlp(x, up, down, expert_TX, weight_TX)[0], x_TD)
    return y_TD, *pull(jnp.cos(y_TD))

  x_TD, up, down, expert_TX = args
  moved = with_gradient(x_TD[order_T], up, down, expert_TX[order_T], weight_TX[order_T])
  for mine, there in zip(with_gradient(*args, weight_TX), moved, strict=True):
    np.testing.assert_array_equal(np.asarray(mine[order_T], np.float32), np.asarray(there, np.float32))


def test_what_does_not_fit_is_refused_in_a_line():
  x, w, _ = inputs(jnp.float32)
  sizes = jnp.array([3, 0, 40, 1, 0], jnp.int32)
  with pytest.raises(UserError, match="unknown form of the routed matmul 'blockd': did you mean 'blocked'"):
    kernel.routed_matmul(x, w, sizes, form="blockd")
  with pytest.raises(UserError, match="rows have 135 columns, but the experts' matrices have 136 rows"):
    kernel.routed_matmul(x[:, 1:], w, sizes)
  with pytest.raises(UserError, match="rows are bfloat16, but the experts are float32"):
    kernel.routed_matmul(x.astype(jnp.bfloat16), w, sizes)
  with pytest.raises(UserError, match="offset must be 0 to 0"):
    kernel.routed_matmul(x, w, sizes, offset=1)
