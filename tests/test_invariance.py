"""What packing, chunks and devices may not change: a document's log-probabilities, loss and gradients.

One program a (mesh, dtype) serves all laws of rows: the packing is an argument. Every token of a batch is another
word, so that the embedding's gradient is that of each token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.kernels.attention import attention_ref
from nemocascade.mesh import make_mesh
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.sequence_parallel import Layout, check_rows, layout
from nemocascade.types import Prompts

pytestmark = pytest.mark.usefixtures("compiled_fast")
B, T = 4, 48
CONFIG = ModelConfig(
  vocab_size=2 * B * T, hidden_size=16, hybrid_override_pattern="M*EM", num_attention_heads=4, head_dim=4,
  mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=8, chunk_size=16, n_routed_experts=8,
  moe_intermediate_size=8, moe_shared_expert_intermediate_size=8, initializer_range=0.1, router_loss=True,
  sequence_parallel=True,
)  # fmt: skip
# (data, expert) -> tokens of a chunk of the scan. Runs have 24, 12 and 6 tokens; 4 rows never fill 8 devices.
GRIDS = {None: 16, (4, 2): 24, (2, 4): 5, (1, 8): 4}


def lengths(documents: int) -> list[int]:
  """Random lengths, of 44 tokens together."""
  cuts = np.random.default_rng(documents).choice(np.arange(1, 44), documents - 1, replace=False)
  return np.diff([0, *sorted(cuts), 44]).tolist()


# name -> the lengths of the documents of each row. The runs of 8 devices have 6 tokens.
PACKINGS = {
  "on borders": [[12, 12, 24], [24, 24], [6, 6, 6, 30], [48]],
  "off borders": [[11, 14, 23], [25, 22], [1, 46, 1], [7, 41]],
  "shorter than the convolution": [[1] * 48, [2] * 24, [5, 1, 1, 16, 1, 2, 22], [17, 2, 29]],
  "padded": [[11, 9], [3], [48], [1]],
  "random": [lengths(n) for n in (3, 5, 9, 17)],
}


def packed(name):
  row = lambda lengths: np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return jnp.array([np.pad(row(of), (0, T - sum(of))) for of in PACKINGS[name]], jnp.int32)


TOKENS = jnp.asarray(np.random.default_rng(1).permutation(B * T).reshape(B, T).astype(np.int32))


def mesh_of(grid):
  return None if grid is None else make_mesh(*grid)


@functools.cache
def params():
  return init_params(CONFIG, jax.random.key(0))


@functools.cache
def program(grid, dtype="float32"):
  """(params, tokens_BT, segment_ids_BT) -> ((loss, (logprobs_BT, entropy_BT)), gradients), jitted."""
  model = Hybrid(dataclasses.replace(CONFIG, chunk_size=GRIDS[grid], dtype=dtype), mesh_of(grid))

  def loss(params, tokens_BT, segment_ids_BT):
    s = model.apply({"params": params}, tokens_BT, segment_ids_BT, method="score")
    return jnp.sum(jnp.sin(s.logprobs_BT)) + 0.1 * s.routing.loss, (s.logprobs_BT, s.entropy_BT)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(grid, tokens_BT, segment_ids_BT, dtype="float32"):
  return jax.device_get(program(grid, dtype)(params(), tokens_BT, segment_ids_BT))


def assert_close(got, expected, tolerance=1e-5):
  """Equal up to `tolerance` of each array's largest entry."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
    scale = max(float(np.abs(b).max()), 1e-3)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("grid, dtype", [(None, "float32"), ((2, 4), "float32"), ((2, 4), "bfloat16")])
@pytest.mark.parametrize("name", PACKINGS)
def test_a_changed_document_changes_no_bit_of_another(grid, dtype, name):
  """All tokens of every second document are replaced. The others' values and gradients are bit-identical."""
  ids_BT = packed(name)
  changed_BT = (ids_BT % 2 == 0) & (ids_BT > 0)
  (_, before), grads = run(grid, TOKENS, ids_BT, dtype)
  (_, after), grads_after = run(grid, jnp.where(changed_BT, TOKENS + B * T, TOKENS), ids_BT, dtype)
  kept = np.asarray(ids_BT % 2 == 1)
  of_tokens = lambda grads: grads["embedding"][np.asarray(TOKENS)]
  for a, b in zip((*before, of_tokens(grads)), (*after, of_tokens(grads_after)), strict=True):
    np.testing.assert_array_equal(a[kept], b[kept])
  assert not changed_BT.any() or not np.array_equal(before[1], after[1])


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid])
def test_shards_of_a_row_are_one_device_in_loss_and_gradient(grid, name):
  ids_BT = packed(name)
  assert_close(run(grid, TOKENS, ids_BT), run(None, TOKENS, ids_BT))


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_documents_are_each_alone_in_loss_and_gradient(name):
  ids_BT = np.asarray(packed(name))
  (loss, (logprobs_BT, _)), grads = run(None, TOKENS, ids_BT)
  documents = [(b, n) for b in range(B) for n in range(1, ids_BT[b].max() + 1)]
  documents += [(0, 0)] * (-len(documents) % B)  # Empty rows.
  total, total_grads = 0.0, None
  for i in range(0, len(documents), B):
    places = [np.flatnonzero(ids_BT[b] == n) if n else np.array([], int) for b, n in documents[i : i + B]]
    tokens_BT, alone_BT = np.zeros((2, B, T), np.int32)
    for row, ((b, _), place) in enumerate(zip(documents[i:], places, strict=False)):
      tokens_BT[row, : len(place)], alone_BT[row, : len(place)] = TOKENS[b, place], 1
    (part, (logprobs, _)), part_grads = run(None, tokens_BT, alone_BT)
    for row, ((b, _), place) in enumerate(zip(documents[i:], places, strict=False)):
      np.testing.assert_allclose(logprobs[row, : len(place)], logprobs_BT[b, place], rtol=1e-5, atol=1e-5)
    total += part
    total_grads = part_grads if total_grads is None else jax.tree.map(np.add, total_grads, part_grads)
  assert_close((loss, grads), (total, total_grads))


