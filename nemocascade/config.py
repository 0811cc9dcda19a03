"""The frozen config of a model. It checks its values; its fields have Hugging Face's names."""

import dataclasses
import math

from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check_values

# What a program sets for itself: no field of a config file.
SET_BY_PROGRAMS = ("router_loss", "router_record", "router_replay")
BLOCK_KINDS = {"M": "Mamba-2", "E": "mixture of experts", "*": "attention", "-": "MLP"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model of the Nemotron-H family (transformers' `configuration_nemotron_h.py`).

  It is hashable, so it can be a static argument of jit. nemocascade/field_table.py describes every field.

  Raises:
    UserError: a value is outside its range, or two fields do not fit together.
  """

  vocab_size: int
  hidden_size: int
  hybrid_override_pattern: str  # One letter for each block: a key of BLOCK_KINDS.

  # Attention.
  num_attention_heads: int = 4
  num_key_value_heads: int = 2
  head_dim: int = 16

  # Mamba-2.
  mamba_num_heads: int = 8
  mamba_head_dim: int = 16
  ssm_state_size: int = 16
  n_groups: int = 2  # Groups of heads that share B and C.
  conv_kernel: int = 4
  use_conv_bias: bool = True
  chunk_size: int = 32  # Tokens of a chunk of the SSD scan; it affects speed, not results.
  time_step_min: float = 0.001  # These bounds of dt apply at initialisation only.
  time_step_max: float = 0.1
  time_step_floor: float = 1e-4
  time_step_limit: tuple[float, float] = (0.0, math.inf)  # Clamp of dt; transformers: (time_step_min, inf).

  # Mixture of experts, and MLP.
  n_routed_experts: int = 4
  num_experts_per_tok: int = 2
  moe_intermediate_size: int = 64
  moe_shared_expert_intermediate_size: int = 64
  n_group: int = 1  # The router first picks `topk_group` of these groups of experts.
  topk_group: int = 1
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0
  moe_latent_size: int | None = None  # Input and output width of the routed experts; None is hidden_size.
  router_loss: bool = False  # Whether Scores include the load-balancing loss; training sets it.
  router_record: bool = False  # Whether prefill and decoding record each token's experts; a rollout sets it.
  router_replay: bool = True  # Whether given records replace the router's choice, or are only compared with it.
  intermediate_size: int = 128  # Width of a dense MLP block.

  # Whole model.
  layer_norm_epsilon: float = 1e-5
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02
  rescale_prenorm_residual: bool = True  # Divides initial output projections by sqrt(blocks).
  dtype: str = "float32"  # Type of activations and matrix products.
  param_dtype: str = "float32"
  remat: str = "none"  # What the backward pass recomputes; model/remat.py.
  sequence_parallel: bool = False  # Split rows by tokens over mesh.expert where they would not fill the devices.
  sampling_weights: str = "gathered"  # Once a step; or "sharded" as in training, gathered for every token.

  def __post_init__(self):
    check_values("model", **{name: value for name, value in vars(self).items() if name not in SET_BY_PROGRAMS})
    pattern = self.hybrid_override_pattern
    for letter in pattern:
      if letter not in BLOCK_KINDS:
        raise unknown(f"letter in model.hybrid_override_pattern={pattern!r}", letter, BLOCK_KINDS)
    self._divides("num_key_value_heads", "num_attention_heads")
    self._divides("n_groups", "mamba_num_heads")
    self._divides("n_group", "n_routed_experts")
    self._at_most("num_experts_per_tok", "n_routed_experts")
    self._at_most("topk_group", "n_group")
    self._at_most("time_step_min", "time_step_max")
    least, largest = self.time_step_limit
    if least > largest:
      raise UserError(f"model.time_step_limit={self.time_step_limit}: the least is more than the largest")

  def _divides(self, part: str, whole: str) -> None:
    if getattr(self, whole) % getattr(self, part):
      raise UserError(f"model.{part}={getattr(self, part)} does not divide model.{whole}={getattr(self, whole)}")

  def _at_most(self, part: str, whole: str) -> None:
    if getattr(self, part) > getattr(self, whole):
      raise UserError(f"model.{part}={getattr(self, part)} is more than model.{whole}={getattr(self, whole)}")

  @property
  def mamba_inner_size(self) -> int:
    """Channels of a Mamba block: heads x channels of a head. Hugging Face's `expand` is not used."""
    return self.mamba_num_heads * self.mamba_head_dim

  @classmethod
  def from_fields(cls, fields: dict) -> "ModelConfig":
    """Builds a config from a section of a config file. Raises UserError on an unknown or a missing field."""
    known = {field.name for field in dataclasses.fields(cls)}
    for name in fields:
      if name not in known:
        raise unknown("field of model", name, known)
    missing = [n for n in ("vocab_size", "hidden_size", "hybrid_override_pattern") if n not in fields]
    if missing:
      raise UserError(f"model lacks {', '.join(missing)}")
    fields = dict(fields)
    if "time_step_limit" in fields:
      fields["time_step_limit"] = tuple(fields["time_step_limit"])
    return cls(**fields)
