"""Our model computes the same function as transformers: logits, gradients, decoding."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import NemotronHForCausalLM
from transformers_folders import V, ours, random_model, save

from experiments import parity
from nemocascade.config import ModelConfig
from nemocascade.model.hybrid import Hybrid
from nemocascade.types import Params

T = 21  # Not a multiple of the chunk size.
CASES = {
  "all": ("ME*-", {}),
  "units_repeat": ("MEMEME*", {}),
  "one_group": ("M*", dict(n_groups=1, num_key_value_heads=1)),
  "group_a_head": ("M*", dict(n_groups=4, num_key_value_heads=4)),
  "groups_of_experts": ("E*", dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)),
  "latent_experts": ("EE", dict(moe_latent_size=12)),
  "weights_not_normalized": ("E-", dict(norm_topk_prob=False, num_experts_per_tok=3)),
  "tied_head": ("M-", dict(tie_word_embeddings=True)),
  "no_conv_bias": ("MM", dict(use_conv_bias=False)),
  "dt_at_its_clamp": ("M", dict(time_step_min=0.05)),
  "less_than_a_chunk": ("M", dict(chunk_size=64)),
}
# Compiles without optimizations, because compilation takes most of the time here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Pair(NamedTuple):
  model: NemotronHForCausalLM
  config: ModelConfig
  params: Params
  fields: dict


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
  """A transformers model, and ours loaded from the folder it saved."""
  pattern, fields = CASES[request.param]
  model = random_model(pattern, **fields)
  return Pair(model, *ours(save(model, tmp_path_factory.mktemp("hf"))), dict(pattern=pattern) | fields)


def tokens(B=2, length=T):
  return np.random.default_rng(0).integers(0, V, (B, length))


def their_logits(model, tokens_BT):
  with torch.no_grad():
    return model(torch.tensor(tokens_BT), use_cache=False).logits.numpy()


def relative(found, expected) -> float:
  return float(np.linalg.norm(np.asarray(found) - expected) / max(np.linalg.norm(expected), 1e-30))


def test_logits_and_gradients_of_the_loss_agree(pair, tmp_path):
  """The converter maps gradients of transformers to our tree as if they were weights."""
  tokens_BT = tokens()
  ids = torch.tensor(tokens_BT)
  logits = pair.model(ids, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
  pair.model.zero_grad()
  loss.backward()
  expected = ours(save(gradients_as_weights(pair), tmp_path))[1]

  def our_loss(p):
    logits_BTV = Hybrid(pair.config).apply({"params": p}, jnp.array(tokens_BT), jnp.ones_like(tokens_BT))
    logprob_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprob_BTV, tokens_BT[:, 1:, None], axis=-1)), logits_BTV

  step = jax.jit(jax.value_and_grad(our_loss, has_aux=True), compiler_options=QUICK)
  (value, found), gradients = step(pair.params)
  logits = logits.detach().numpy()
  assert relative(found, logits) < 2e-5
  assert np.abs(found - logits).max() < 2e-5 * np.abs(logits).max()
  assert float(value) == pytest.approx(loss.item(), rel=1e-5)
  total = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(expected)))
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, there), here in zip(leaves, jax.tree.leaves(gradients), strict=True):
    # A gradient below a millionth of the whole is only rounding error, so its relative error means nothing.
    scale = max(np.linalg.norm(there), 1e-6 * total)
    assert np.linalg.norm(here - there) < 1e-4 * scale, jax.tree_util.keystr(path)


def gradients_as_weights(pair: Pair) -> NemotronHForCausalLM:
  """A model whose weights are the gradients of `pair.model`."""
  other = random_model(**pair.fields)
  with torch.no_grad():
    for there, here in zip(other.parameters(), pair.model.parameters(), strict=True):
      there.copy_(torch.zeros_like(here) if here.grad is None else here.grad)  # None: no token chose this expert.
    for buffer in other.buffers():
      buffer.zero_()
  return other


def decode(config, params, prompt_BT, new: int):
  """Greedy decoding by prefill and cached steps: (tokens, logits before each)."""
  model, B, P = Hybrid(config), *prompt_BT.shape

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, prompt_BT):
    logits_BV, state = model.apply({"params": params}, prompt_BT, jnp.full((B,), P), P + new, method="prefill")

    def tick(carry, _):
      state, logits_BV = carry
      token_B = jnp.argmax(logits_BV, axis=-1)
      state, after_BV = model.apply({"params": params}, state, token_B, jnp.ones((B,), bool), method="step")
      return (state, after_BV), (token_B, logits_BV)

    _, (token_NB, logits_NBV) = jax.lax.scan(tick, (state, logits_BV), length=new)
    return token_NB.T, jnp.moveaxis(logits_NBV, 0, 1)

  return jax.device_get(run(params, jnp.array(prompt_BT)))


def test_greedy_tokens_are_theirs_and_cached_decoding_is_their_full_pass(pair):
  """In the full pass of transformers over the decoded row, each argmax must be the next token."""
  prompt_BT = tokens(length=5)
  new_BN, logits_BNV = decode(pair.config, pair.params, prompt_BT, 64)
  expected = their_logits(pair.model, np.concatenate([prompt_BT, new_BN], axis=1))[:, 4:-1]
  np.testing.assert_array_equal(new_BN, expected.argmax(axis=-1))
  assert relative(logits_BNV, expected) < 2e-5


@pytest.mark.parametrize("cached", [False, True])
def test_generate_of_transformers_says_the_same_64_tokens(cached, tmp_path):
  """The cached step of transformers does not clamp dt, but its full pass does; without a clamp they agree."""
  model = random_model("MM*")
  config, params = ours(save(model, tmp_path))
  if cached:
    config = dataclasses.replace(config, time_step_limit=(0.0, math.inf))
    for layer in model.model.layers[:2]:
      layer.mixer.time_step_limit = (0.0, math.inf)
  prompt_BT = tokens(length=7)
  their_BT = model.generate(
    torch.tensor(prompt_BT), attention_mask=torch.ones(prompt_BT.shape, dtype=torch.int64), do_sample=False,
    max_new_tokens=64, eos_token_id=None, pad_token_id=0, use_cache=cached,
  )  # fmt: skip
  np.testing.assert_array_equal(decode(config, params, prompt_BT, 64)[0], their_BT[:, 7:].numpy())


def test_the_published_spelling_means_no_clamp_and_that_is_another_function(tmp_path):
  """Some dt lie below time_step_min, so the clamp changes the output.

  transformers clamps dt at time_step_min; vLLM and jax-llm-examples use time_step_limit (0, inf), no clamp.
  """
  model = random_model("M", time_step_min=0.05)
  config, params = ours(save(model, tmp_path))
  assert config.time_step_limit == (0.05, math.inf)
  free = Hybrid(dataclasses.replace(config, time_step_limit=(0.0, math.inf)))
  tokens_BT = tokens()
  found = jax.jit(free.apply, compiler_options=QUICK)(
    {"params": params}, jnp.array(tokens_BT), jnp.ones_like(tokens_BT)
  )
  assert relative(found, their_logits(model, tokens_BT)) > 1e-3


def test_the_command_prints_layer_by_layer_and_how_far_the_clamp_takes_transformers(tmp_path, capsys):
  """A folder in the published spelling, which means no clamp."""
  path = save(random_model("ME*-", time_step_min=0.05), tmp_path / "hf")
  fields = json.loads((path / "config.json").read_text())
  assert len(fields.pop("layers_block_type")) == 4
  (path / "config.json").write_text(json.dumps(fields | {"hybrid_override_pattern": "ME*-"}))
  found = parity.run(f"hf:{path}", tokens=13, new_tokens=16, dtype="float32", seed=0)
  out = capsys.readouterr().out
  rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
  layers = ["embedding", "0 Mamba-2", "1 mixture of experts", "2 attention", "3 MLP", "last norm", "logits"]
  assert [name for name in rows if name][: len(layers)] == layers
  assert all(float(rows[name][0]) < 2e-5 for name in layers)
  assert rows["greedy tokens"] == ["16/16", "16/16"]
  assert found["without the clamp"] > 1e-3 and "which clamps dt at 0.05" in out


def test_parity_without_transformers_is_one_clear_line(tmp_path):
  code = "import sys; sys.modules['transformers'] = None; import runpy;"
  code += "runpy.run_module('experiments.parity', run_name='__main__', alter_sys=True)"
  done = subprocess.run([sys.executable, "-c", code, "--checkpoint=hf:any"], capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  assert re.fullmatch(r"error: .*transformers.*pip install -e '\.\[hf\]'\n", done.stderr)