@functools.cache
def taken_in(grid):
  """Prefill of prompts, and gradients through rows that continue them; 4 doesn't divide 21 and 19 tokens."""
  model = Hybrid(dataclasses.replace(CONFIG, router_loss=False, hybrid_override_pattern="M*E"), mesh_of(grid))
  prompts = Prompts(TOKENS[:2, :21], jnp.array([21, 2]))
  tokens_BT = TOKENS[:, 21:40]
  ids_BT = jnp.array([[1] * 19, [1] * 8 + [2] * 11, [1] * 2 + [2] * 2 + [3] * 9 + [0] * 6, [1] * 13 + [0] * 6])

  def loss(params):
    prefix, _ = model.apply({"params": params}, prompts, method="take_in")
    args = tokens_BT, ids_BT, None, None, (prefix, prompts.length_Q)
    s = model.apply({"params": params}, *args, method="score")
    return jnp.sum(jnp.sin(s.logprobs_BT)), s.logprobs_BT

  def prefill(params):
    """Takes in 21, 2, 7 and 12 tokens, and then 2, 1, 7 and 5 more."""
    apply = functools.partial(model.apply, {"params": params})
    logits_BV, state = apply(TOKENS[:, :21], jnp.array([21, 2, 7, 12]), 23, method="prefill")
    state, then_BV = apply(state, TOKENS[:, 21:28], jnp.array([2, 1, 7, 5]), method="extend")
    return (logits_BV, then_BV), state

  logits_BV, state = jax.jit(prefill)(params())
  inside_BS = np.arange(23)[None] < np.array([23, 3, 14, 17])[:, None]
  known = lambda path, a: np.where(inside_BS[:, None, :, None], a, 0) if path[-1].key in ("k_BKSH", "v_BKSH") else a
  units = jax.tree_util.tree_map_with_path(known, jax.device_get(state.units))
  return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params())), jax.device_get(logits_BV), units


def test_prefill_chunks_and_rows_after_shared_prompts_are_those_of_one_device():
  assert_close(taken_in((2, 4)), taken_in(None))


@pytest.mark.parametrize("form, block", [("blocked", 2), ("tpu", 8)])
def test_attention_over_runs_skips_blocks_and_is_the_definition(form, block):
  on = Layout(make_mesh(1, 8), split=True)
  keys = jax.random.split(jax.random.key(4), 3)
  ids_BT = packed("off borders")
  q, k, v = (
    jax.random.normal(key, (B, T, *shape)) for key, shape in zip(keys, ((1, 2, 4), (1, 4), (1, 4)), strict=True)
  )

  def both(fn):
    value = lambda *a: jnp.where((ids_BT > 0)[..., None, None, None], fn(*a, ids_BT), 0)
    loss = lambda *a: (jnp.sum(jnp.sin(y := value(*a))), y)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  split = both(lambda *a: on.attention(*a, form=form, block=block, interpret=form == "tpu"))
  assert_close(jax.device_get(split), jax.device_get(both(attention_ref)))


def test_runs_are_equal_and_hold_the_past_of_the_convolution():
  on = layout(CONFIG, make_mesh(1, 8), B)
  assert [on.length(n, CONFIG) for n in (1, 24, 25, 48)] == [24, 24, 32, 48]
  assert not layout(CONFIG, make_mesh(1, 8), 8).split  # Whole rows fill the devices.
  assert not layout(dataclasses.replace(CONFIG, sequence_parallel=False), make_mesh(1, 8), B).split


def test_rows_that_the_groups_of_devices_do_not_divide_are_refused():
  mesh = make_mesh(2, 4)
  check_rows("rows / pieces", 6, CONFIG, mesh)
  with pytest.raises(UserError, match="rows / pieces is 3 rows over mesh.data=2 groups"):
    check_rows("rows / pieces", 3, CONFIG, mesh)
