"""The weights that sampling uses are a copy that changes no number, and with which no weight moves for a token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemocascade.config import ModelConfig
from nemocascade.mesh import make_mesh
from nemocascade.model.sampling_weights import DENSE_ROWS, STEPS, for_steps
from nemocascade.rollout.sampling import Options
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.resharding import for_sampling

pytestmark = pytest.mark.usefixtures("compiled_fast")
V, B, T = 64, 8, 12
PROMPTS = np.random.default_rng(0).integers(0, V, (B, 5)).tolist()


def make(mesh=(1, 1), pattern="M*E-", **how):
  """(programs, the trainer's parameters)."""
  c = ModelConfig(
    vocab_size=V, hidden_size=16, hybrid_override_pattern=pattern, num_attention_heads=4, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, chunk_size=8, n_routed_experts=8, intermediate_size=16,
    moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, initializer_range=0.3, **how,
  )  # fmt: skip
  programs = Programs(c, make_mesh(*mesh))
  return programs, jax.device_put(programs.fresh_params(jax.random.key(0)), places(programs.template))


def places(tree):
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def sampled(programs, params):
  """(tokens_BT, log-probabilities of the sampled ones, the decode program's text)."""
  engine, key = programs.engine(6, T), jax.random.key(1)
  d = engine.start(params, PROMPTS, 1)
  text = engine.decode_fn.lower(params, d, key, np.int32(T), np.int32(-1)).compile().as_text()
  d = engine.decode(params, d, key)
  return np.asarray(d.tokens_BT), np.asarray(d.behaviour_logprobs_BT), text


def test_weights_of_products_in_bf16_give_the_same_bits():
  programs, params = make(dtype="bfloat16")
  weights, cost = for_sampling(programs, params)
  dtypes = {path[-1].key: str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
  assert dtypes["in_proj"] == dtypes["embedding"] == dtypes["up_proj"] == "bfloat16"
  assert dtypes["gate"] == dtypes["A_log"] == dtypes["weight"] == "float32"
  copied = sum(leaf.nbytes for leaf in jax.tree.leaves(weights) if leaf.dtype == jnp.bfloat16)
  assert cost["rollout/reshard_bytes"] == copied > 0 and cost["time/reshard_ms"] > 0
  (tokens_BT, logprobs_BT, _), (tokens_there, logprobs_there, _) = sampled(programs, weights), sampled(programs, params)
  np.testing.assert_array_equal(tokens_BT, tokens_there)
  np.testing.assert_array_equal(logprobs_BT, logprobs_there)


def test_on_one_device_in_the_trainers_dtype_nothing_is_copied():
  programs, params = make()
  weights, cost = for_sampling(programs, params)
  assert all(a is b for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(params), strict=True))
  assert cost["rollout/reshard_bytes"] == 0


def test_experts_that_lie_side_by_side_take_the_same_step():
  programs, params = make(pattern="ME-E-E-")
  c, model, tokens_B = programs.config, programs.model, jnp.arange(B)
  weights = for_steps(c, programs.mesh, params, B)
  shapes = [leaf.shape for leaf in jax.tree.leaves(weights[STEPS])]
  N = (c.n_routed_experts + 1) * 16  # With the shared expert. The blocks "E-" are scanned.
  assert sorted(shapes) == [(3, 16, N), (3, N, 16)]
  _, state = model.apply({"params": params}, jnp.array(PROMPTS), jnp.full(B, 5), T, method="prefill")
  step = jax.jit(lambda weights: model.apply(weights, state, tokens_B, tokens_B >= 0, method="step")[1])
  np.testing.assert_allclose(step(weights), step({"params": params}), rtol=1e-4, atol=1e-5)
  wide, latent = (make(**how)[0].config for how in (dict(num_experts_per_tok=1), dict(moe_latent_size=8)))
  for config, mesh, rows in (
    (c, make_mesh(2, 4), B), (c, programs.mesh, DENSE_ROWS + 1), (wide, programs.mesh, B), (latent, programs.mesh, B),
  ):  # fmt: skip
    assert for_steps(config, mesh, params, rows) == {"params": params}


def test_on_a_mesh_a_token_moves_no_weight_and_is_the_token_of_sharded_weights():
  programs, params = make((2, 4))
  weights, cost = for_sampling(programs, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    routed = path[-1].key in ("up_proj", "down_proj") and leaf.ndim == 3
    assert leaf.sharding.is_equivalent_to(
      jax.NamedSharding(programs.mesh, PartitionSpec(*["expert"] * routed)), leaf.ndim
    )
  in_each = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(weights))
  assert 0 < cost["rollout/reshard_bytes"] <= in_each
  tokens_BT, logprobs_BT, text = sampled(programs, weights)
  sharded, _ = make((2, 4), sampling_weights="sharded")
  assert sharded.sampling_weights(params) is params
  tokens_there, logprobs_there, text_there = sampled(sharded, params)
  np.testing.assert_array_equal(tokens_BT, tokens_there)
  np.testing.assert_allclose(logprobs_BT, logprobs_there, atol=1e-5)
  # Tokens, at most 8 of 16 numbers, still go to the devices of their experts.
  assert moved(text) <= B * 16 < moved(text_there)
  assert gathers_of_prefill(programs, weights) == 0 < gathers_of_prefill(sharded, params)


def gathers_of_prefill(programs, params):
  """The arrays that prefilling gathers explicitly over the two devices of `data`: experts are the only ones."""
  arrays = np.zeros((B, 6), np.int32), np.ones(B, np.int32), Options().by_row(B), np.zeros(B, bool)
  text = programs.engine(6, T).start_fn.lower(params, *arrays, 1, B, False, 0, 0).as_text()
  return len(re.findall(r"all_gather.*: tensor<4x2xi64>", text))


def moved(text: str) -> int:
  """The most numbers of an array that a collective of a compiled program returns."""
  shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)", text)
  return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)
