"""The hybrid computes the same function in four forms: rows, rows after prompts, decoding, NumPy."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # The public form only prints.

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model.decode_state import repeat_state
from nemocascade.model.hybrid import Hybrid, init_params, logical_axes
from nemocascade.model.pattern import plan
from nemocascade.model.size import count_params
from nemocascade.types import Prompts

pytestmark = pytest.mark.usefixtures("compiled_fast")

V, T = 50, 24
PATTERNS = ["M", "E", "*", "-", "*M*M*M", "MEMEME*ME-"]


def make(pattern, **fields):
  c = ModelConfig(
    vocab_size=V, hidden_size=16, hybrid_override_pattern=pattern, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=8,
    n_groups=2, chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=8, intermediate_size=8, initializer_range=0.5, **fields,
  )  # fmt: skip
  return c, Hybrid(c), init_params(c, jax.random.key(0))


def apply(model, params, method, *args):
  """Applies a compiled method, because eager execution is many times slower. Integer arguments are static."""
  static = tuple(i + 1 for i, a in enumerate(args) if isinstance(a, int))
  fn = jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method), static_argnums=static)
  return fn(params, *args)


def tokens(B=3, length=T):
  return jax.random.randint(jax.random.key(1), (B, length), 0, V)


@pytest.mark.parametrize("pattern, remat", [*((p, "none") for p in PATTERNS), (PATTERNS[-1], "block")])
def test_rows_after_a_prompt_taken_in_once_are_whole_rows(pattern, remat):
  """Compares log-probabilities, entropies, loads and gradients.

  Some prompts are shorter than the convolution, some longer.
  """
  _, model, params = make(pattern, remat=remat)
  G, P, N = 2, 9, 11
  prompts = Prompts(tokens(3, P), jnp.array([9, 2, 5]))
  place_BT, own_BT = jnp.arange(P + N)[None], jax.random.randint(jax.random.key(2), (3 * G, N), 0, V)
  length_B, rest_B = jnp.repeat(prompts.length_Q, G)[:, None], jnp.array([11, 4, 1, 11, 7, 9])[:, None]
  inside_BT = (place_BT[:, :N] < rest_B).astype(jnp.int32)

  def whole(p):
    behind_BT = jnp.take_along_axis(own_BT, jnp.clip(place_BT - length_B, 0, N - 1), axis=1)
    ahead_BT = jnp.pad(jnp.repeat(prompts.tokens_QP, G, axis=0), ((0, 0), (0, N)))
    token_BT = jnp.where(place_BT < length_B, ahead_BT, behind_BT)
    s = model.apply({"params": p}, token_BT, (place_BT < length_B + rest_B).astype(jnp.int32), method="score")
    cut = lambda a_BT: jnp.take_along_axis(a_BT, length_B + place_BT[:, :N], axis=1)
    return jnp.stack([cut(s.logprobs_BT), cut(s.entropy_BT)]) * inside_BT[None], s.routing

  def after(p):
    prefix, of_prompts = model.apply({"params": p}, prompts, method="take_in")
    args = own_BT, inside_BT, None, None, (prefix, prompts.length_Q)
    s = model.apply({"params": p}, *args, method="score")
    return jnp.stack([s.logprobs_BT, s.entropy_BT]), (of_prompts, s.routing)

  loss = lambda p, fn: (jnp.sum(jnp.sin((out := fn(p))[0])), out)
  run = lambda fn: jax.jit(jax.grad(functools.partial(loss, fn=fn), has_aux=True))(params)
  (grads, (said, routing)), (grads_there, (said_there, routing_there)) = run(after), run(whole)
  chex.assert_trees_all_close(said, said_there, atol=2e-4)
  chex.assert_trees_all_close(grads, grads_there, rtol=2e-3, atol=2e-3)
  if routing_there is not None:  # The tokens of a prompt are counted once.
    load, load_there = (jnp.sum(r.load_LE, axis=1) for r in (routing[1], routing_there))
    total = lambda B1: jnp.full_like(load, 2 * jnp.sum(B1))
    chex.assert_trees_all_close(load_there, total(length_B + rest_B))
    chex.assert_trees_all_close((load, jnp.sum(routing[0].load_LE, axis=1)), (total(rest_B), total(prompts.length_Q)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_by_tokens_and_by_chunks_is_the_full_forward(pattern):
  """A chunk is shorter and longer than the convolution; a row that takes in nothing keeps every bit of its state."""
  _, model, params = make(pattern)
  token_BT, length_B, rows = tokens(), jnp.array([7, 1, 12]), jnp.arange(3)
  full_BTV = apply(model, params, "logits", token_BT, jnp.ones((3, T), jnp.int32))
  logits_BV, state = apply(model, params, "prefill", token_BT[:, :13], length_B, T)
  step = jax.jit(lambda s, t: model.apply({"params": params}, s, t, t >= 0, method="step"))
  extend = jax.jit(lambda s, t, n: model.apply({"params": params}, s, t, n, method="extend"))
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-3)
  close(logits_BV, full_BTV[rows, length_B - 1])
  for count_B in [(1, 1, 1), (5, 2, 0), (0, 5, 1), (1, 1, 1), (3, 5, 4), (1, 1, 1)]:
    before, n_B = state, jnp.array(count_B)
    if max(count_B) == 1:
      state, logits_BV = step(before, token_BT[rows, before.length_B])
    else:
      place_BT = jnp.minimum(before.length_B[:, None] + jnp.arange(5)[None], T - 1)
      state, logits_BV = extend(before, jnp.take_along_axis(token_BT, place_BT, axis=1), n_B)
    assert state.length_B.tolist() == (before.length_B + n_B).tolist()
    for row in rows:
      if count_B[row]:
        close(logits_BV[row], full_BTV[row, state.length_B[row] - 1])
      else:
        chex.assert_trees_all_equal(row_of(state, row), row_of(before, row))


def row_of(state, row):
  take = lambda a, axis: jnp.take(a, row, axis=axis)
  return [
    jax.tree.map(functools.partial(take, axis=int(s)), u) for u, s in zip(state.units, state.stacked, strict=True)
  ]


def test_a_resting_row_goes_on_as_if_it_had_not_rested():
  _, model, params = make("ME*")
  token_BT, length_B = tokens(), jnp.array([5, 5, 5])
  step = jax.jit(lambda s, t, a: model.apply({"params": params}, s, t, a, method="step"))
  _, state = apply(model, params, "prefill", token_BT[:, :8], length_B, T)
  on = jnp.ones(3, bool)
  _, expected = step(state, token_BT[:, 5], on)
  rested, _ = step(state, token_BT[:, 9], ~on)
  _, got = step(rested, token_BT[:, 5], on)
  chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_future_does_not_reach_back(pattern):
  _, model, params = make(pattern)
  token_BT = tokens()
  changed = token_BT.at[:, 15:].set((token_BT[:, 15:] + 1) % V)
  ones = jnp.ones((3, T), jnp.int32)
  logits = lambda t: apply(model, params, "logits", t, ones)[:, :15]
  chex.assert_trees_all_close(logits(token_BT), logits(changed), atol=1e-5)


@pytest.mark.parametrize("pattern", ["MM", "EE", "**", "--", "MEMEME*ME-"])
def test_in_bf16_it_is_nearly_what_it_is_in_fp32(pattern):
  """Compares log-probabilities and the whole gradient. All experts are chosen, so rounding changes no choice."""
  c, _, params = make(pattern, remat="block")
  token_BT, ids_BT = tokens(8), jnp.broadcast_to(jnp.where(jnp.arange(T) < 10, 1, 2)[None], (8, T))

  def found(dtype):
    model = Hybrid(dataclasses.replace(c, dtype=dtype, num_experts_per_tok=4))

    def loss(p):
      logprobs_BT = model.apply({"params": p}, token_BT, ids_BT, method="score").logprobs_BT
      return jnp.mean(logprobs_BT**2), logprobs_BT

    (_, logprobs_BT), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}  # The dtype of the parameters.
    return logprobs_BT, jnp.concatenate([g.reshape(-1) for g in jax.tree.leaves(grads)])

  (near_BT, near), (there_BT, there) = found("bfloat16"), found("float32")
  # One rounding is 2^-8; logits of size 3 go through a dozen of them.
  assert float(jnp.sqrt(jnp.mean((near_BT - there_BT) ** 2))) < 0.1
  assert float(near @ there / jnp.linalg.norm(near) / jnp.linalg.norm(there)) > 0.995


def test_repeats_are_found():
  assert plan("MEM*E") == [("MEM*E", 1)]
  assert plan("MEMEMEME") == [("ME", 4)]
  assert plan("MEME*") == [("MEME*", 1)]  # Two repeats are not worth a loop.
  nano = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
  assert plan(nano)[0] == ("MEMEM*E", 5)
  assert "".join(unit * n for unit, n in plan(nano)) == nano


def test_repeated_states_are_copies_side_by_side():
  _, model, params = make("MEMEME*")
  token_BT = tokens()
  _, state = apply(model, params, "prefill", token_BT, jnp.array([9, 4, 20]), 30)
  step = jax.jit(lambda s, t: model.apply({"params": params}, s, t, t >= 0, method="step")[1])
  expected = jnp.repeat(step(state, token_BT[:, 0]), 2, axis=0)
  got = step(repeat_state(state, 2), jnp.repeat(token_BT[:, 0], 2))
  chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_every_parameter_has_an_axis_name_for_each_dimension():
  c, _, params = make("MEMEME*-")
  axes = logical_axes(c)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  assert [len(n) for n in names] == [p.ndim for p in jax.tree.leaves(params)]
  assert count_params(c) == sum(p.size for p in jax.tree.leaves(params))


def test_an_unknown_block_is_named():
  with pytest.raises(UserError, match="'X'"):
    make("MXE")


def test_forward_is_a_plain_numpy_loop():
  """An fp64 loop over tokens, written from the published code.

  Sources: transformers `modeling_nemotron_h.py`, vLLM `nemotron_h.py` (no clamp of dt).
  """
  c, model, params = make("ME*-")
  token_BT = tokens(B=1, length=11)
  got = apply(model, params, "logits", token_BT, jnp.ones((1, 11), jnp.int32))[0]
  np.testing.assert_allclose(got, numpy_forward(c, params, np.asarray(token_BT[0])), rtol=2e-3, atol=2e-3)


def numpy_forward(c, params, token_T):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  silu = lambda x: x / (1 + np.exp(-x))
  norm = lambda x, w: w * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.layer_norm_epsilon)
  h = p["embedding"][token_T]
  for i, letter in enumerate(c.hybrid_override_pattern):
    block = p["units_0"][f"blocks_{i}"]
    h = h + {"M": numpy_mamba, "E": numpy_moe, "*": numpy_attention, "-": numpy_mlp}[letter](
      c, block["mixer"], norm(h, block["norm"]["weight"]), silu
    )
  return norm(h, p["norm_f"]["weight"]) @ p["lm_head"]


def numpy_mamba(c, p, x, silu):
  I, M, P, N, U = c.mamba_inner_size, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups
  z, xbc, dt = np.split(x @ p["in_proj"], [I, 2 * I + 2 * U * N], axis=-1)
  conv = np.zeros_like(xbc)
  for t in range(len(x)):
    for k in range(c.conv_kernel):
      if t - (c.conv_kernel - 1 - k) >= 0:
        conv[t] += xbc[t - (c.conv_kernel - 1 - k)] * p["conv1d"][k]
  xbc, dt = silu(conv + p["conv1d_bias"]), np.log1p(np.exp(dt + p["dt_bias"]))
  y, state = np.zeros((len(x), M, P)), np.zeros((M, P, N))
  for t in range(len(x)):
    xs = xbc[t, :I].reshape(M, P)
    B, C = xbc[t, I : I + U * N].reshape(U, N), xbc[t, I + U * N :].reshape(U, N)
    for m in range(M):
      g = m // (M // U)
      state[m] = math.exp(-math.exp(p["A_log"][m]) * dt[t, m]) * state[m] + dt[t, m] * np.outer(xs[m], B[g])
      y[t, m] = state[m] @ C[g] + p["D"][m] * xs[m]
  gated = (y.reshape(len(x), I) * silu(z)).reshape(len(x), U, -1)
  gated = gated / np.sqrt(np.mean(gated**2, -1, keepdims=True) + c.layer_norm_epsilon)
  return (gated.reshape(len(x), I) * p["norm"]) @ p["out_proj"]


def numpy_attention(c, p, x, silu):
  del silu
  K, R = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
  out = np.zeros_like(x)
  for k in range(K):
    key, value = x @ p["k_proj"][:, k], x @ p["v_proj"][:, k]
    for r in range(R):
      query = x @ p["q_proj"][:, k, r]
      for t in range(len(x)):
        s = key[: t + 1] @ query[t] / math.sqrt(c.head_dim)
        w = np.exp(s - s.max())
        out[t] += (w / w.sum()) @ value[: t + 1] @ p["o_proj"][k, r]
  return out


def numpy_moe(c, p, x, silu):
  del silu
  relu2 = lambda v: np.maximum(v, 0) ** 2
  out = relu2(x @ p["shared_up_proj"]) @ p["shared_down_proj"]
  for t in range(len(x)):
    s = 1 / (1 + np.exp(-(x[t] @ p["gate"])))
    best = np.argsort(-(s + p["e_score_correction_bias"]))[: c.num_experts_per_tok]
    for e in best:
      w = s[e] / (s[best].sum() + 1e-20) * c.routed_scaling_factor
      out[t] += w * (relu2(x[t] @ p["up_proj"][e]) @ p["down_proj"][e])
  return out


def numpy_mlp(c, p, x, silu):
  del c, silu
  return np.maximum(x @ p["up_proj"], 0) ** 2 @ p["down_proj"]


@pytest.mark.parametrize("remat, places", [("block", {"Device"}), ("offload", {"Host"})])
def test_the_backward_pass_gets_only_the_inputs_of_blocks_in_the_memory_of_the_policy(remat, places):
  _, model, params = make("M*E-", remat=remat)
  ones_BT = jnp.ones((2, T), jnp.int32)
  found = saved_residuals(lambda p: model.apply({"params": p}, ones_BT, ones_BT, method="hidden")[0], params)
  # The residual stream; the final norm is outside the blocks, and its products stay on the device.
  blocks = [a for a, why in found if a.shape == (2, T, 16) and not why.startswith("output of mul")]
  assert len(blocks) == 4 + 1 and {a.memory_space.name for a in blocks[:4]} == places
  assert not [a.shape for a, why in found if a.size > 2 * T * 16 and "argument" not in why]


@pytest.mark.parametrize("remat", ["block", "offload"])
def test_what_is_recomputed_does_not_change_the_gradient(remat):
  c, model, params = make("M-", remat=remat)
  token_BT = tokens(2)
  loss = lambda model, p: jnp.sum(model.apply({"params": p}, token_BT, token_BT * 0 + 1, method="hidden")[0] ** 3)
  of = lambda model: jax.jit(jax.grad(functools.partial(loss, model)))(params)
  chex.assert_trees_all_close(of(model), of(Hybrid(dataclasses.replace(c, remat="none"))), atol=1e-4)
