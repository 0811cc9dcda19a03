"""Validation inside a stage: when it scores, which checkpoint is kept and handed on, and when the stage ends."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from configs.tiny import if_rl
from experiments import rl
from nemocascade.errors import UserError
from nemocascade.runtime import validation
from nemocascade.runtime.heldout import Heldout
from nemocascade.runtime.outcome import Outcome, Spent
from nemocascade.runtime.validation import Validation
from nemocascade.store.checkpoint import Store
from nemocascade.store.kept import keep_step, kept_steps
from nemocascade.types import TrainState


@dataclasses.dataclass(frozen=True)
class Scripted(Heldout):
  """Held-out rows on which the parameters, here a step, have the scores `of[step]`."""

  of: dict
  asked: list

  def evaluate(self, parts, params, *, temperature, completions=1):
    self.asked.append(params)
    assert {name: len(rows) for name, rows in self.rows.items()} == {"math": 4, "code": 4}
    return {name: SimpleNamespace(mean=mean) for name, mean in self.of[params].items()}


MATH = {2: 0.2, 4: 0.6, 6: 0.4, 8: 0.6, 10: 0.5}


def stage(tmp_path, **fields):
  """(the validation of a stage with these fields, the steps that it scores)."""
  c = if_rl.get_config("smoke")
  c.steps, c.save_every = 9, 1
  c.validation = dict(prompts=4) | fields
  asked = []
  of = {step: {"math": score, "code": 1 - score} for step, score in MATH.items()} | {9: {"math": 0.1, "code": 0.1}}
  heldout = Scripted({"math": list(range(11)), "code": list(range(4))}, c.evaluation, 0, of, asked)
  return Validation(c, tmp_path / "if_rl", SimpleNamespace(programs=SimpleNamespace(template=None)), heldout), asked


def test_it_scores_every_so_many_steps_and_the_last(tmp_path):
  watch, asked = stage(tmp_path, every=2, metric="math")
  assert not any(watch(step, step, Spent()) for step in range(1, 10))
  assert asked == [2, 4, 6, 8, 9]
  assert not watch(8, 8, Spent())  # After a resumption: not scored again.
  assert asked == [2, 4, 6, 8, 9]
  lines = json.loads((tmp_path / "if_rl" / "validation.json").read_text())
  assert [(line["step"], line["metric"]) for line in lines] == [(2, 0.2), (4, 0.6), (6, 0.4), (8, 0.6), (9, 0.1)]


def test_the_best_step_is_kept_and_handed_on(tmp_path, monkeypatch):
  watch, _ = stage(tmp_path, every=2, metric="math")
  monkeypatch.setattr(validation.loading, "load", lambda path, template: path)
  checkpoints = tmp_path / "if_rl" / "checkpoints"
  for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
    watch(step, step, Spent())
    assert kept_steps(checkpoints) == {"best": best}
  found = watch.handed_on(Outcome(8, str(checkpoints / "8"), 8, 1, 1.0))
  assert (found.checkpoint, found.params, found.steps) == (str(checkpoints / "4"), str(checkpoints / "4"), 8)


def test_the_mean_over_the_domains_is_the_metric_where_none_is_named(tmp_path):
  watch, _ = stage(tmp_path, every=3)
  watch(9, 9, Spent())
  assert json.loads((tmp_path / "if_rl" / "validation.json").read_text())[0]["metric"] == pytest.approx(0.1)


def test_the_stage_ends_after_so_many_validations_without_a_new_best(tmp_path):
  watch, asked = stage(tmp_path, every=2, metric="math", patience=2)
  assert [watch(step, step, Spent()) for step in (2, 4, 6, 8)] == [False, False, False, True]
  again, asked = stage(tmp_path, every=2, metric="math", patience=2)
  assert again(8, 8, Spent()) and not asked  # Killed after its last step: ends at once.
  assert not again(6, 6, Spent())  # Restored from an older checkpoint: the later steps do not count yet.


def test_without_every_there_is_none_of_it(tmp_path):
  c = if_rl.get_config("smoke")
  watch = Validation(c, tmp_path / "if_rl", None, Heldout({}, c.evaluation, 0))
  outcome = Outcome(1, "x", 2, 1, 1.0)
  assert not watch(2, None, Spent()) and watch.handed_on(outcome) is outcome and not (tmp_path / "if_rl").exists()


def test_newer_checkpoints_do_not_remove_a_kept_one(tmp_path):
  store = Store(tmp_path / "checkpoints")
  save = lambda step: store.save(step, TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {}), {})  # noqa: E731
  save(1)
  keep_step(store.directory, "best", 2)
  for step in (2, 3, 4, 5):
    save(step)
  assert store.steps() == [2, 4, 5]
  keep_step(store.directory, "end_4", 4)
  keep_step(store.directory, "best", 6)
  for step in (6, 7, 8):
    save(step)
  assert store.steps() == [4, 6, 7, 8]


def test_the_record_of_a_checkpoint_has_the_stores_stamp(tmp_path):
  store = Store(tmp_path / "checkpoints", stamp={"lineage": {"stage": "sft"}})
  state = TrainState(jnp.int32(1), {"w": jnp.ones(2)}, {})
  store.save(1, state, {"tokens": 3})
  assert store.restore(state)[1] == {"tokens": 3, "lineage": {"stage": "sft"}}


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(every=3), "validation.every=3: must be a multiple of save_every=2"),
    (dict(every=2, metric="maths"), "unknown validation.metric 'maths': did you mean 'math'"),
    (dict(patience=2), "validation.every=0 with patience=2"),
    (dict(every=-1), "validation.every=-1"),
  ],
)
def test_what_cannot_be_done_is_refused(fields, message):
  c = if_rl.get_config("smoke")
  c.save_every, c.validation = 2, fields
  with pytest.raises(UserError) as error:
    rl.check(c)
  assert message in str(error.value)


def test_its_decisions_are_compared_between_processes(tmp_path, monkeypatch):
  decided = []
  monkeypatch.setattr(validation.hosts, "decided", lambda value, what: decided.append(value))
  watch, _ = stage(tmp_path, every=2, metric="math", patience=2)
  assert [watch(step, step, Spent()) for step in range(1, 9)][-1]
  assert decided[-2:] == [[4, False], [4, True]]
