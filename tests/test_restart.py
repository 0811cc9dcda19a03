"""A run that is started again may use other machines, and must compute what it computed before."""

import json

import pytest

from configs.tiny import cascade as tiny_cascade
from configs.tiny import if_rl
from configs.tiny import sft as sft_config
from nemocascade.errors import UserError
from nemocascade.runtime import workdir as workdir_lib
from nemocascade.runtime.text import Text

OTHER_MACHINES = {
  "sft": {"mesh.data": 4, "mesh.expert": 2, "pieces": 2, "data_workers": 3},
  "rl": {"mesh.data": -1, "packing.pieces": 2, "sandbox.workers": 7},
  "cascade": {"mesh.expert": 4, "stages.sft.pieces": 2, "stages.if_rl.packing.pieces": 2, "sandbox.workers": 7},
}
CONFIGS = {"sft": sft_config, "rl": if_rl, "cascade": tiny_cascade}


def changed(kind: str, fields: dict):
  """A config with these fields."""
  c = CONFIGS[kind].get_config("smoke").copy_and_resolve_references()
  with c.ignore_type():
    c.update_from_flattened_dict(fields)
  return c


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_goes_on_over_another_mesh(kind, tmp_path):
  for fields in ({}, OTHER_MACHINES[kind]):
    c = changed(kind, fields)
    workdir_lib.claim(c, tmp_path, Text(None))
    assert json.loads((tmp_path / "config.json").read_text())["config"] == json.loads(c.to_json_best_effort())


@pytest.mark.parametrize(
  "kind, field, value",
  [
    ("sft", "rows", 8),
    ("sft", "model.hidden_size", 32),
    ("rl", "rollout.prompts", 4),
    ("cascade", "stages.sft.rows", 8),
  ],
)
def test_what_a_run_computes_stays_while_its_machines_change(kind, field, value, tmp_path):
  workdir_lib.claim(changed(kind, {}), tmp_path, Text(None))
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(UserError, match=f"belongs to another config: config.{field} is"):
    workdir_lib.claim(changed(kind, OTHER_MACHINES[kind] | {field: value}), tmp_path, Text(None))
  assert (tmp_path / "config.json").read_text() == before
