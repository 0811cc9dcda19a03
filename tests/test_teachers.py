"""A teacher is the best checkpoint of its domain; a probe checks that it has not changed since registration."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.errors import UserError
from nemocascade.runtime.teachers import (
  Probe,
  Teacher,
  Teachers,
  best_checkpoints,
  check_probe,
  probe_tokens,
  take_probe,
)
from nemocascade.types import Scores

pytestmark = pytest.mark.usefixtures("compiled_fast")

V = 16
TOKENS_BT = np.arange(12).reshape(2, 6) % V


@jax.jit
def score(params, tokens_BT, segment_ids_BT, wanted_BT=None):
  """A bigram model: row i of the table holds the logits after token i."""
  del segment_ids_BT, wanted_BT
  logp_VV = jax.nn.log_softmax(params["table"])
  before_BT, first_BT = tokens_BT[:, :-1], ((0, 0), (1, 0))
  logprobs_BT = jnp.pad(logp_VV[before_BT, tokens_BT[:, 1:]], first_BT)
  entropy_BT = jnp.pad(-jnp.sum(jnp.exp(logp_VV) * logp_VV, axis=-1)[before_BT], first_BT)
  return Scores(logprobs_BT, entropy_BT)


def params(seed=0, scale=3.0):
  return {"table": scale * jax.random.normal(jax.random.key(seed), (V, V))}


def stage(name, scores, status="done", solved=None, **more):
  """An entry of cascade.json. Of 64 prompts the first ones are solved, or those in `solved`."""
  words = {
    d: " ".join("1" if i in (solved or range(round(64 * s))) else "0" for i in range(64)) for d, s in scores.items()
  }
  return {
    "name": name, "status": status, "checkpoint": f"/run/{name}", "scores_after": scores, "prompt_scores_after": words,
  } | more  # fmt: skip


def test_a_stage_that_is_clearly_better_teaches_its_domain_and_the_first_of_equals():
  best = best_checkpoints(
    [
      {"name": "reward_model", "status": "done", "checkpoint": "/run/reward_model"},
      stage("sft", {"math": 0.25, "code": 0.5}),
      stage("rl", {"math": 0.75, "code": 0.5}),
      stage("rlhf", {"math": 0.5, "code": 0.25}),
      stage("mopd", {"math": 1.0, "code": 1.0}, status="running"),
    ]
  )
  assert best == {
    "math": Teacher("math", "/run/rl", 0.75, "rl"),
    "code": Teacher("code", "/run/sft", 0.5, "sft"),
  }


def test_a_higher_mean_by_noise_does_not_change_the_teacher():
  """The later stage solves 2 prompts of 64 more; on 14 prompts the two differ."""
  sft = stage("sft", {"math": 32 / 64}, solved=range(32))
  noisy = stage("rl", {"math": 34 / 64}, solved=range(6, 40))
  assert best_checkpoints([sft, noisy])["math"].stage == "sft"
  # As many more prompts, but none that was solved before is lost: with 12 more this is no noise.
  better = stage("rl", {"math": 44 / 64}, solved=range(44))
  assert best_checkpoints([sft, better])["math"].stage == "rl"


def test_a_teacher_is_compared_with_the_best_and_not_with_the_stage_before_it():
  """Small gains that each could be noise add up to one that is none."""
  line = [stage(f"s{i}", {"math": (20 + 4 * i) / 64}) for i in range(6)]
  assert best_checkpoints(line[:2])["math"].stage == "s0"
  assert best_checkpoints(line)["math"].stage == "s4"


def test_a_stage_teaches_only_the_domains_that_it_names():
  stages = [stage("sft", {"math": 0.25, "code": 0.25}), stage("rl", {"math": 0.9, "code": 0.9}, teaches=["code"])]
  assert {domain: t.stage for domain, t in best_checkpoints(stages).items()} == {"math": "sft", "code": "rl"}
  assert best_checkpoints([stages[1] | {"teaches": []}]) == {}


def test_a_probe_survives_json():
  probe = take_probe(score, params(), TOKENS_BT)
  back = Probe(**json.loads(json.dumps(dataclasses.asdict(probe))))
  check_probe(score, params(), back, vocab_size=V, name="x")


def test_a_probe_holds_the_models_own_numbers():
  probe = take_probe(score, params(), TOKENS_BT)
  logp_VV = np.asarray(jax.nn.log_softmax(params()["table"]), np.float64)
  np.testing.assert_allclose(probe.logprobs[1][2], logp_VV[7, 8], rtol=1e-6)
  entropy_V = -np.sum(np.exp(logp_VV) * logp_VV, axis=-1)
  np.testing.assert_allclose(probe.entropy, entropy_V[TOKENS_BT[:, :-1]].mean(), rtol=1e-5)


@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x[::-1], lambda x: x * jnp.nan])
def test_changed_parameters_fail_their_probe(change):
  probe = take_probe(score, params(), TOKENS_BT)
  with pytest.raises(UserError, match="teacher math: its probe's log-probabilities moved"):
    check_probe(score, jax.tree.map(change, params()), probe, vocab_size=V, name="math")


def test_a_teacher_that_guesses_uniformly_is_refused():
  """Untrained weights pass a probe that was taken of them, so entropy is checked too."""
  blank = params(scale=0.01)
  probe = take_probe(score, blank, TOKENS_BT)
  with pytest.raises(UserError, match="guesses uniformly"):
    check_probe(score, blank, probe, vocab_size=V, name="math")


def teachers(load=None, **fields):
  made = Teachers(load or (lambda c: params(int(c))), score, vocab_size=V, **fields)
  for domain, checkpoint in (("math", "1"), ("code", "2"), ("stem", "1")):
    probe = take_probe(score, params(int(checkpoint)), TOKENS_BT)
    made.register(Teacher(domain, checkpoint, 0.5, "rl", probe))
  return made


def test_one_checkpoint_is_in_memory_at_a_time():
  alive: list[weakref.ref] = []

  def load(checkpoint):
    gc.collect()
    assert not any(table() is not None for table in alive), "the one before is still held"
    made = params(int(checkpoint))
    alive.append(weakref.ref(made["table"]))
    return made

  made = Teachers(load, score, vocab_size=V)
  for domain, checkpoint in (("math", "1"), ("code", "2")):
    made.register(Teacher(domain, checkpoint, 0.5, "rl"))
  for domain in ("math", "code", "math"):
    made.params(domain)
  assert made.loads == 3


def test_each_checkpoint_of_a_batch_is_loaded_once_and_the_held_one_comes_first():
  made = teachers()
  domains = ["code", "math", "stem", "code"]
  for _ in range(2):
    for places in made.by_checkpoint(domains).values():
      for i in places:
        np.testing.assert_array_equal(
          made.params(domains[i])["table"], params(int(made.of(domains[i]).checkpoint))["table"]
        )
  assert made.loads == 3  # 1 and 2 are loaded; the second time 2 is still held, and only 1 is loaded again.
  assert made.by_checkpoint(domains) == {"1": [1, 2], "2": [0, 3]}


def test_as_many_checkpoints_stay_in_memory_as_are_allowed():
  made = teachers(keep=2)
  for domain in ("math", "code", "stem", "code", "math"):
    made.params(domain)
  assert made.loads == 2


def test_a_teacher_that_left_the_devices_comes_back_unchanged_and_is_not_read_again():
  made = teachers(keep=2)
  first = made.params("math")
  assert made.params("stem") is first  # The same checkpoint stays.
  made.params("code")
  back = made.params("math")
  assert back is not first and isinstance(back["table"], jax.Array) and made.loads == 2
  np.testing.assert_array_equal(back["table"], params(1)["table"])
  made.leave()
  assert made.params("math") is not back and made.loads == 2


def test_every_load_is_probed():
  made = teachers(load=lambda c: params(int(c) + 1))
  with pytest.raises(UserError, match="teacher of 'code', 2"):
    made.params("code")


def test_a_teacher_that_came_without_a_probe_is_probed_when_it_is_first_loaded():
  table = {"1": params(1), "blank": params(scale=0.01), "lost": {"table": jnp.full((V, V), jnp.nan)}}
  made = Teachers(table.get, score, vocab_size=V, tokens_BT=TOKENS_BT)
  for domain, checkpoint in (("math", "1"), ("code", "blank"), ("stem", "lost")):
    made.register(Teacher(domain, checkpoint, 0.5, "rl"))
  made.params("math")
  for domain in ("code", "stem"):
    with pytest.raises(UserError, match=f"of '{domain}'.*guesses uniformly"):
      made.params(domain)
  table["1"] = params(2)  # The checkpoint's files change during the run.
  with pytest.raises(UserError, match="of 'math', 1: its probe's log-probabilities moved"):
    made.params("math")


def test_checking_loads_every_checkpoint_once_and_finds_the_bad_one():
  made = teachers()
  made.check()
  assert made.loads == 2
  with pytest.raises(UserError, match="teacher of 'math', 1"):
    teachers(load=lambda c: params(7)).check()


def test_a_teacher_of_another_tokenizer_is_refused():
  made = teachers(tokenizer="a" * 64)
  with pytest.raises(UserError, match="its tokenizer bbbb"):
    made.register(Teacher("math", "3", 0.5, "rl", tokenizer="b" * 64))


def test_a_domain_without_a_teacher_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'math'"):
    teachers().params("maths")


@pytest.mark.parametrize("texts, shape", [(("abc", "abcd"), (2, 3)), (("", "a", "abcd"), (1, 4)), (("", "a"), (1, 16))])
def test_a_probe_has_log_probabilities_even_if_a_prompt_is_empty(texts, shape):
  tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
  rows = {
    f"domain {i}": [{"responses_create_params": {"input": [{"role": "user", "content": text}]}}]
    for i, text in enumerate(texts)
  }
  tokens = probe_tokens(tokenizer, rows)
  assert np.shape(tokens) == shape
