"""An RL stage: bad requests are refused with the numbers, and a resumed stage is bitwise the same."""

import dataclasses
import inspect
import json
import shutil

import jax
import numpy as np
import pytest

from configs.tiny import if_rl
from experiments import rl
from nemocascade.domains.domain import Domain, one_by_one
from nemocascade.domains.rows import make_prompt
from nemocascade.errors import StageStopped, UserError
from nemocascade.generated.generator import GeneratedRows, Generator
from nemocascade.rollout import episode, rewards
from nemocascade.runtime import objective, parts, signals
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.mixture import Mixture
from nemocascade.runtime.start import save_model_files
from nemocascade.runtime.teachers import Teacher, gather
from nemocascade.store.checkpoint import Store, load_params
from nemocascade.types import TrainState
from nemocascade.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("packing.rows", 4, ["packing.rows=4", "at least"]),
    ("packing.row_tokens", 60, ["packing.row_tokens=60", "rollout.total_tokens=112"]),
    ("rollout.completions", 1, ["rollout.completions=1"]),
    ("overlong", "drop", ["overlong", "zero"]),
    ("correction", "icepopp", ["did you mean 'icepop'"]),
    ("advantage", "dr_grop", ["did you mean 'dr_grpo'"]),
    ("ratio", "tokenclip", ["did you mean 'token_clip'"]),
    ("aggregation", "mean", ["token_mean"]),
    ("kl", "k4", ["k1, k2, k3"]),
    ("updates", 0, ["updates=0"]),
    ("advantage", "mopd_outcome", ["'instruction'", "no teacher"]),
    ("distillation", "reverse_kl_top", ["did you mean 'reverse_kl_topk'"]),
    ("distillation_weight", 0.5, ["distillation='reverse_kl'", "'instruction'", "no teacher"]),
    ("advantage", "none", ["advantage='none'", "distillation_weight"]),
    ("reward", "pairwise", ["dynamic_filtering=True", "reward='pairwise'"]),
    ("rollout.lag", 2, ["rollout.lag=2"]),
  ],
)
def test_a_stage_that_cannot_run_is_refused_with_its_numbers(field, value, words):
  c = if_rl.get_config("smoke")
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError) as error:
    rl.check(c)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"packing.rows": 60}, ["packing.rows=60", "rollout.completions=64"]),
    ({"packing.pieces": 3}, ["packing.pieces=3", "8 completions"]),
    ({"packing.row_tokens": 30}, ["packing.row_tokens=30", "rollout.prompt_tokens=64"]),
    ({"router_balance.kind": "auxiliary", "router_balance.weight": 0.1}, ["router_balance.weight=0.1"]),
  ],
)
def test_prompts_cannot_be_shared_where_that_does_not_fit(fields, words):
  c = if_rl.get_config("smoke")
  c.rollout.update(prompts=8, completions=8, prompt_tokens=48, total_tokens=112)
  c.packing.update(rows=64, row_tokens=64, pieces=2, shared_prompts=True)
  rl.check(c)
  c.update_from_flattened_dict(fields)
  with pytest.raises(UserError) as error:
    rl.check(c)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("k, least", [(0, "at least 1"), (2000, "vocab_size=1024")])
def test_a_top_k_of_more_tokens_than_there_are_or_of_none_is_refused(k, least):
  c = if_rl.get_config("smoke")
  c.teachers = dict.fromkeys(c.mixture, "best")
  c.distillation, c.distillation_weight, c.options.reverse_kl_topk.k = "reverse_kl_topk", 1.0, k
  with pytest.raises(UserError, match=rf"options.reverse_kl_topk.k={k}.*{least}"):
    rl.check(c)


def test_a_setting_that_its_function_does_not_have_is_named():
  c = if_rl.get_config("smoke")
  c.options = {"icepop": {"hihg": 2.0}}
  with pytest.raises(UserError, match="setting in options.icepop 'hihg': did you mean 'high'"):
    rl.check(c)
  c.options = {"icepopp": {"high": 2.0}}
  with pytest.raises(UserError, match="did you mean 'icepop'"):
    rl.check(c)


