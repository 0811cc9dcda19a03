"""Converts a Hugging Face config.json to a ModelConfig and back."""

import dataclasses
import math
from typing import Any

from nemocascade.config import SET_BY_PROGRAMS, ModelConfig
from nemocascade.errors import UserError, unknown

ARCHITECTURE = "NemotronHForCausalLM"
LETTERS = {
  "linear_attention": "M", "mamba": "M", "moe": "E", "mlp": "-",
  "full_attention": "*", "attention": "*",
}  # fmt: skip
PATTERN, LISTS = "hybrid_override_pattern", ("layers_block_type", "layer_types")

# Values of fields that config.json leaves out (defaults of transformers' NemotronHConfig).
DEFAULTS = dict(
  vocab_size=131072, hidden_size=4096, tie_word_embeddings=False, num_attention_heads=32,
  num_key_value_heads=8, head_dim=128, intermediate_size=21504, ssm_state_size=128,
  mamba_num_heads=128, mamba_head_dim=64, n_groups=8, conv_kernel=4, use_conv_bias=True,
  chunk_size=128, time_step_min=0.001, time_step_max=0.1, time_step_floor=1e-4,
  time_step_limit=(0.0, math.inf), n_routed_experts=8, num_experts_per_tok=2,
  moe_intermediate_size=7688, moe_shared_expert_intermediate_size=7688, moe_latent_size=None,
  routed_scaling_factor=1.0, n_group=1, topk_group=1, norm_topk_prob=True,
  initializer_range=0.02, layer_norm_epsilon=1e-5, rescale_prenorm_residual=True,
)  # fmt: skip
# Older field names that transformers still accepts.
ALIASES = dict(
  mamba_n_groups="n_groups", mamba_d_conv="conv_kernel", mamba_dt_min="time_step_min",
  mamba_dt_max="time_step_max", mamba_dt_limit="time_step_limit",
  mamba_dt_init_floor="time_step_floor", mamba_conv_bias="use_conv_bias",
  mamba_chunk_size="chunk_size", num_local_experts="n_routed_experts",
)  # fmt: skip
# Fields that would change the model's function, and the only value that our model supports.
ONLY = dict(use_bias=False, mlp_bias=False, mlp_hidden_act="relu2", mamba_hidden_act="silu", sliding_window=None)
# Fields of ModelConfig that `config_fields` writes in another way or leaves out.
OURS = ("remat", "dtype", "param_dtype", "hybrid_override_pattern", *SET_BY_PROGRAMS)


def model_config(fields: dict[str, Any], origin: str) -> ModelConfig:
  """The ModelConfig for the fields of config.json; fields that do not affect the model's function are ignored.

  The clamp of dt depends on the code that wrote the file. transformers (nemotron_h, 5.23) writes
  `layers_block_type` and clamps dt at time_step_min whatever `time_step_limit` says. Published folders
  write `hybrid_override_pattern` and mean their `time_step_limit`, as vLLM's nemotron_h reads it.

  Args:
    origin: the file's name, for error messages.

  Raises:
    UserError: another architecture, or values that our model does not support; names all of them.
  """
  kind, classes = fields.get("model_type"), fields.get("architectures") or [ARCHITECTURE]
  if kind != "nemotron_h" or ARCHITECTURE not in classes:
    raise UserError(
      f"{origin}: unknown architecture {', '.join(classes)} (model_type {kind!r}): allowed:"
      f" {ARCHITECTURE} (model_type 'nemotron_h')"
    )
  fields = {ALIASES.get(name, name): value for name, value in fields.items()}
  wrong = [
    f"{name}={fields[name]!r} is not supported, only {value!r}"
    for name, value in ONLY.items()
    if fields.get(name, value) != value
  ]
  stored = fields.get("dtype") or fields.get("torch_dtype") or "float32"
  if stored not in ("float32", "bfloat16"):
    wrong.append(f"dtype={stored!r} is not supported, only 'float32' and 'bfloat16'")
  if wrong:
    raise UserError(f"{origin}: {'; '.join(wrong)}")

  found = {name: fields.get(name, default) for name, default in DEFAULTS.items()}
  if found["num_key_value_heads"] is None:
    found["num_key_value_heads"] = found["num_attention_heads"]
  of_transformers = any(fields.get(name) is not None for name in LISTS)
  low, high = (_number(bound) for bound in found["time_step_limit"])
  found["time_step_limit"] = (found["time_step_min"], math.inf) if of_transformers else (low, high)
  return ModelConfig(hybrid_override_pattern=_pattern(fields, origin), dtype=stored, param_dtype=stored, **found)


def _pattern(fields: dict, origin: str) -> str:
  """One letter per block, from a list of block names or from the pattern string."""
  for name in LISTS:
    if fields.get(name) is not None:
      for word in fields[name]:
        if word not in LETTERS:
          raise unknown(f"block in {name} of {origin}", word, LETTERS)
      return "".join(LETTERS[word] for word in fields[name])
  if not fields.get(PATTERN):
    raise UserError(f"{origin}: names no blocks: neither {PATTERN} nor {' nor '.join(LISTS)}")
  return fields[PATTERN]


def _number(value) -> float:
  """A JSON number as a float; transformers writes infinity as {"__float__": "Infinity"}."""
  return float(value["__float__"]) if isinstance(value, dict) else float(value)


def config_fields(config: ModelConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
  """The fields of config.json for a model: those of `original`, changed only where `config` differs.

  Without `original` the fields are named as in the published folders; transformers reads them too.
  """
  fields = dict(original) if original is not None else _fresh(config)
  said = model_config(fields, "config.json")
  respell = ("hybrid_override_pattern", "time_step_limit")  # The lists of block names determine both.
  if any(getattr(said, name) != getattr(config, name) for name in respell):
    fields = {name: value for name, value in fields.items() if name not in LISTS}
    fields |= {PATTERN: config.hybrid_override_pattern, "num_hidden_layers": len(config.hybrid_override_pattern)}
    said = model_config(fields, "config.json")
  if said.param_dtype != config.param_dtype:
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = config.param_dtype
  for field in dataclasses.fields(ModelConfig):
    value = getattr(config, field.name)
    if field.name in OURS or value == getattr(said, field.name):
      continue
    if field.name == "time_step_limit":
      value = [bound if math.isfinite(bound) else {"__float__": "Infinity"} for bound in value]
    for older in [old for old, name in ALIASES.items() if name == field.name]:
      fields.pop(older, None)
    fields[field.name] = value
  return fields


def _fresh(config: ModelConfig) -> dict[str, Any]:
  return {
    "architectures": [ARCHITECTURE],
    "model_type": "nemotron_h",
    PATTERN: config.hybrid_override_pattern,
    "num_hidden_layers": len(config.hybrid_override_pattern),
    "dtype": config.param_dtype,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **{name: value for name, value in DEFAULTS.items() if name != "time_step_limit"},
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
  }
