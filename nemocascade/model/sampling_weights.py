"""The weights that sampling uses: the trainer's, with those of products in the products' dtype."""

import jax

from nemocascade.config import ModelConfig
from nemocascade.types import Params

GATHERED, SHARDED = FORMS = ("gathered", "sharded")  # Values of model.sampling_weights.
# Parameters that the model uses in fp32: the router, the convolution, the decays and the norms. The others are cast
# to the products' dtype where they are used, so that casting them before changes no number.
IN_FP32 = {"gate", "e_score_correction_bias", "conv1d", "conv1d_bias", "A_log", "D", "dt_bias", "norm", "weight"}


def cast_products(config: ModelConfig, params: Params) -> Params:
  """The parameters, with the weights of products and the embedding in config.dtype."""
  cast = lambda path, leaf: leaf if path[-1].key in IN_FP32 else leaf.astype(config.dtype)
  return jax.tree_util.tree_map_with_path(cast, params)
