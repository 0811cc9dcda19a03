"""A stage that lags: each batch is sampled with the parameters before the last update, in a thread or later."""

import dataclasses
import shutil
import threading
import types

import jax
import numpy as np
import pytest
from test_compilations import MICRO, P, T
from test_rl import lines, with_vowels

from configs.tiny import if_rl
from experiments import rl
from nemocascade.domains.domain import Domain
from nemocascade.errors import UserError
from nemocascade.runtime import batches, parts

pytestmark = pytest.mark.usefixtures("compiled_fast")


def config():
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.model.update(MICRO)
    c.steps, c.save_every, c.dynamic_filtering, c.overlong, c.tokenizer.conversations = 3, 1, False, "keep", 20
    c.rollout.update(prompts=4, completions=2, prompt_tokens=P, total_tokens=T, lag=1)
    c.packing.update(rows=8, row_tokens=T, pieces=1)
    c.optimizer.update(peak_lr=0.03, warmup_steps=0)
    c.mesh.update(data=1, expert=1)
  return c


def test_batches_are_of_the_parameters_before_the_last_update_and_the_stage_resumes_to_the_last_bit(
  tmp_path, monkeypatch
):
  c, whole, cut, threads, sample = (
    config(),
    tmp_path / "whole" / "if_rl",
    tmp_path / "cut" / "if_rl",
    [],
    batches.sample,
  )
  p = parts.build(c, tmp_path, domains={"instruction"})
  later = with_vowels(dataclasses.replace(p, text=p.text.write()))
  beside = dataclasses.replace(later.domains["instruction"], beside=True)
  see = lambda *args, **more: (
    threads.append(threading.current_thread() is threading.main_thread()) or sample(*args, **more)
  )  # noqa: E731
  monkeypatch.setattr(batches, "sample", see)
  outcome = rl.run(c, whole, dataclasses.replace(later, domains={"instruction": beside}), "")
  assert threads == [True, False, False]
  error = [line["policy/sampler_error"] for line in lines(whole)]
  assert error[0] < 1e-4 < min(error[1:])
  shutil.copytree(whole, cut)
  shutil.rmtree(cut / "checkpoints" / "3")  # As if killed in the third step.
  again = rl.run(c, cut, later, "")
  assert threads[3:] == [True]
  jax.tree.map(np.testing.assert_array_equal, again.params, outcome.params)
  assert lines(cut) == lines(whole)


def test_a_batch_that_is_not_needed_any_more_ends_with_the_stage(monkeypatch):
  looks, begun = [], threading.Event()

  def endless(*_, exchange):
    while True:
      looks.append(exchange(1, "a look"))
      begun.set()

  monkeypatch.setattr(batches, "sample", endless)
  monkeypatch.setattr(batches, "for_sampling", lambda *_, own: ({}, {}))
  own, beside = Domain("a", None, None), Domain("a", None, None, beside=True)
  made = lambda domain: types.SimpleNamespace(  # noqa: E731
    domains={"instruction": domain}, programs=types.SimpleNamespace(mesh=types.SimpleNamespace(size=1))
  )
  state = types.SimpleNamespace(params={})
  with batches.Batches(config(), made(own), None, None) as waits:
    waits.begin(state, 1)
  assert waits._thread is None  # A user's own verifier needs the main thread.
  with batches.Batches(config(), made(beside), None, None) as ahead:
    ahead.begin(state, 1)
    assert begun.wait(60)
  ahead._thread.join(60)
  assert not ahead._thread.is_alive() and looks


def test_a_lag_is_of_one_update():
  c = config()
  c.updates = 2
  with pytest.raises(UserError, match="rollout.lag=1 with updates=2"):
    rl.check(c)
