"""The 30B config has the published sizes, counted without making an array."""

import pytest

from configs.nano_30b.model import get_config
from nemocascade.config import ModelConfig
from nemocascade.model.size import active_params, count_params
from nemocascade.store.hf_config import config_fields, model_config


@pytest.fixture(scope="module")
def nano() -> ModelConfig:
  return ModelConfig.from_fields(get_config().model.to_dict())


def test_parameters_are_31_577_940_288(nano):
  assert count_params(nano) == 31_577_940_288


def test_a_token_uses_3_580_076_352_of_them(nano):
  """Nemotron-3-Nano report (arXiv 2512.20848): 3.2B active without the embedding, 3.6B with it."""
  assert active_params(nano) == 3_580_076_352
  assert active_params(nano) - 352_321_536 == 3_227_754_816


def test_the_pattern_has_the_published_blocks(nano):
  at = {letter: [i for i, l in enumerate(nano.hybrid_override_pattern) if l == letter] for letter in "ME*"}
  assert at["*"] == [5, 12, 19, 26, 33, 42]
  assert at["M"] == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 25, 28, 30, 32, 35, 37, 39, 41, 44, 46, 48, 50]
  assert len(at["E"]) == 23 and sum(map(len, at.values())) == 52


def test_the_config_survives_config_json(nano):
  again = model_config(config_fields(nano), "config.json")
  assert {**vars(again), "remat": True} == vars(nano)
