"""The model is the function that transformers computes: logits, gradients, decoding."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers_folders import V, ours, random_model, save

from nemocascade.model.hybrid import Hybrid

T = 21  # No multiple of the chunk.
CASES = {
  "mamba": ("MM", {}),
  "experts": ("EE", {}),
  "attention": ("**", {}),
  "mlp": ("--", {}),
  "all": ("MEM*-E", {}),
  "units_repeat": ("MEM*EMEM*EM-", {}),
  "one_group": ("MEM*", dict(n_groups=1, num_key_value_heads=1)),
  "group_a_head": ("MEM*", dict(n_groups=4, num_key_value_heads=4)),
  "groups_of_experts": ("EME*", dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)),
  "latent_experts": ("EME*", dict(moe_latent_size=12)),
  "weights_not_normalized": ("E*", dict(norm_topk_prob=False, num_experts_per_tok=3)),
  "tied_head": ("ME*-", dict(tie_word_embeddings=True)),
  "no_conv_bias": ("M*", dict(use_conv_bias=False)),
  "dt_at_its_clamp": ("MM*", dict(time_step_min=0.05)),
  "one_chunk_of_many_tokens": ("MM*", dict(chunk_size=64)),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
  """(transformers' model, our config and parameters, its folder)."""
  pattern, fields = CASES[request.param]
  model = random_model(pattern, **fields)
  path = save(model, tmp_path_factory.mktemp("hf"))
  return model, *ours(path), path


def tokens(B=2, length=T):
  return np.random.default_rng(0).integers(0, V, (B, length))


def their_logits(model, tokens_BT):
  with torch.no_grad():
    return model(torch.tensor(tokens_BT), use_cache=False).logits.numpy()


def relative(found, expected) -> float:
  return float(np.linalg.norm(np.asarray(found) - expected) / max(np.linalg.norm(expected), 1e-30))


def test_logits_agree(pair):
  model, config, params, _ = pair
  tokens_BT = tokens()
  found = jax.jit(Hybrid(config).apply)({"params": params}, jnp.array(tokens_BT), jnp.ones_like(tokens_BT))
  expected = their_logits(model, tokens_BT)
  assert relative(found, expected) < 2e-5
  assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_gradients_of_the_loss_agree(pair, tmp_path):
  """Their gradients go through the converter as if they were a model's weights."""
  model, config, params, _ = pair
  tokens_BT = tokens()
  model.zero_grad()
  ids = torch.tensor(tokens_BT)
  logits = model(ids, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
  loss.backward()
  gradients = random_model(CASES_PATTERN(model), **their_sizes(model))
  with torch.no_grad():
    for there, here in zip(gradients.parameters(), model.parameters(), strict=True):
      there.copy_(torch.zeros_like(here) if here.grad is None else here.grad)
    for buffer in gradients.buffers():
      buffer.zero_()
  expected = ours(save(gradients, tmp_path))[1]

  def our_loss(p):
    scores = Hybrid(config).apply({"params": p}, jnp.array(tokens_BT), jnp.ones_like(tokens_BT), method="score")
    return -jnp.sum(scores.logprobs_BT) / (tokens_BT.shape[0] * (T - 1))

  value, found = jax.jit(jax.value_and_grad(our_loss))(params)
  assert float(value) == pytest.approx(loss.item(), rel=1e-5)
  total = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(expected)))
  for (path, there), here in zip(
    jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
  ):
    there, here = np.asarray(there), np.asarray(here)
    # A gradient that is rounding alone (of a millionth of the whole) has no relative error.
    scale = max(np.linalg.norm(there), 1e-6 * total)
    assert np.linalg.norm(here - there) < 1e-4 * scale, jax.tree_util.keystr(path)


def CASES_PATTERN(model) -> str:
  return model.config.hybrid_override_pattern


def their_sizes(model) -> dict:
  """The fields in which the cases differ."""
  names = {name for _, fields in CASES.values() for name in fields}
  return {name: getattr(model.config, name) for name in names}


