"""The teachers that a config names are found; an unknown one is refused with the available ones."""

import pytest
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.runtime.teachers import find


def stage(name, checkpoint, status="done", **shares):
  """An entry of cascade.json. Of 32 prompts the first `shares` of each domain are solved."""
  words = {domain: " ".join("1" if i < share * 32 else "0" for i in range(32)) for domain, share in shares.items()}
  return {
    "name": name, "status": status, "checkpoint": checkpoint, "scores_after": shares, "prompt_scores_after": words,
  }  # fmt: skip


STAGES = [
  stage("sft", "/run/sft/7", math=0.75, stem=0.125),
  stage("if_rl", "/run/if_rl/9", math=0.25, stem=0.625),
  stage("mopd", "/run/mopd/1", "running", math=1.0),
]


def found(record=True, **teachers):
  c = ConfigDict({"teachers": teachers})
  return [(t.domain, t.checkpoint, t.stage) for t in find(c, STAGES if record else ())]


def test_best_is_the_finished_stage_that_is_clearly_better_in_that_domain():
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
