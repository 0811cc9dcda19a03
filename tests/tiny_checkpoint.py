"""One of our checkpoints with random parameters, as a stage writes it."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nemocascade.config import ModelConfig
from nemocascade.data import chat
from nemocascade.data.tokenizer import EOS, IM_END, train_sentencepiece
from nemocascade.mesh import make_mesh
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import save_model_files
from nemocascade.store.checkpoint import Store
from nemocascade.types import TrainState

TOKENIZER = train_sentencepiece(
  ["the cat sat on the mat and thinks of 12 and 7", "print(1)"] * 20,
  vocab_size=600,
  phrases=chat.PHRASES,
)
MODEL = dict(
  vocab_size=640,
  hidden_size=32,
  hybrid_override_pattern="M*E",
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  mamba_num_heads=4,
  mamba_head_dim=8,
  ssm_state_size=8,
  n_groups=2,
  chunk_size=16,
  n_routed_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=32,
  moe_shared_expert_intermediate_size=32,
  initializer_range=0.3,  # Wide, so that the likelihoods of tokens differ.
)


def programs() -> Programs:
  """The programs of the model on one device."""
  return Programs(ModelConfig.from_fields(MODEL), make_mesh(data=1, expert=1))


def make(stage: Path, *, endless: bool = False) -> str:
  """Writes the checkpoint into the stage's folder; returns its path. `endless`: greedy answers never stop."""
  params = programs().fresh_params(jax.random.key(0))
  if endless:  # Among 640 logits around 0, a logit of exactly 0 is never the largest.
    params["lm_head"] = params["lm_head"].at[:, jnp.array([EOS, IM_END])].set(0)
  state = TrainState(jnp.zeros((), jnp.int32), params, {})
  save_model_files(ConfigDict({"model": MODEL}), stage, TOKENIZER)
  store = Store(stage / "checkpoints")
  store.save(1, state, {})
  return str(store.path_of(1))