def test_the_options_of_the_tiny_config_are_the_functions_own_defaults():
  c = if_rl.get_config()
  functions = {name: fn for choices in objective.SLOTS.values() for name, fn in choices.items()}
  for name, fields in c.options.items():
    defaults = {n: p.default for n, p in inspect.signature(functions[name]).parameters.items()}
    assert fields.to_dict() == {n: defaults[n] for n in fields}


def test_stages_that_learn_alike_share_a_program_whatever_their_advantage():
  c, other = if_rl.get_config("smoke"), if_rl.get_config("smoke")
  other.advantage, other.mixture, other.options.tis.high = "mopd", {"math": 1.0}, 9.0
  assert objective.step_settings(c) == objective.step_settings(other)
  other.correction = "tis"
  assert objective.step_settings(c) != objective.step_settings(other)
  assert '"high": 9.0' in objective.step_settings(other)


VOWELS = frozenset("aeiou")


class Says(Generator):
  """Asks for a number."""

  name = "instruction"

  def make_row(self, rng):
    return make_prompt(self.name, f"say {rng.integers(1000)}")


def share_of_vowels(row, completion):
  """Rewards differ within groups for any policy."""
  text = completion.text
  return Verdict(sum(c in VOWELS for c in text) / max(len(text), 1), "share of vowels")


def with_vowels(p, judge=share_of_vowels):
  """The parts with a domain `instruction` that rewards the share of vowels."""
  domain = Domain("instruction", GeneratedRows(Says(), "instruction"), one_by_one(judge), thinking=False)
  return dataclasses.replace(p, domains={**p.domains, "instruction": domain})


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  """A stage of four steps from fresh parameters, with a checkpoint after every second step."""
  root = tmp_path_factory.mktemp("rl")
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.steps, c.save_every, c.dynamic_filtering, c.overlong = 4, 2, False, "keep"
    c.rollout.update(prompts=4, completions=2)
    c.packing.update(rows=8, pieces=2)
    c.guards.window = 2  # A short window, so that the guards' histories matter within four steps.
    c.optimizer.warmup_steps = 0
  p = parts.build(c, root)
  p = with_vowels(p)
  params = p.programs.fresh_params(jax.random.key(0))
  Store(root / "start" / "checkpoints").save(1, TrainState(np.int32(0), params, {}), {})
  save_model_files(c, root / "start", p.text.tokenizer)
  start = str(root / "start" / "checkpoints" / "1")
  collect, keys = episode.collect, set()
  with pytest.MonkeyPatch().context() as patch:
    see = lambda engine, params, key, *args, **how: keys.add(str(key)) or collect(engine, params, key, *args, **how)
    patch.setattr(episode, "collect", see)
    outcome = rl.run(c, root / "whole" / "if_rl", p, start)
  assert len(keys) == c.steps  # Each step has its own random key.
  assert moved(outcome, start) and all(line["reward/mean"] > 0 for line in lines(root / "whole" / "if_rl"))
  return c, p, root, start


def moved(outcome, start) -> bool:
  """Whether the parameters changed since the start by more than rounding."""
  return change(outcome, start) > 1e-4


def change(outcome, start) -> float:
  """The largest change of any parameter; one update changes each by at most the rate, 1e-3."""
  before = load_params(start, jax.eval_shape(lambda p: p, outcome.params))
  changes = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), outcome.params, before)
  return max(jax.tree.leaves(changes))


def lines(stage_dir):
  rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]


def record(stage_dir):
  """The record of the last checkpoint, without the seconds that it took."""
  found = json.loads((stage_dir / "checkpoints" / "4" / "record" / "metadata").read_text())
  return {name: value for name, value in found.items() if name != "meter"}


