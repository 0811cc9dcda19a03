"""Control flow of a comparison: what each arm is given, what is resumed, what is refused. Nothing is trained."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from configs.nano_30b import grpo_vs_mopd as grpo_vs_mopd_30b
from configs.nano_30b import multi_domain as multi_domain_30b
from configs.tiny import (
  grpo_vs_mopd,
  multi_domain,
  sweep_bounds,
  sweep_distillation,
  sweep_lag,
  sweep_shape,
  sweep_warmup,
)
from experiments import ablation
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.model.size import count_params, matmul_params
from nemocascade.runtime.heldout import Heldout
from nemocascade.runtime.outcome import Outcome, Spent


@pytest.fixture
def trained(monkeypatch):
  """Replaces training by stubs; returns the list of (arm's folder, learning rate, start, teachers) that were run."""
  runs = []

  def run_stage(c, workdir, p, rows, record, name):
    assert rows.seed == c.seed
    checkpoint = workdir / name / "checkpoints" / "1"
    (checkpoint / "params").mkdir(parents=True, exist_ok=True)
    record.put(
      {"name": name, "kind": c.stages[name].kind, "status": "done", "checkpoint": str(checkpoint), "steps": 1,
       "wall_s": 1.0, "train_s": 1.0, "tokens": 1, "compilations": 0, "domains": ["math"], "start": "",
       "probe": {"tokens": [[1, 2]], "logprobs": [[0.0, -1.0]], "entropy": 1.0},
       "scores_after": {"math": 0.3}, "scores_intervals_after": {"math": [0.2, 0.4]}, "n_eval": {"math": 32},
       "prompt_scores_after": {"math": "0 1"}}
    )  # fmt: skip

  def run_arm(arm, directory, p, init, teachers, watch, title):
    assert title == f"seed {arm.seed} {directory.parent.name}"
    runs.append((directory.parent.name, arm.optimizer.peak_lr, init, teachers))
    assert directory.name == "rl" and f"seed_{arm.seed}" in directory.parts
    for steps in range(1, arm.steps + 1):
      if watch(steps, (arm.advantage, arm.optimizer.peak_lr, steps), Spent(sampled=10 * steps)):
        break
    return Outcome(None, "", steps, 10 * steps, 1.0)

  def scores(c, p, rows, params, full):
    """GRPO scores best at a rate of 1e-3, MOPD at 2e-3.

    The student scores 0.2 plus 0.01 times the seed; the teacher scores 0.3 more.
    """
    what, rate, steps = params
    rise = 0.1 * steps - abs(rate - (2e-3 if what == "mopd" else 1e-3))
    return {"math": 0.2 + 0.01 * rows.seed + (0.3 if what == "teacher" else rise if steps else 0)}

  monkeypatch.setattr(ablation.cascade, "run_stage", run_stage)
  monkeypatch.setattr(ablation.rl, "run", run_arm)
  monkeypatch.setattr(ablation.loading, "load", lambda path, template: (path.split("/")[-3], 1e-3, 0))
  monkeypatch.setattr(
    ablation, "gather", lambda programs, tokenizer, teachers, keep, rows: [(t.domain, t.stage) for t in teachers]
  )
  monkeypatch.setattr(ablation, "scores", scores)
  monkeypatch.setattr(ablation, "draw_heldout", lambda c, *_: Heldout({}, c.evaluation, c.seed))
  return runs


def test_every_arm_of_a_seed_starts_from_its_student_at_the_rate_found_on_other_seeds(tmp_path, trained, capsys):
  c = grpo_vs_mopd.get_config("smoke")
  found = ablation.run(c, tmp_path)
  assert str(tmp_path / "ablation.json") in capsys.readouterr().err.splitlines()[-1]
  assert set(found) == {"student_score", "teacher_score", "seeds", "arms", "summary", "paired"}
  assert found["student_score"]["mean"] == pytest.approx(0.205)
  assert found["teacher_score"]["mean"] == pytest.approx(0.505)
  searched, compared = trained[:4], trained[4:]
  assert [(name, rate) for name, rate, *_ in searched] == [
    ("grpo_0.001", 1e-3), ("grpo_0.002", 2e-3), ("mopd_0.001", 1e-3), ("mopd_0.002", 2e-3),
  ]  # fmt: skip
  assert all("search/seed_100/sft" in start for _, _, start, _ in searched)
  for i, seed in enumerate(c.seeds):
    of_seed = compared[6 * i : 6 * (i + 1)]
    assert {name for name, *_ in of_seed} == set(c.arms)
    for name, rate, start, teachers in of_seed:
      assert f"seed_{seed}/sft" in start and "search" not in start
      assert rate == (2e-3 if name in ("mopd", "mopd_clipped") else 1e-3)  # Other arms: GRPO's rate, or the config's.
      assert teachers == (None if name.startswith("grpo") else [("math", "teacher")])
  assert found["arms"]["grpo_150"]["steps"] == [0, 1, 2, 3] and found["arms"]["mopd"]["steps"] == [0, 1, 2]
  assert found["arms"]["mopd"]["scores"][1] == pytest.approx([0.21, 0.31, 0.41])


def test_a_second_run_finishes_what_is_not_done_and_comes_to_the_same(tmp_path, trained):
  c = grpo_vs_mopd.get_config("smoke")
  found = ablation.run(c, tmp_path)
  arm = tmp_path / "seed_1" / "arms" / "mopd"
  (arm / "done.json").unlink()
  text = (arm / "evaluations.jsonl").read_text()
  (arm / "evaluations.jsonl").write_text(text[:-9])  # A kill cut off the last line.
  (tmp_path / "ablation.json").unlink()
  trained.clear()
  assert ablation.run(c, tmp_path) == found
  assert [name for name, *_ in trained] == ["mopd"]
  assert json.loads((tmp_path / "ablation.json").read_text()) == found
  trained.clear()
  assert ablation.run(c, tmp_path) == found and not trained


def test_arms_that_come_out_equal_are_run_once_and_shown_each(tmp_path, trained):
  c = grpo_vs_mopd.get_config("smoke")
  c.arms.mopd_again = c.arms.mopd.copy_and_resolve_references()
  c.rate_of.mopd_again = "mopd"
  found = ablation.run(c, tmp_path)
  assert "mopd_again" not in [name for name, *_ in trained]
  assert (
    found["arms"]["mopd_again"] == found["arms"]["mopd"] and found["summary"]["mopd_again"] == found["summary"]["mopd"]
  )


@pytest.mark.parametrize("unit", ["tokens", "flops"])
def test_an_arm_ends_when_its_budget_is_spent_and_is_scored_there_once(tmp_path, monkeypatch, unit):
  c = grpo_vs_mopd.get_config("smoke")
  c.budget.update(unit=unit, amount=1.0)
  monkeypatch.setattr(ablation, "scores", lambda *args, full: {"math": 0.25 + 0.5 * full})
  p = SimpleNamespace(programs=SimpleNamespace(config=ModelConfig.from_fields(c.model.to_dict())))
  path, spent = tmp_path / "evaluations.jsonl", Spent()
  watch = ablation.watcher(c, p, None, path, last_step=5)
  assert not watch(1, None, spent)
  assert watch(3, None, spent.plus(sampled=1))
  assert ablation.watcher(c, p, None, path, last_step=5)(3, None, spent.plus(sampled=1))  # Again, as after a kill.
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  assert [(x["steps"], x["tokens"], x["score"]) for x in lines] == [(1, 0, 0.25), (3, 1, 0.75)]


@pytest.mark.parametrize("held, count", [(256, 64), (256, 256), (65, 64), (64, 64), (63, 64), (1, 64), (100, 64)])
def test_prompts_are_taken_evenly_over_those_that_a_file_has(held, count):
  rows = ablation.spread(list(range(held)), count)  # A file may have fewer than evaluation.prompts.
  assert len(rows) == min(held, count) == len(set(rows))
  assert held % count or rows == list(range(0, held, held // count))
  assert rows[-1] >= held - 1 - held // count  # The end of the list too.


def test_flops_are_two_a_parameter_that_multiplies_a_token():
  config = ModelConfig.from_fields(grpo_vs_mopd.get_config("smoke").model.to_dict())
  tied = dataclasses.replace(config, tie_word_embeddings=True)
  assert matmul_params(config) == matmul_params(tied)  # The embedding is a lookup, not a product.
  assert matmul_params(config) < count_params(config) - 1024 * 64


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("student", "stf", ["student", "sft"]),
    ("compared.prompts", 64, ["compared.prompts=64", "evaluation.prompts=32"]),
    ("budget.unit", "token", ["budget.unit", "did you mean 'tokens'"]),
    ("budget.amount", 0.001, ["budget.amount=0.001", "at least 1"]),
    ("budget.amount", 1.5, ["budget.amount=1.5", "a whole number of at least 1 and at most 3, the most steps"]),
    ("budget.amount", 1e30, ["budget.amount=1e+30", "at most 3, the most steps of an arm"]),
    ("budget", {"unit": "tokens", "amount": 1e30}, ["budget.amount=1e+30", "the most tokens of an arm"]),
    ("budget", {"unit": "flops", "amount": 1e30}, ["budget.amount=1e+30", "the most flops of an arm"]),
    ("compared.at", (1, 100_000), ["compared.at: has step 100000", "at most 3"]),
    ("compared.full_at", (4,), ["compared.full_at: has step 4", "at most 3"]),
    ("compared.at", (1, 1), ["compared.at=(1, 1)", "has 1 twice"]),
    ("compared.pairs", (("mopd", "mopd"),), ["compared.pairs: compares 'mopd' with itself"]),
    ("compared.ends", (("grpo", "grpo"),), ["compared.ends: compares 'grpo' with itself"]),
    ("compared.ends", (("mopd", "grpo"),) * 2, ["compared.ends", "twice"]),
    ("search.rates", (1e-3, 1e-3), ["search.rates", "twice"]),
    ("search.arms", ("mopdd",), ["search.arms", "did you mean 'mopd'"]),
    ("search.seeds", (1, 100), ["[1]"]),
    ("seeds", (), ["seeds=()"]),
    ("compared.pairs", (("mopd", "gropo"),), ["did you mean 'grpo'"]),
    ("arms.mopd.teachers.math", "teachr", ["arms.mopd.teachers.math", "did you mean 'teacher'"]),
    ("arms.grpo.advantage", "gpro", ["did you mean 'grpo'"]),
    ("arms.grpo.rollout.completions", 1, ["rollout.completions=1", "grpo"]),
    ("arms.mopd.teachers", {}, ["advantage='mopd'", "'math'", "no teacher"]),
    ("arms.mopd.correction", "icepopp", ["did you mean 'icepop'"]),
    ("arms.mopd.distillation", "revers_kl", ["did you mean 'reverse_kl'"]),
    ("teachers_of.math", "tacher", ["did you mean 'teacher'"]),
    ("tasks.math", {"slopy_rate": 0.1}, ["tasks.math", "did you mean 'sloppy_rate'"]),
    ("tasks", {"maths": {}}, ["domain in tasks", "did you mean 'math'"]),
    ("rate_of.mopd_at_grpo_rate", "gropo", ["rate_of.mopd_at_grpo_rate", "did you mean 'grpo'"]),
    ("rate_of.mopd_at_grpo_rate", "grpo_150", ["rate_of.mopd_at_grpo_rate", "without a rate_of"]),
  ],
)
def test_a_comparison_that_cannot_run_is_refused_before_anything_is_written(tmp_path, field, value, words):
  c = grpo_vs_mopd.get_config("smoke")
  *path, last = field.split(".")
  section = c
  for name in path:
    section = section[name]
  section[last] = value
  with pytest.raises(UserError) as error:
    ablation.run(c, tmp_path / "run")
  assert all(word in str(error.value) for word in words), str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize(
  "config", [grpo_vs_mopd, multi_domain, sweep_bounds, sweep_distillation, sweep_lag, sweep_shape, sweep_warmup]
)
def test_every_config_can_run(config, arg):
  ablation.check(config.get_config(arg))


@pytest.mark.parametrize("arg", ["", "v6e:16x16", "smoke"])
def test_the_published_scale_compares_the_arms_of_the_report(arg):
  c = grpo_vs_mopd_30b.get_config(arg)
  ablation.check(c)
  assert c.student == "multi_domain_rl" and c.arms.mopd.teachers.to_dict() == {"math": "sft"}
  if arg != "smoke":
    assert {name: (arm.rollout.prompts, arm.rollout.completions, arm.optimizer.peak_lr) for name, arm in c.arms.items()} == {
      "grpo": (128, 16, 3e-6), "grpo_128x4": (128, 4, 3e-6), "mopd": (128, 4, 2e-6), "mopd_512x1": (512, 1, 2e-6),
    }  # fmt: skip


@pytest.mark.parametrize("arg", ["", "v6e:16x16", "smoke"])
def test_the_published_scale_has_the_three_teachers_of_the_report(arg):
  c = multi_domain_30b.get_config(arg)
  ablation.check(c)
  teachers = c.arms.mopd.teachers.to_dict()
  assert teachers == c.teachers_of.to_dict() and set(teachers) == set(c.domains)
  assert (teachers["math"], teachers["preference"], teachers["stem"]) == ("sft", "rlhf_teacher", "multi_domain_rl")
  assert c.stages.rlhf_teacher.init_from == "sft" and c.student == "multi_domain_rl"
  assert c.arms.grpo.mixture.to_dict() == c.arms.mopd.mixture.to_dict()
  if arg != "smoke":
    assert [c.arms[name].steps for name in ("mopd", "grpo", "rlhf")] == [52, 52, 160]


def test_the_easy_and_the_clean_task_differ_in_their_demonstrations_alone():
  whole = grpo_vs_mopd.get_config().to_dict()
  tasks = whole.pop("tasks")["math"]
  for arg, rate in (("easy", 0.25), ("clean", 0.0)):
    c = grpo_vs_mopd.get_config(arg).to_dict()
    assert c.pop("tasks") == {"math": tasks | {"sloppy_rate": rate}}
    assert c == whole
