"""Tiny random Nemotron-H models of transformers, and the folders that transformers writes for them."""

import functools
from pathlib import Path

import jax
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.utils import logging

from nemocascade.model.hybrid import init_params
from nemocascade.store.hf import Source, load_params, open_source

logging.set_verbosity_error()
logging.disable_progress_bar()
V = 96
WORDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
SIZES = dict(
  vocab_size=V, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
  mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
  n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
  moe_shared_expert_intermediate_size=24, intermediate_size=24, initializer_range=0.2,
)  # fmt: skip


def random_model(pattern: str, seed: int = 0, **fields) -> NemotronHForCausalLM:
  """A model whose biases and scales differ from 0 and 1, so that a missing one shows.

  The head is tied if the config says so.
  """
  torch.manual_seed(seed)
  config = NemotronHConfig(**SIZES | {"layers_block_type": [WORDS[letter] for letter in pattern]} | fields)
  model = NemotronHForCausalLM(config).eval()
  with torch.no_grad():
    for name, buffer in model.named_buffers():
      assert name.endswith("e_score_correction_bias")
      buffer.copy_(0.1 * torch.randn_like(buffer))
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
  if config.tie_word_embeddings:  # transformers does not tie the weights itself.
    model.lm_head.weight = model.model.embeddings.weight
  return model


def save(model: NemotronHForCausalLM, path: Path, **options) -> Path:
  """save_pretrained; a tied head is saved as its own tensor, as transformers expects."""
  head = model.lm_head.weight
  model.lm_head.weight = torch.nn.Parameter(head.detach().clone())
  model.save_pretrained(path, **options)
  model.lm_head.weight = head
  return path


def template(source: Source):
  """Shapes and dtypes of the folder's parameters in our tree."""
  return jax.eval_shape(functools.partial(init_params, source.config), jax.random.key(0))


def ours(path: Path):
  """(config, parameters) of a folder."""
  source = open_source(path)
  return source.config, load_params(source, template(source))