def test_a_resumed_stage_is_the_uninterrupted_one_to_the_last_bit(stage):
  c, p, root, start = stage
  whole, cut = root / "whole" / "if_rl", root / "cut" / "if_rl"
  shutil.copytree(whole, cut)
  shutil.rmtree(cut / "checkpoints" / "4")  # As if killed in the fourth step.
  outcome = rl.run(c, cut, p, start)
  expected = load_params(whole / "checkpoints" / "4", jax.eval_shape(lambda p: p, outcome.params))
  jax.tree.map(np.testing.assert_array_equal, outcome.params, expected)
  assert lines(cut) == lines(whole)
  assert any(line.get("guard/reward_collapse") is not None for line in lines(cut))
  assert record(cut) == record(whole)
  assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_stage_whose_prompts_are_shared_learns_what_it_learns_when_they_are_repeated(stage, monkeypatch):
  c, p, root, start = stage
  collect, asked = episode.collect, {}
  monkeypatch.setattr(episode, "collect", lambda *args, **how: asked.update(how) or collect(*args, **how))
  shared = c.copy_and_resolve_references()
  with shared.unlocked():
    shared.steps = 1
    shared.packing.update(rows=8, row_tokens=c.rollout.total_tokens, pieces=2, shared_prompts=True)
    shared.rollout.record_experts = True
  assert moved(rl.run(shared, root / "shared" / "if_rl", p, start), start)
  assert asked["completion_tokens"] == shared.packing.row_tokens  # A completion must fit in its row.
  (got,), expected = lines(root / "shared" / "if_rl"), lines(root / "whole" / "if_rl")[0]
  assert got["expert/agreement"] > 0.99 and "expert/agreement" not in expected
  # Router loads differ, because the tokens of a prompt are counted once; these metrics must agree.
  for name in [n for n in expected if n.split("/")[0] in ("loss", "norm", "policy", "reward", "advantage", "tokens")]:
    np.testing.assert_allclose(got[name], expected[name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_several_updates_a_batch_are_counted_as_one_step_and_all_learn(stage):
  c, p, root, start = stage
  twice = c.copy_and_resolve_references()
  with twice.unlocked():
    twice.updates, twice.steps, twice.ratio = 2, 1, "token_clip"
    twice.rollout.replay = True
  outcome = rl.run(twice, root / "twice", p, start)
  (line,) = lines(root / "twice")
  assert change(outcome, start) > 1.5e-3 and line["step/skipped_nonfinite"] == 0
  assert line["policy/sampler_error"] < 1e-4  # Measured with the policy that sampled, before both updates.
  assert line["expert/agreement"] > 0.999  # So is this; after an update other experts are chosen.
  assert outcome.steps == 1 and len(lines(root / "twice")) == 1
  assert int(Store(root / "twice" / "checkpoints").latest()) == 1
  assert rl.run(twice, root / "twice", p, start).steps == 1  # The stage is finished, so nothing runs again.


def test_a_batch_of_which_everything_is_left_out_is_counted_and_changes_no_parameter(stage, monkeypatch):
  c, p, root, start = stage
  none = c.copy_and_resolve_references()
  with none.unlocked():
    none.steps, none.dynamic_filtering = 2, True
  p = with_vowels(p, lambda *_: Verdict(0.25, "all alike"))
  outcome = rl.run(none, root / "none", p, start)
  assert [line["rollout/skipped"] for line in lines(root / "none")] == [1, 1]
  before = load_params(start, jax.eval_shape(lambda p: p, outcome.params))
  jax.tree.map(np.testing.assert_array_equal, outcome.params, before)


def test_a_stage_ends_where_its_watcher_says_and_knows_it_when_run_again(stage):
  c, p, root, start = stage
  seen = []

  def watch(steps, params, spent):
    seen.append((steps, spent))
    return spent.sampled > 0 and steps >= 1

  for _ in range(2):
    outcome = rl.run(c, root / "watched", p, start, watch=watch)
    assert outcome.steps == 1 and outcome.checkpoint.endswith("/1")
  (steps, spent), again = seen
  assert again == (1, spent) and spent.sampled == outcome.tokens
  (line,) = lines(root / "watched")
  assert spent.sampled == line["rollout/tokens"] * 8  # 4 prompts of 2 completions.
  assert spent.trained == spent.sampled + 2 * spent.prefilled and spent.scored == 0
  assert spent.flops(10) == 20 * (spent.sampled + spent.prefilled) + 60 * spent.trained


@pytest.mark.parametrize("name, options", [("reverse_kl", {}), ("forward_kl_topk", {"k": 1024})])
def test_a_policy_that_is_its_own_teacher_is_at_no_distance_and_stays(stage, name, options):
  c, p, root, start = stage
  own = c.copy_and_resolve_references()
  with own.unlocked():
    own.steps, own.advantage, own.distillation, own.distillation_weight = 1, "none", name, 1.0
    own.options, own.teachers = {name: options}, dict.fromkeys(c.mixture, start)
    own.optimizer.update(peak_lr=1e-3, warmup_steps=0, eps=1.0)  # A small eps would amplify gradients near 0.
  rows = draw_heldout(c, p.domains, p.text.tokenizer).rows
  teachers = gather(p.programs, p.text.tokenizer, [Teacher(domain, start, 0.0, "") for domain in c.mixture], 1, rows)
  other = p.programs.fresh_params(jax.random.key(1))
  Store(root / name / "other" / "checkpoints").save(1, TrainState(np.int32(0), other, {}), {})
  stranger = str(root / name / "other" / "checkpoints" / "1")
  of = [Teacher(domain, stranger, 0.0, "") for domain in c.mixture]
  strangers = gather(p.programs, p.text.tokenizer, of, 1, rows)
  # It must learn from another teacher by more than the tolerance below; eps makes updates as small as gradients.
  assert change(rl.run(own, root / f"{name}_of_another", p, start, strangers), start) > 3e-6
  outcome = rl.run(own, root / name, p, start, teachers)
  (line,) = lines(root / name)
  assert abs(line["policy/teacher_kl"]) < 1e-6 and line["norm/grad"] < 1e-4
  before = load_params(start, jax.eval_shape(lambda p: p, outcome.params))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), outcome.params, before)


