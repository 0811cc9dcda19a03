"""fp32 stays fp32 on a TPU: every product in the programs lowered for a TPU is checked."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemocascade import advantage
from nemocascade.config import ModelConfig
from nemocascade.kernels import attention as attention_lib
from nemocascade.kernels import ssd as ssd_lib
from nemocascade.kernels.distillation import (
  forward_kl_ref,
  kl_to_states,
  kl_to_top,
  reverse_kl_ref,
  top_logprobs,
)
from nemocascade.kernels.routed_matmul import routed_mlp
from nemocascade.kernels.token_logprob import token_logprob
from nemocascade.model.decode_state import row_axes
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.moe import balance_loss, route
from nemocascade.model.reward import RewardModel, init_reward_params
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.sampling import Options, sample
from nemocascade.step import loss, optimizer
from nemocascade.step.optimizer import make_optimizer
from nemocascade.step.policy_gradient import policy_gradient_step
from nemocascade.step.reward_model import reward_model_step
from nemocascade.step.rows import to_rows
from nemocascade.step.sft import sft_step
from nemocascade.types import Batch, Rollout, TrainState

B, T, V = 2, 12, 40
DTYPES = ["float32", "bfloat16"]

# In bf16 these operations lose what a softmax, a norm, a loss or a decay needs, and a sum loses small terms.
ROUNDED = re.compile(
  r"stablehlo\.(exponential|exponential_minus_one|log|log_plus_one|logistic|tanh|rsqrt|sqrt|power|divide)\b"
)
SUM = re.compile(r"stablehlo\.(reduce|reduce_window)\b.*(add|multiply)")
LOW = re.compile(r"[x<](bf16|f16|f8\w*)>")


def lowered(fn, *args) -> str:
  """StableHLO lowered for a TPU; this needs no TPU."""
  return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def faults(text: str) -> list[str]:
  """Lines that multiply fp32 at lower precision, or that sum or exponentiate below fp32."""
  found = []
  for line in text.splitlines():
    types = line.rpartition(" : ")[2]
    if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
      operands, _, result = types.partition("->")
      exact = "f32>" not in operands.replace("bf16>", "") or "precision = [HIGHEST, HIGHEST]" in line
      if not exact or LOW.search(result):
        found.append(line.strip())
    elif (ROUNDED.search(line) or SUM.search(line)) and LOW.search(types):
      found.append(line.strip())
  return found


def check(text: str, dtype: str = "float32", *, products: int = 0):
  """Asserts that there are no faults.

  `products` is a lower bound on the number of products, so that a check of an empty program fails.
  """
  assert not faults(text)
  assert text.count("stablehlo.dot_general") >= products
  if dtype == "float32":
    assert not LOW.search(text)


def normal(*shape, dtype="float32"):
  return jax.random.normal(jax.random.key(0), shape).astype(dtype)


def value_and_grads(fn, *argnums):
  """Value and gradients of the sum of fn's outputs, so that the lowered text includes the backward pass."""

  def total(*args):
    return sum(
      jnp.sum(out.astype(jnp.float32)) for out in jax.tree.leaves(fn(*args)) if jnp.issubdtype(out.dtype, jnp.floating)
    )

  return jax.value_and_grad(total, argnums=argnums)