def decode(config, params, prompt_BT, new: int):
  """(tokens, logits before each) by prefill and cached steps, greedily."""
  model, B, P = Hybrid(config), *prompt_BT.shape

  @jax.jit
  def run(params, prompt_BT):
    logits_BV, state = model.apply(
      {"params": params}, prompt_BT, jnp.full((B,), P), P + new, method="prefill"
    )

    def tick(carry, _):
      state, logits_BV = carry
      token_B = jnp.argmax(logits_BV, axis=-1)
      state, after_BV = model.apply({"params": params}, state, token_B, jnp.ones((B,), bool), method="step")
      return (state, after_BV), (token_B, logits_BV)

    _, (token_NB, logits_NBV) = jax.lax.scan(tick, (state, logits_BV), length=new)
    return token_NB.T, jnp.moveaxis(logits_NBV, 0, 1)

  return jax.device_get(run(params, jnp.array(prompt_BT)))


def test_greedy_tokens_are_theirs_and_cached_decoding_is_their_full_pass(pair):
  """Their full pass over the whole row, with and without what was decoded, is the definition."""
  model, config, params, _ = pair
  prompt_BT = tokens(length=5)
  new_BN, logits_BNV = decode(config, params, prompt_BT, 64)
  expected = their_logits(model, np.concatenate([prompt_BT, new_BN], axis=1))[:, 4:-1]
  np.testing.assert_array_equal(new_BN, expected.argmax(axis=-1))
  assert relative(logits_BNV, expected) < 2e-5


def test_generate_of_transformers_says_the_same_64_tokens(tmp_path):
  model = random_model("MEM*-E")
  config, params = ours(save(model, tmp_path))
  prompt_BT = tokens(length=7)
  their = model.generate(
    torch.tensor(prompt_BT), attention_mask=torch.ones_like(torch.tensor(prompt_BT)), do_sample=False,
    max_new_tokens=64, eos_token_id=None, pad_token_id=0,
  )  # fmt: skip
  np.testing.assert_array_equal(decode(config, params, prompt_BT, 64)[0], their[:, 7:].numpy())


def test_the_published_spelling_means_no_clamp_and_that_is_another_function(tmp_path):
  """dt below time_step_min is met: the clamp is not vacuous (paper.md 1.4)."""
  model = random_model("MM*", time_step_min=0.05)
  config, params = ours(save(model, tmp_path))
  assert config.time_step_limit == (0.05, math.inf)
  free = Hybrid(type(config)(**{**vars(config), "time_step_limit": (0.0, math.inf)}))
  tokens_BT = tokens()
  found = free.apply({"params": params}, jnp.array(tokens_BT), jnp.ones_like(tokens_BT))
  assert relative(found, their_logits(model, tokens_BT)) > 1e-3


def test_the_command_prints_a_table_that_agrees_layer_by_layer(tmp_path):
  save(random_model("MEM*-"), tmp_path / "hf")
  done = subprocess.run(
    [sys.executable, "-m", "experiments.parity", f"--checkpoint=hf:{tmp_path / 'hf'}"],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()}
  for i, name in enumerate(("Mamba-2", "mixture of experts", "Mamba-2", "attention", "MLP")):
    assert float(rows[f"{i} {name}"][0]) < 2e-5
  assert float(rows["logits"][0]) < 2e-5
  assert rows["greedy tokens"][0] == "64/64"


def test_parity_without_transformers_is_one_clear_line(tmp_path):
  save(random_model("M"), tmp_path / "hf")
  code = "import sys; sys.modules['transformers'] = None; sys.argv[1:] = sys.argv[2:]; import runpy;"
  code += "sys.argv = ['parity', *sys.argv[1:]]; runpy.run_module('experiments.parity', run_name='__main__')"
  done = subprocess.run(
    [sys.executable, "-c", code, "-", f"--checkpoint=hf:{tmp_path / 'hf'}"], capture_output=True, text=True
  )
  assert done.returncode == 2
  assert re.fullmatch(r"error: .*transformers.*pip install.*\[hf\].*\n", done.stderr)