def test_states_and_likeliest_tokens_are_those_of_each_prompts_own_teacher(stage):
  c, p, root, start = stage
  other = p.programs.fresh_params(jax.random.key(1))
  Store(root / "other" / "checkpoints").save(1, TrainState(np.int32(0), other, {}), {})
  other = str(root / "other" / "checkpoints" / "1")
  shares = {"instruction": 1.0, "math": 1.0}
  rows, *_ = Mixture(p.domains, shares, seed=0, tokenizer=p.text.tokenizer, limit=48, state={}).draw(4)
  params = p.programs.fresh_params(jax.random.key(2))
  r = c.rollout
  engine = p.programs.engine(r.prompt_tokens, r.total_tokens)
  samples = episode.collect(engine, params, jax.random.key(0), rows, p.domains, tokenizer=p.text.tokenizer, G=2)
  of = [Teacher("instruction", start, 0.0, ""), Teacher("math", other, 0.0, "")]
  teachers = gather(p.programs, p.text.tokenizer, of, 1, draw_heldout(c, p.domains, p.text.tokenizer).rows)
  expected = signals.teacher_logprobs(p.programs, teachers, samples, np.float32(1))
  heads = signals.teacher_heads(p.programs, teachers)
  found = jax.device_get(signals.teacher_states(p.programs, teachers, samples))
  logits = np.einsum("QGTD,QDV->QGTV", found["teacher_states_QGTD"], heads[found["teacher_Q"]])
  logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), samples.tokens_QGT[..., None], -1)[..., 0]
  np.testing.assert_allclose(np.where(samples.loss_mask_QGT, logprobs, 0), expected, atol=1e-4)
  top = jax.device_get(signals.teacher_likeliest(p.programs, teachers, samples, 1024, np.float32(1)))
  at = np.argmax(top["top_tokens_QGTK"] == samples.tokens_QGT[..., None], axis=-1)
  logprobs = np.take_along_axis(top["top_logprobs_QGTK"], at[..., None], -1)[..., 0]
  np.testing.assert_allclose(np.where(samples.loss_mask_QGT, logprobs, 0), expected, atol=1e-4)


def test_a_step_learns_from_what_the_trainer_itself_would_have_sampled(stage):
  _, _, root, _ = stage
  for line in lines(root / "whole" / "if_rl"):
    assert abs(line["policy/sampler_kl"]) < 1e-4 and line["policy/sampler_error"] < 1e-4


