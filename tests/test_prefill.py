"""Tests of prefilling: long prompts in pieces give what they give at once, and a group's prompt is computed once."""

import jax
import numpy as np
import pytest

from nemocascade.config import ModelConfig
from nemocascade.model.decode_state import row_axes
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.routing import experts_of
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.sampling import Options

pytestmark = pytest.mark.usefixtures("compiled_fast")

V, D = 13, 16
CONFIG = ModelConfig(
  vocab_size=V, hidden_size=D, hybrid_override_pattern="M*E-M*M*", mamba_num_heads=4, mamba_head_dim=8,
  ssm_state_size=8, head_dim=8, chunk_size=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
  intermediate_size=16, initializer_range=0.5, router_record=True,
)  # fmt: skip
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
  lambda a: RNG.normal(0.0, 0.3, a.shape).astype(np.float32),
  jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(1))),
)
PROMPTS = [list(np.arange(n) % V) for n in (18, 3, 8, 11)]  # They end in different pieces, or with one.


def engine(**how):
  apply = lambda method: lambda params, *a: Hybrid(CONFIG).apply({"params": params}, *a, method=method)  # noqa: E731
  recorded = apply("prefill_recorded"), apply("step"), apply("extend_recorded")
  return Engine(*recorded, row_axes, lambda state: experts_of(state.units), **how)


def text_of_start(engine, Q, P, G=1):
  """The lowered program that prefills Q prompts of up to P tokens for G requests each."""
  arrays = np.zeros((Q, P), np.int32), np.ones(Q, np.int32), Options().by_row(Q * G), np.zeros(Q * G, bool)
  return engine.start_fn.lower(PARAMS, *arrays, G, Q * G, False, 0, 0)


def test_prompts_in_pieces_have_the_state_and_the_tokens_of_prompts_at_once():
  whole = engine(prompt_tokens=18, total_tokens=26)
  start = lambda e: e.start(PARAMS, PROMPTS, 1, options=Options(0.0))  # noqa: E731
  expected = start(whole)
  starts = [start(engine(prompt_tokens=18, total_tokens=26, piece=piece)) for piece in (4, 7)]
  for d in starts:
    np.testing.assert_allclose(d.logits_SV, expected.logits_SV, atol=1e-5)
    np.testing.assert_array_equal(d.experts_BTY, expected.experts_BTY)
  tokens = [np.asarray(whole.decode(PARAMS, d, jax.random.key(0)).tokens_BT) for d in (expected, *starts)]
  assert len(np.unique(tokens[0][:, 18:])) > 2
  for other in tokens[1:]:
    np.testing.assert_array_equal(other, tokens[0])


def test_no_activations_of_a_whole_prompt_exist_if_it_is_taken_in_in_pieces():
  for piece, there in ((8, False), (64, True)):
    text = text_of_start(engine(prompt_tokens=64, total_tokens=72, piece=piece), 2, 64).as_text()
    assert (f"2x64x{D}xf32" in text) == there


def test_sixteen_completions_of_a_prompt_cost_one_prefill():
  of = engine(prompt_tokens=1024, total_tokens=1032)
  one, sixteen = (text_of_start(of, 1, 1024, G).cost_analysis()["flops"] for G in (1, 16))
  assert 1024 * sum(a.size for a in jax.tree.leaves(PARAMS) if a.ndim == 2) < one <= sixteen <= 1.1 * one
