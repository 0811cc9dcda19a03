"""Tests of the engine: decoded tokens and log-probabilities equal those of a full forward pass, for any batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh, whole
from nemocascade.model.decode_state import row_axes
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.report.metrics import CompileCounter
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.sampling import Options

pytestmark = pytest.mark.usefixtures("compiled_fast")

V, P, T = 13, 6, 20
STOP = 11


# A toy model: the next token depends on the last token and on the sum of all tokens so far.


@struct.dataclass
class Memory:
  last_B: jax.Array
  sum_B: jax.Array


def table(key=0):
  return 2 * jax.random.normal(jax.random.key(key), (V, 5, V))


def toy_prefill(table_VSV, tokens_BP, length_B, capacity):
  del capacity
  real_BP = jnp.arange(tokens_BP.shape[1])[None] < length_B[:, None]
  last_B = jnp.take_along_axis(tokens_BP, (length_B - 1)[:, None], axis=1)[:, 0]
  memory = Memory(last_B, jnp.sum(jnp.where(real_BP, tokens_BP, 0), axis=1))
  return table_VSV[memory.last_B, memory.sum_B % 5], memory


def toy_step(table_VSV, memory, tokens_B, active_B):
  take = lambda new_B, old_B: jnp.where(active_B, new_B, old_B)  # noqa: E731
  memory = Memory(take(tokens_B, memory.last_B), take(memory.sum_B + tokens_B, memory.sum_B))
  return memory, table_VSV[memory.last_B, memory.sum_B % 5]


def toy_logprobs(table_VSV, tokens):
  """[T, V] in fp64: entry t is the distribution of the token after tokens[: t + 1]."""
  logits_TV = np.asarray(table_VSV, np.float64)[tokens, np.cumsum(tokens) % 5]
  return logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))


def toy_engine(**fields):
  fields = dict(prompt_tokens=P, total_tokens=T, stop_ids=(STOP, 2)) | fields
  return Engine(toy_prefill, toy_step, **fields)


ENGINE = toy_engine()
PROMPTS = [[3], [4, 5, 6, 7, 8, 9], [1, 1, 1]]


def decode(engine=ENGINE, prompts=PROMPTS, G=2, temperature=1.0, seed=0, limit=None, **how):
  d = engine.start(table(), prompts, G, options=Options(temperature), **how)
  if limit is not None:
    d = d.replace(limit_B=jnp.full(d.limit_B.shape, limit, jnp.int32))
  return engine.decode(table(), d, jax.random.key(seed))


def row(d, b):
  """Known tokens of row b."""
  return np.asarray(d.tokens_BT[b, : int(d.known_B[b])])


def assert_row_is_its_models(d, b, prompt):
  tokens, sampled_T = row(d, b), np.asarray(d.sampled_BT[b])
  assert tokens[: len(prompt)].tolist() == list(prompt)
  logprobs_TV = toy_logprobs(table(), tokens)
  for t in range(T):
    got = float(d.behaviour_logprobs_BT[b, t])
    expected = logprobs_TV[t - 1, tokens[t]] if sampled_T[t] else 0.0
    assert got == pytest.approx(expected, abs=1e-5)


def test_behaviour_logprobs_are_those_of_the_sampled_tokens_and_0_elsewhere():
  d = decode(G=3)
  for b in range(9):
    prompt = PROMPTS[b // 3]
    assert_row_is_its_models(d, b, prompt)
    end = int(d.known_B[b])
    assert np.flatnonzero(d.sampled_BT[b]).tolist() == list(range(len(prompt), end))


def test_greedy_is_the_argmax_of_the_full_forward_pass():
  d = decode(G=1, temperature=0.0)
  for b, prompt in enumerate(PROMPTS):
    tokens = row(d, b)
    likeliest_T = toy_logprobs(table(), tokens).argmax(axis=1)
    np.testing.assert_array_equal(tokens[len(prompt) :], likeliest_T[len(prompt) - 1 : -1])


def test_a_row_ends_with_its_first_stop_token_or_at_its_limit():
  d = decode(G=64)
  ends = set()
  for b in range(3 * 64):
    new = row(d, b)[len(PROMPTS[b // 64]) :].tolist()
    assert not {STOP, 2} & set(new[:-1])
    ends.add("stop" if new[-1] in (STOP, 2) else "limit")
    assert new[-1] in (STOP, 2) or d.known_B[b] == T
  assert ends == {"stop", "limit"}
  assert jnp.all(d.done_B)


def test_a_limit_of_its_own_cuts_a_row():
  d = decode(G=8, limit=8)
  assert int(d.known_B.max()) == 8
  np.testing.assert_array_equal(d.tokens_BT[:, 8:], 0)


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch():
  all_rows = decode(G=2)
  for b in range(6):  # The same row number with other prompts in the other rows.
    others = [[9, 9]] * 3
    others[b // 2] = PROMPTS[b // 2]
    np.testing.assert_array_equal(row(decode(prompts=others, G=2), b), row(all_rows, b))


def test_copies_of_a_prompt_are_sampled_apart_and_seeds_and_keys_decide():
  d = decode(prompts=[[3]], G=16)
  assert len({tuple(row(d, b)) for b in range(16)}) > 8
  np.testing.assert_array_equal(decode(prompts=[[3]], G=16).tokens_BT, d.tokens_BT)
  assert not np.array_equal(decode(prompts=[[3]], G=16, seed=1).tokens_BT, d.tokens_BT)


def test_first_tokens_have_the_models_frequencies():
  # Within 5 binomial standard errors for each token; the seed is fixed.
  N = 8192
  d = decode(prompts=[[3]], G=N, limit=2)
  prob_V = np.exp(toy_logprobs(table(), [3])[0])
  share_V = np.bincount(np.asarray(d.tokens_BT[:, 1]), minlength=V) / N
  assert np.all(np.abs(share_V - prob_V) <= 5 * np.sqrt(prob_V * (1 - prob_V) / N))


def test_given_tokens_are_taken_in_as_they_are_and_not_learned():
  d = decode(G=2, limit=8, held=True)
  before = [row(d, b).tolist() for b in range(6)]
  d = d.replace(limit_B=jnp.full(6, T, jnp.int32))
  given = {0: [5, 6, 7], 3: [8], 5: [1, STOP, 2, 4]}  # Given stop tokens do not stop a row.
  old = jax.device_get(d)
  d = ENGINE.decode(table(), ENGINE.extend(table(), d, given), jax.random.key(1))
  for b in range(6):
    if b not in given:
      assert row(d, b).tolist() == before[b]
      for name in ("sampled_BT", "behaviour_logprobs_BT", "logits_SV", "done_B"):
        np.testing.assert_array_equal(getattr(d, name)[b], getattr(old, name)[b])
      continue
    start, end = len(before[b]), len(before[b]) + len(given[b])
    assert row(d, b)[:end].tolist() == before[b] + given[b]
    assert not np.any(d.sampled_BT[b, start:end])
    assert int(d.known_B[b]) > end
    assert_row_is_its_models(d, b, PROMPTS[b // 2])


def test_a_row_without_room_for_its_given_tokens_and_one_more_stays_as_it_was():
  d = decode(G=1, limit=8, held=True)
  d = d.replace(limit_B=jnp.full(3, 10, jnp.int32))
  known = int(d.known_B[1])
  assert known == 8 or row(d, 1)[-1] in (STOP, 2)
  fits, too_many = [1] * (10 - known - 1), [1] * (10 - known)
  copy = jax.tree.map(jnp.copy, d)
  assert not bool(ENGINE.extend(table(), copy, {1: fits}).done_B[1])
  full = ENGINE.extend(table(), d, {1: too_many})
  assert bool(full.done_B[1]) and int(full.known_B[1]) == known


def test_calls_of_equal_shapes_compile_once_whatever_is_asked_and_wherever_things_lie():
  engine, device = toy_engine(), jax.devices()[0]
  tables = [
    table(0), np.asarray(table(1)), jax.device_put(table(2), device),
    jax.device_put(table(3), whole(make_mesh(1, 1))), jax.jit(lambda t: t + 1, out_shardings=whole(make_mesh(1, 1)))(table(4)),
  ]  # fmt: skip
  keys = [jax.random.key(seed) for seed in range(5)]
  with CompileCounter() as compiled:
    for given, key, prompts, temperature in zip(
      tables, keys, [PROMPTS, PROMPTS[::-1], [[1]] * 3, PROMPTS, PROMPTS], [1, 0.0, 0.7, np.float64(1), np.float32(2)],
      strict=True,
    ):  # fmt: skip
      d = engine.start(given, prompts, 2, options=Options(temperature), held=True)
      d = d.replace(limit_B=np.minimum(d.limit_B, np.asarray(d.known_B) + 4))
      d = engine.decode(given, d, key)
      d = engine.decode(given, engine.extend(given, d, {0: [1]}), key, ticks=3)
      engine.decode(given, engine.extend(given, d, {}), key)
  assert sorted(compiled.programs) == ["jit(decode)", "jit(extend)", "jit(start)"]


@pytest.mark.parametrize("prompt", [[], [1] * (P + 1)])
def test_a_prompt_that_does_not_fit_is_refused_with_its_length(prompt):
  with pytest.raises(UserError, match=f"prompt 1 has {len(prompt)} tokens.*prompt_tokens={P}"):
    ENGINE.start(table(), [[1], prompt], 1)


def test_an_engine_without_room_for_completions_is_refused():
  with pytest.raises(UserError, match="total_tokens"):
    toy_engine(total_tokens=P)


# The hybrid: sampling and training run the same model code.

PATTERNS = ["M*E-", "MEMEME*"]  # The repeated unit of the second pattern is scanned.


@functools.cache
def hybrid(pattern, **how):
  config = ModelConfig(
    vocab_size=V, hidden_size=16, hybrid_override_pattern=pattern, mamba_num_heads=4,
    mamba_head_dim=8, ssm_state_size=8, head_dim=8, chunk_size=4, moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, intermediate_size=16, initializer_range=0.5,
  )  # fmt: skip
  model = Hybrid(config)
  apply = lambda method: lambda params, *a: model.apply({"params": params}, *a, method=method)  # noqa: E731
  how = dict(prompt_tokens=P, total_tokens=T, stop_ids=(STOP, 2)) | how
  engine = Engine(apply("prefill"), apply("step"), apply("extend"), row_axes, **how)
  return engine, init_params(config, jax.random.key(1)), jax.jit(apply("logits"))


GIVEN = [5, STOP, 2]


def long_completions(pattern, piece, new):
  """(decoding, its long requests): two turns of together `new` tokens, parked between them, one greedy for each prompt.

  Prompts are prefilled in pieces. The other slot is refilled with a request of one token at every tick.
  """
  prompts, turn, pause = [[3, 1, 4, 1, 5], [*range(V), 7, 7, 1, 0, 9]], new // 3, 4
  length, G = len(prompts[1]), 2 + (new + 4 * pause) // 2 + 2
  T = length + new + len(GIVEN)
  engine, params, _ = hybrid(pattern, prompt_tokens=length, total_tokens=T, stop_ids=(), piece=piece)
  long = np.array([0, 1, G, G + 1])
  held_B, temperature_B, known_B = np.zeros(2 * G, bool), np.ones(2 * G), np.repeat([5, length], G).astype(np.int32)
  held_B[long], temperature_B[[0, G]], limit_B = True, 0.0, known_B + 1
  limit_B[long] += turn - 1
  d = engine.start(params, prompts, G, slots=len(long) + 1, held=held_B, options=Options(temperature_B))
  d = d.replace(limit_B=limit_B, order_B=np.argsort(np.argsort(~held_B, stable=True)).astype(np.int32))
  d = engine.decode(params, d, jax.random.key(0), turn + pause)
  assert bool((d.parked_B[long] >= 0).all()) and bool(d.waiting_B.any())
  limit_B[long] += new - turn + len(GIVEN)
  d = engine.extend(params, d.replace(limit_B=limit_B), {b: GIVEN for b in long.tolist()})
  return engine.decode(params, d.replace(held_B=np.zeros(2 * G, bool)), jax.random.key(0)), long


@pytest.mark.parametrize("pattern, piece", [("M", 4), ("*", 7), ("E", 5), ("MEMEME*-", 6)])
def test_512_tokens_of_every_block_kind_are_those_of_the_full_forward_pass(pattern, piece):
  """Greedy tokens are the likeliest ones, and recorded log-probabilities are those of the full forward pass.

  Both passes round differently, so that one of two nearly equal logits may be the larger in one and not in the other:
  a greedy token's logit may be less than the largest by what log-probabilities may differ by.
  """
  new = 512
  d, long = long_completions(pattern, piece, new)
  c = jax.tree.map(int, d.counts)
  assert c.queued_busy == c.queued_slots and c.ticks - c.queued_slots / 5 < 8  # Requests waited nearly to the end.
  _, params, logits = hybrid(pattern)
  tokens_BT, sampled_BT, known_B = (np.asarray(a)[long] for a in (d.tokens_BT, d.sampled_BT, d.known_B))
  assert (sampled_BT.sum(axis=1) == new).all()
  real_BT = (np.arange(tokens_BT.shape[1])[None] < known_B[:, None]).astype(np.int32)
  logprobs_BTV = np.asarray(jax.nn.log_softmax(logits(params, tokens_BT * real_BT, real_BT)))[:, :-1]
  own_BT = np.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=2)[..., 0]
  sampled_BT = sampled_BT[:, 1:]
  gap_BT = np.abs(np.asarray(d.behaviour_logprobs_BT)[long][:, 1:] - own_BT)
  assert gap_BT[sampled_BT].max() < 1e-4
  below_BT = logprobs_BTV.max(axis=2) - own_BT
  first_BT = np.diff(np.sort(logprobs_BTV, axis=2)[..., -2:])[..., 0]
  for greedy in (0, 2):
    taken = sampled_BT[greedy]
    assert below_BT[greedy][taken].max() < 1e-4 and np.mean(first_BT[greedy][taken] > 1e-2) > 0.9
    assert len(np.unique(tokens_BT[greedy, 1:][taken])) > 1
  assert below_BT[1][sampled_BT[1]].max() > 1


def test_a_row_of_the_hybrid_does_not_depend_on_its_neighbours():
  engine, params, *_ = hybrid(PATTERNS[0])
  start = lambda prompts: engine.start(params, prompts, 2)  # noqa: E731
  run = lambda prompts: engine.decode(params, start(prompts), jax.random.key(0))  # noqa: E731
  together, apart = run(PROMPTS), run([[9, 9], PROMPTS[1], [4] * P])
  for b in (2, 3):
    np.testing.assert_array_equal(row(apart, b), row(together, b))
