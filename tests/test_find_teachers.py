"""The teachers that a config names are found; an unknown one is refused with the available ones."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime.teachers import find
from nemocascade.store.record import Record

STAGES = [
  {"name": "sft", "status": "done", "checkpoint": "/run/sft/7", "scores_after": {"math": 0.5, "stem": 0.1}},
  {"name": "if_rl", "status": "done", "checkpoint": "/run/if_rl/9", "scores_after": {"math": 0.4, "stem": 0.3}},
  {"name": "mopd", "status": "running", "checkpoint": "/run/mopd/1", "scores_after": {"math": 0.9}},
]


def found(record=True, **teachers):
  c = ConfigDict({"teachers": teachers})
  return [
    (t.domain, t.checkpoint, t.stage) for t in find(c, Record(Path("cascade.json"), STAGES, {}) if record else None)
  ]


def test_best_is_the_finished_stage_with_the_highest_score_of_that_domain():
  assert found(math="best", stem="best") == [("math", "/run/sft/7", "sft"), ("stem", "/run/if_rl/9", "if_rl")]


def test_a_stage_may_be_named():
  assert found(math="if_rl") == [("math", "/run/if_rl/9", "if_rl")]


@pytest.mark.parametrize("name, word", [("if_r", "did you mean 'if_rl'"), ("mopd", "mopd"), ("/no/such/7", "best")])
def test_what_is_no_finished_stage_and_no_checkpoint_is_refused_with_the_choices(name, word):
  with pytest.raises(UserError, match="teachers.math") as error:
    found(math=name)
  assert word in str(error.value)


def test_without_a_cascade_there_is_no_best():
  with pytest.raises(UserError, match="teachers.math='best'.*--config.teachers.math=CKPT"):
    found(record=False, math="best")