@pytest.mark.parametrize(
  "fn, args",
  [
    (lambda x, w: x @ w, ("float32", "float32")),
    (lambda x, w: jnp.einsum("ij,jk->ik", x, w, precision="high"), ("float32", "float32")),
    (lambda x, w: x @ w, ("bfloat16", "bfloat16")),  # Its sums are rounded to bf16.
    (lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.float32), ("float32", "bfloat16")),
    (lambda x, w: jax.nn.softmax(x) + w, ("bfloat16", "bfloat16")),
    (lambda x, w: jax.lax.reduce(x, jnp.bfloat16(0), jax.lax.add, (0,)) + w[0], ("bfloat16", "bfloat16")),
    (lambda x, w: jax.nn.sigmoid(x) + w, ("bfloat16", "float16")),
  ],
)
def test_the_reader_finds_what_is_less_than_fp32(fn, args):
  with jax.numpy_dtype_promotion("standard"):
    assert faults(lowered(fn, *(normal(8, 8, dtype=dtype) for dtype in args)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_routers_logits_and_balance_are_fp32(dtype):
  c = ModelConfig(
    vocab_size=V, hidden_size=16, hybrid_override_pattern="E", n_routed_experts=8, n_group=2, topk_group=1
  )

  def routed(x_TD, gate_DE, bias_E):
    expert_TX, weight_TX, score_TE = route(x_TD, gate_DE, bias_E, c)
    chosen_BTE = (expert_TX[..., None] == jnp.arange(8)[None, None]).any(1).reshape(1, T, 8)
    return weight_TX, balance_loss(score_TE[None], chosen_BTE, jnp.ones((1, T), jnp.int32), 2)

  text = lowered(value_and_grads(routed, 0, 1), normal(T, 16, dtype=dtype), normal(16, 8), normal(8))
  check(text, dtype, products=3)
  assert not re.search(r"dot_general.*bf16", text)  # The rows are cast to fp32 before the product with the gate.


def test_sampling_is_fp32():
  keys = jax.random.split(jax.random.key(0), B)
  check(lowered(sample, keys, normal(B, V), Options(top_p=0.9).by_row(B)), products=2)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_states_of_the_scan_are_fp32(dtype, first):
  M, P, U, N = 4, 8, 2, 8
  ids = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([5, 5, 2]), axis=1, total_repeat_length=T)
  state = normal(1, M, P, N) if first else None
  fn = lambda x, a, b, c: ssd_lib.ssd(x, -jnp.abs(a), b, c, ids, chunk=4, initial_state=state)
  args = normal(1, T, M, P), normal(1, T, M), normal(1, T, U, N, dtype=dtype), normal(1, T, U, N, dtype=dtype)
  check(lowered(value_and_grads(fn, 0, 1, 2, 3), *args), dtype, products=10)
  step = normal(B, M, P, N), normal(B, M, P), normal(B, M), normal(B, M, N), normal(B, M, N)
  check(lowered(ssd_lib.ssd_step, *step), products=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [2, 512])
def test_attentions_softmax_is_fp32(dtype, queries):
  q, k = normal(B, T, 2, 2, 8, dtype=dtype), normal(B, T, 2, 8, dtype=dtype)
  ids = jnp.ones((B, T), jnp.int32)
  rows = lambda q, k, v: attention_lib.attention(q, k, v, ids, queries=queries)
  check(lowered(value_and_grads(rows, 0, 1, 2), q, k, k), dtype, products=6)
  cache = jnp.swapaxes(k, 1, 2)
  one = lambda q, k, v: attention_lib.decode_attention(q, k, v, jnp.full(B, 3))
  check(lowered(one, q[:, 0], cache, cache), dtype, products=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_and_distances_to_teachers_are_fp32(dtype):
  x, head = normal(B, T, 16, dtype=dtype), normal(16, V, dtype=dtype)
  tokens, wanted = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)
  fn = lambda x, head: token_logprob(x, head, tokens, wanted, temperature=0.7, chunk=8)
  check(lowered(value_and_grads(fn, 0, 1), x, head), dtype, products=3)
  teachers = normal(2, 16, V, dtype=dtype)
  for kl in (reverse_kl_ref, forward_kl_ref):
    fn = lambda x, head, kl=kl: kl_to_states(kl, x, head, wanted, x, tokens, teachers, chunk=8)
    check(lowered(value_and_grads(fn, 0, 1), x, head), dtype, products=4)
    top = jnp.zeros((B, T, 4), jnp.int32), normal(B, T, 4)
    fn = lambda x, head, kl=kl: kl_to_top(kl, x, head, wanted, *top, chunk=8)
    check(lowered(value_and_grads(fn, 0, 1), x, head), dtype, products=3)
  check(lowered(lambda x, head: top_logprobs(x, head, wanted, k=4), x, head), dtype, products=1)


@pytest.mark.parametrize(
  "form, dtype", [("definition", "float32"), ("blocked", "float32"), *itertools.product(("tpu", None), DTYPES)]
)
def test_experts_multiply_in_their_own_dtype(dtype, form):
  """Pallas' interpreter shows the products inside a kernel; a compiled kernel hides them."""
  x, up, down = normal(64, 16, dtype=dtype), normal(8, 16, 24, dtype=dtype), normal(8, 24, 16, dtype=dtype)
  expert, weight = jnp.zeros((64, 2), jnp.int32), normal(64, 2, dtype=dtype)
  fn = lambda x, up, down, weight: routed_mlp(x, up, down, expert, weight, form=form, interpret=form == "tpu")[0]
  text = lowered(value_and_grads(fn, 0, 1, 2, 3), x, up, down, weight)
  check(text, dtype, products=6 if form else 0)


# Whole programs, with the operations between the parts tested above.


@functools.cache
def model(dtype):
  c = ModelConfig(
    vocab_size=V, hidden_size=16, hybrid_override_pattern="M*E-", num_attention_heads=4, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, chunk_size=4, n_routed_experts=8,
    moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, intermediate_size=16,
    router_loss=True, dtype=dtype, moe_latent_size=8,
  )  # fmt: skip
  return c, Hybrid(c)


def apply(dtype, method):
  return lambda params, *args, **how: model(dtype)[1].apply({"params": params}, *args, method=method, **how)


def state_of(params, tx):
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


TX = make_optimizer(peak_lr=1e-3, warmup_steps=1, total_steps=9, schedule="cosine", weight_decay=0.1)
TOKENS = jnp.zeros((B, T), jnp.int32)
IDS = jnp.repeat(jnp.array([[1, 2, 0]] * B), jnp.array([5, 5, 2]), axis=1, total_repeat_length=T)


def sft_program(dtype):
  state = jax.eval_shape(lambda key: state_of(init_params(model(dtype)[0], key), TX), jax.random.key(0))
  return lowered(sft_step(apply(dtype, "score"), TX, accumulate=2), state, Batch(TOKENS, IDS, IDS > 0))


def rl_program(dtype):
  step = policy_gradient_step(
    apply(dtype, "score"), TX, ratio=loss.gspo, correction=loss.sequence_mask, kl=loss.k3, kl_weight=0.1,
    entropy_weight=0.1, accumulate=2,
  )  # fmt: skip
  row = jnp.zeros((1, B, T))
  rollout = Rollout(
    tokens_QGT=TOKENS[None], segment_ids_QGT=(IDS[None] > 0).astype(jnp.int32), loss_mask_QGT=IDS[None] > 0,
    behaviour_logprobs_QGT=row, rewards_QG=jnp.zeros((1, B)), valid_QG=jnp.ones((1, B), bool),
    reference_logprobs_QGT=row,
  )  # fmt: skip

  def whole(state, rollout):
    rows, count = to_rows(rollout, advantage.ADVANTAGES["grpo"](rollout), loss.sequence_mean)
    return step(state, rows, count)

  state = jax.eval_shape(lambda key: state_of(init_params(model(dtype)[0], key), TX), jax.random.key(0))
  return lowered(whole, state, rollout)


def reward_program(dtype):
  c = model(dtype)[0]
  reward = lambda params, *rows: RewardModel(c).apply({"params": params}, *rows)
  state = jax.eval_shape(lambda key: state_of(init_reward_params(c, key), TX), jax.random.key(0))
  rows = TOKENS, (IDS > 0).astype(jnp.int32)
  return lowered(reward_model_step(reward, TX), state, rows, rows)


def rollout_program(dtype):
  engine = Engine(
    apply(dtype, "prefill"), apply(dtype, "step"), apply(dtype, "extend"), row_axes, prompt_tokens=T - 2, total_tokens=T
  )
  params = jax.eval_shape(lambda key: init_params(model(dtype)[0], key), jax.random.key(0))

  def whole(params, key, options, held_B):
    d = engine.start_fn(params, TOKENS[:, : T - 2], jnp.full(B, 3), options, held_B, 2, B, True, 2, B)
    args = jnp.zeros(2, jnp.int32), jnp.zeros((2, 4), jnp.int32), jnp.full(2, 4), jnp.full(2, 4)
    return engine.extend_fn(params, engine.decode_fn(params, d, key, 9, 0)[0], *args)

  return lowered(whole, params, jax.random.key(0), Options(top_p=0.9).by_row(2 * B), jnp.ones(2 * B, bool))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", [sft_program, rl_program, reward_program, rollout_program])
def test_whole_programs_sum_and_exponentiate_in_fp32(program, dtype):
  check(program(dtype), dtype, products=20)


def test_the_embeddings_gradient_sums_a_tokens_rows_in_fp32():
  """A frequent token has thousands of rows in a batch; a sum in bf16 loses the small ones."""
  of_embedding = [line for line in sft_program("bfloat16").splitlines() if f"}}) : (tensor<{V}x16x" in line]
  assert of_embedding and not any(LOW.search(line) for line in of_embedding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_gradients_are_fp32_and_so_is_the_clip(dtype):
  """In bf16 a norm has only three digits."""
  grads = {"a": normal(64, 64, dtype=dtype), "b": normal(9, dtype=dtype)}
  text = lowered(
    lambda grads: (optimizer.norm(grads), optimizer.clip_by_norm(1.0).update(grads, optax.EmptyState())[0]), grads
  )
  check(text, dtype)
  wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  assert float(optimizer.norm(grads)) == float(optax.tree.norm(wide))
  clipped, _ = optimizer.clip_by_norm(1.0).update(grads, optax.EmptyState())
  expected, _ = optax.clip_by_global_norm(1.0).update(wide, optax.EmptyState())
  jax.tree.map(lambda c, e, g: np.testing.assert_array_equal(c, e.astype(g.dtype)), clipped, expected, grads)