def test_a_reward_rises_on_a_task_that_twenty_steps_can_learn(stage):
  c, p, root, start = stage
  longer = c.copy_and_resolve_references()
  with longer.unlocked():
    longer.steps, longer.save_every = 20, 20
    longer.rollout.update(prompts=8, completions=8, prompt_tokens=32, total_tokens=48)
    longer.packing.update(rows=16, row_tokens=192, pieces=1)
    longer.optimizer.peak_lr = 1e-2
  rl.run(longer, root / "learns" / "if_rl", p, start)
  found = [line["reward/mean"] for line in lines(root / "learns" / "if_rl")]
  assert np.mean(found[-4:]) > np.mean(found[:4]) + 0.1, found


def test_one_bad_batch_is_passed_over_and_so_many_in_a_row_end_the_stage(stage, monkeypatch):
  c, p, root, start = stage
  to_rollout, bad = rewards.to_rollout, {1}
  calls = []

  def poisoned(*args, **how):
    rollout, counts = to_rollout(*args, **how)
    calls.append(len(calls))
    if calls[-1] in bad:
      rollout = rollout.replace(rewards_QG=np.full_like(rollout.rewards_QG, np.nan))
    return rollout, counts

  monkeypatch.setattr(rewards, "to_rollout", poisoned)
  outcome = rl.run(c, root / "one_bad" / "if_rl", p, start)
  assert [line["step/skipped_nonfinite"] for line in lines(root / "one_bad" / "if_rl")] == [0, 1, 0, 0]
  assert moved(outcome, start) and all(np.isfinite(p).all() for p in jax.tree.leaves(outcome.params))

  bad.update(range(10))
  with pytest.raises(StageStopped, match=r"^if_rl, step 2: 3 updates in a row .*max_nonfinite=3"):
    calls.clear()
    rl.run(c, root / "all_bad" / "if_rl", p, start)
  # The count is in the checkpoint's record, so a restarted stage does not count from 0 again.
  with pytest.raises(StageStopped, match=r"^if_rl, step 2: 3 updates in a row"):
    rl.run(c, root / "all_bad" / "if_rl", p, start)
  kept = load_params(root / "all_bad" / "if_rl" / "checkpoints" / "2", jax.eval_shape(lambda p: p, outcome.params))
  before = load_params(start, jax.eval_shape(lambda p: p, outcome.params))
  jax.tree.map(np.testing.assert_array_equal, kept, before)


def test_a_guard_that_stops_saves_says_why_and_lets_nothing_go_on_there(stage, capsys):
  c, p, root, start = stage
  guarded = c.copy_and_resolve_references()
  guarded.guards.entropy_collapse.update(action="stop", threshold=100.0)
  guarded.guards.length_explosion.update(action="warn", threshold=0.0)
  guarded.guards.window = 3
  for words in ("^if_rl, step 2: entropy_collapse: policy/entropy is .* init_from=.*/3$", "ended by entropy_collapse"):
    with pytest.raises(StageStopped, match=words):
      rl.run(guarded, root / "guarded" / "if_rl", p, start)
  # The guard judges at the third step, when its window is full; that step is saved, and the stage ends there.
  found = lines(root / "guarded" / "if_rl")
  assert [line.get("guard/entropy_collapse") for line in found] == [None, None, 1]
  assert Store(root / "guarded" / "if_rl" / "checkpoints").latest() == 3
  assert capsys.readouterr().err.count("warning: if_rl, step 2: length_explosion") == 1


def test_prompts_that_are_too_long_are_counted_and_met_once(stage, monkeypatch):
  c, p, root, start = stage
  make_row = Says.make_row

  def sometimes_long(self, rng):
    row = make_row(self, rng)
    if rng.random() < 0.3:
      row["responses_create_params"]["input"][0]["content"] += " and again" * 40
    return row

  monkeypatch.setattr(Says, "make_row", sometimes_long)
  rl.run(c, root / "long" / "if_rl", p, start)
  whole = lines(root / "long" / "if_rl")
  assert sum(line["rollout/too_long_prompts"] for line in whole) > 0
  shutil.rmtree(root / "long" / "if_rl" / "checkpoints" / "4")
  rl.run(c, root / "long" / "if_rl", p, start)
  assert lines(root / "long" / "if_rl") == whole
