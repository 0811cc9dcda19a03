"""rollout.exact: recorded log-probabilities are the training step's to the bit, and tokens are those its logits draw."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs.tiny import if_rl
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh, put_rows
from nemocascade.model.hybrid import init_params
from nemocascade.rollout.exact import Weights
from nemocascade.rollout.sampling import Options, row_keys, sample
from nemocascade.runtime import checks
from nemocascade.runtime.objective import program
from nemocascade.runtime.programs import Programs
from nemocascade.step.optimizer import new_state

pytestmark = pytest.mark.usefixtures("compiled_fast")
Q, G, P, T, V = 8, 2, 6, 20, 31
CONFIG = ModelConfig(
  vocab_size=V, hidden_size=32, hybrid_override_pattern="M", num_attention_heads=4, num_key_value_heads=2, head_dim=8,
  mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, chunk_size=8, n_routed_experts=8, num_experts_per_tok=2,
  moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, initializer_range=0.4,
)  # fmt: skip
PLAIN = Options()
KEY = jax.random.key(7)
TURN = 11  # Tokens at which the first turn ends, if it has not ended before.
GIVEN = {b: [11, 2, 9][: 1 + b % 3] for b in range(0, Q * G, 2)}  # Stop tokens among them stop nothing.
PROMPTS = [np.random.default_rng(q).integers(12, V, 1 + q % P).tolist() for q in range(Q)]


def config():
  c = if_rl.get_config("smoke")
  c.rollout.update(prompts=Q, completions=G, prompt_tokens=P, total_tokens=T, exact=True)
  c.optimizer.frozen = ()
  c.packing.update(rows=Q * G, row_tokens=T, pieces=2)
  return c


@functools.cache
def params(pattern, dtype):
  return init_params(dataclasses.replace(CONFIG, hybrid_override_pattern=pattern, dtype=dtype), jax.random.key(0))


def sampled(p, own, *, exactly=True, noise=0.0, options=PLAIN):
  """(the decoding after two turns, the engine's metrics). The draft's parameters are off by `noise`.

  Requests of GIVEN have a second turn, after these tokens.
  """
  engine = p.engine(P, T, exact=2 * exactly)
  draft = jax.tree.map(lambda a: a * (1 + noise), own)
  weights = Weights(draft, own) if exactly else draft
  d = engine.start(weights, PROMPTS, G, options=options, held=True)
  d = engine.decode(weights, d.replace(limit_B=np.full(Q * G, TURN, np.int32)), KEY)
  d = engine.extend(weights, d.replace(limit_B=np.full(Q * G, T, np.int32)), GIVEN)
  return jax.device_get(engine.decode(weights, d, KEY)), engine.metrics()


def step_error(p, own, d, behaviour_BT):
  """The largest |log pi_train - log pi_sampler| of a training step."""
  c = config()
  tx, (_, step_fn, _) = program(c, p)
  real_BT = np.arange(T)[None] < d.known_B[:, None]
  rows = dict(
    tokens=d.tokens_BT * real_BT, segment_ids=real_BT.astype(np.int32), mask=d.sampled_BT,
    weights=d.sampled_BT.astype(np.float32), behaviour=behaviour_BT, advantages=d.sampled_BT * np.float32(0.5),
  )  # fmt: skip
  state = jax.jit(functools.partial(new_state, tx))(jax.tree.map(lambda a: a + 0, own))
  count = np.float32(d.sampled_BT.sum())
  _, metrics = step_fn(state, put_rows(rows, p.mesh), count, None, None, np.float32(1))
  return float(metrics["policy/sampler_error_max"])


@pytest.mark.parametrize(
  "pattern, dtype, mesh, remat",
  [
    ("M*E", "float32", (1, 1), "none"),
    ("M*E", "bfloat16", (1, 1), "block"),
    ("M*E", "bfloat16", (4, 2), "none"),
  ],
)
def test_the_step_has_the_recorded_logprobs_to_the_bit(pattern, dtype, mesh, remat):
  p = Programs(dataclasses.replace(CONFIG, hybrid_override_pattern=pattern, dtype=dtype, remat=remat), make_mesh(*mesh))
  own = jax.device_put(params(pattern, dtype), jax.tree.map(lambda s: s.sharding, p.template))
  d, spent = sampled(p, own)
  assert spent["exact/rounds"] >= 2 and (np.diff(d.sampled_BT.astype(int))[list(GIVEN)] == 1).sum() == 2 * len(GIVEN)
  assert step_error(p, own, d, d.behaviour_logprobs_BT) == 0
  if dtype == "bfloat16" and mesh == (1, 1):
    fast, _ = sampled(p, own, exactly=False)
    assert step_error(p, own, fast, fast.behaviour_logprobs_BT) > 1e-4


@pytest.mark.parametrize("options", [PLAIN, Options(temperature=0.7, top_p=0.8)])
def test_a_wrong_draft_gives_the_tokens_that_the_trainers_forward_pass_draws(options):
  p = Programs(dataclasses.replace(CONFIG, hybrid_override_pattern="M*E"), make_mesh(1, 1))
  own = params("M*E", "float32")
  d, spent = sampled(p, own, noise=0.2, options=options)
  assert spent["exact/rounds"] > 2 and spent["exact/changed"] > 0
  good, _ = sampled(p, own, options=options)
  tokens_BT, length_B = np.zeros((Q * G, T), np.int32), np.repeat([len(prompt) for prompt in PROMPTS], G)
  for b in range(Q * G):
    tokens_BT[b, : length_B[b]] = PROMPTS[b // G]
  logits_fn = jax.jit(functools.partial(p.model.apply, {"params": own}, method="logits"))
  draw = jax.jit(lambda logits_BV, place_B: sample(row_keys(KEY, np.arange(Q * G), place_B), logits_BV, of_row)[0])
  of_row, done_B, given, limit_B = options.by_row(Q * G), np.zeros(Q * G, bool), dict(GIVEN), np.full(Q * G, TURN)
  while not done_B.all():  # One token a row with the whole forward pass.
    logits_BTV = np.asarray(logits_fn(tokens_BT, (np.arange(T)[None] < length_B[:, None]).astype(np.int32)))
    new_B = np.asarray(draw(logits_BTV[np.arange(Q * G), length_B - 1], length_B))
    for b in np.flatnonzero(~done_B):
      tokens_BT[b, length_B[b]] = new_B[b]
      length_B[b] += 1
      if new_B[b] in (11, 2) or length_B[b] == limit_B[b]:
        done_B[b], limit_B[b], results = b not in given, T, given.pop(b, [])
        tokens_BT[b, length_B[b] : length_B[b] + len(results)] = results
        length_B[b] += len(results)
  for one in (d, good):
    np.testing.assert_array_equal(one.known_B, length_B)
    real_BT = np.arange(T)[None] < length_B[:, None]
    np.testing.assert_array_equal(np.where(real_BT, one.tokens_BT, 0), tokens_BT)
  np.testing.assert_array_equal(d.behaviour_logprobs_BT, good.behaviour_logprobs_BT)


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("rollout.slots", 4, "rollout.slots=4 with rollout.exact=True"),
    ("rollout.lag", 1, "rollout.lag=1 with rollout.exact=True"),
    ("packing.rows", 20, "packing.rows=20.*completions=16"),
    ("rollout.replay", True, "rollout.replay=True with"),
  ],
)
def test_what_exact_sampling_cannot_be_used_with_is_refused(field, value, words):
  c = config()
  checks.check_rl(c)
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=words):
    checks.check_rl(c)
