"""At any temperature, sampler, trainer, teachers and reference score the same distribution."""

import functools

import jax
import numpy as np
import pytest

from configs.recipe import generated
from configs.tiny import if_rl
from experiments import rl
from nemocascade.advantage import mopd, mopd_clipped, mopd_outcome
from nemocascade.report.metrics import read_lines
from nemocascade.rollout import episode, rewards
from nemocascade.runtime import objective, parts, scoring, signals
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.start import save_model_files
from nemocascade.runtime.teachers import Teacher, gather
from nemocascade.store.checkpoint import Store, load_params
from nemocascade.types import TrainState
from nemocascade.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("compiled_fast")
temperatures = pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 1.7])


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  """A stage of one step with eight completions; the student is its own teacher and reference."""
  root = tmp_path_factory.mktemp("temperature")
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.steps, c.dynamic_filtering, c.overlong = 1, False, "keep"
    c.rollout.update(prompts=4, completions=2)
    c.packing.update(rows=8, pieces=2)
    c.model.initializer_range = 0.2  # Wide, because a temperature only matters where logits differ.
    c.domains = generated("instruction")
  p = parts.build(c, root)
  save_model_files(c, root / "start", p.text.tokenizer)
  Store(root / "start" / "checkpoints").save(
    1, TrainState(np.int32(0), p.programs.fresh_params(jax.random.key(0)), {}), {}
  )
  start = str(root / "start" / "checkpoints" / "1")
  rows = draw_heldout(c, p.domains, p.text.tokenizer).rows
  teachers = gather(p.programs, p.text.tokenizer, [Teacher("instruction", start, 0.0, "")], 1, rows)
  return c, p, root, start, teachers


def changed(c, temperature, **fields):
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.teachers, c.rollout.temperature = {"instruction": "start"}, temperature
    c.update_from_flattened_dict(fields)
  return c


def line(stage, name, temperature, **fields):
  """The metrics of the only step."""
  c, p, root, start, teachers = stage
  rl.run(changed(c, temperature, **fields), root / f"{name}_{temperature}", p, start, teachers)
  (line,) = read_lines(root / f"{name}_{temperature}" / "metrics.jsonl")
  return line


@functools.cache
def taken(temperature, top_p, p, start):
  """Samples, and the parameters that sampled them."""
  params = load_params(start, p.programs.template)
  rows = [p.domains["instruction"].rows.train(0, number) for number in range(4)]
  samples = episode.collect(
    p.programs.engine(48, 112), params, jax.random.key(3), rows, p.domains, tokenizer=p.text.tokenizer, G=2,
    temperature=np.float32(temperature), top_p=top_p,
  )  # fmt: skip
  return samples, params


@temperatures
@pytest.mark.parametrize("advantage", [mopd, mopd_clipped, mopd_outcome])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn_of_it(stage, advantage, temperature):
  _, p, _, start, teachers = stage
  samples, _ = taken(temperature, 1.0, p, start)
  verdicts = [[Verdict(1.0, "")] * 2 for _ in samples.rows]  # Equal rewards: mopd_outcome's GRPO term is 0.
  rollout, _ = rewards.to_rollout(samples, verdicts)
  said = np.asarray(signals.teacher_logprobs(p.programs, teachers, samples, np.float32(temperature)))
  assert np.abs(said[samples.loss_mask_QGT]).mean() > 0.1
  advantages = advantage(jax.tree.map(jax.numpy.asarray, rollout.replace(teacher_logprobs_QGT=said)))
  np.testing.assert_allclose(np.asarray(advantages)[samples.loss_mask_QGT], 0.0, atol=2e-4)


@temperatures
def test_on_policy_trainer_and_sampler_agree_and_the_reference_is_no_way_off(stage, temperature):
  said = line(stage, "on_policy", temperature, advantage="mopd", kl_weight=0.1)
  assert said["policy/sampler_error"] < 1e-4 and abs(said["policy/ratio_max"] - 1) < 2e-3
  assert said["advantage/abs"] < 1e-4 and abs(said["policy/reference_kl"]) < 1e-6
  assert said["tokens/learned"] > 100


@temperatures
@pytest.mark.parametrize("name, options", [
  ("reverse_kl", {}), ("forward_kl", {}), ("reverse_kl_topk", {"k": 8}), ("forward_kl_topk", {"k": 8}),
])  # fmt: skip
def test_a_student_is_at_no_distance_of_itself(stage, name, options, temperature):
  said = line(
    stage, name, temperature, advantage="none", distillation=name, distillation_weight=1.0,
    **{f"options.{name}.{field}": value for field, value in options.items()},
  )  # fmt: skip
  assert abs(said["policy/teacher_kl"]) < 2e-6 and said["norm/grad"] < 1e-4


def test_the_temperature_is_no_reason_to_compile_again(stage):
  c, p, *_ = stage
  fields = dict(advantage="mopd", kl_weight=0.1, updates=2, ratio="token_clip")
  line(stage, "first", 0.9, **fields)
  _, step_fn, proximal_fn = objective.step_program(changed(c, 0.9, **fields), p.programs)
  programs = [step_fn, proximal_fn, p.programs.logprobs, p.programs.engine(48, 112).decode_fn]
  before = [program._cache_size() for program in programs]
  line(stage, "second", 1.1, **fields)
  assert objective.step_program(changed(c, 1.1, **fields), p.programs)[1] is step_fn
  assert [program._cache_size() for program in programs] == before and min(before) > 0


@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence_mask"])
def test_a_nucleus_is_scored_as_the_whole_distribution_and_weighed_by_what_was_cut_off(stage, correction):
  _, p, _, start, _ = stage
  samples, params = taken(0.8, 0.7, p, start)
  mask = samples.loss_mask_QGT
  own = np.asarray(scoring.score_rows(p.programs, params, samples, np.float32(0.8)))
  np.testing.assert_allclose(own[mask], samples.behaviour_logprobs_QGT[mask], atol=1e-4)
  cut = (samples.drawn_logprobs_QGT - samples.behaviour_logprobs_QGT)[mask]
  assert (cut >= -1e-5).all() and cut.max() > 0.1 and cut.max() < -np.log(0.7) + 1e-4
  said = line(
    stage, correction, 0.8, correction=correction, **{"rollout.top_p": 0.7, "options.sequence_mask.low": 0.99}
  )
  assert said["policy/sampler_error"] < 1e-4 and said["policy/ratio_masked"] == 0


def test_whole_distributions_are_recorded_once(stage):
  _, p, _, start, _ = stage
  assert taken(0.6, 1.0, p, start)[0].drawn_logprobs_QGT is None
