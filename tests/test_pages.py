"""The report of a cascade: what it says, that it is self-contained, legible and safe, and what it calls the end."""

import json
import re
import time
import types

import jax
import pytest

from configs.tiny import cascade as config
from nemocascade.report import answers, markup, pages, scores, summary
from nemocascade.report.run import Run
from nemocascade.runtime.workdir import begun

PROMPTS = 64
INJECTED = "<script>alert(1)</script>"


def entry(workdir, name, kind, start, domains, shares):
  """A finished stage; `shares` is the share of solved prompts of each domain."""
  prompts = {d: " ".join(str(int(i < share * PROMPTS)) for i in range(PROMPTS)) for d, share in shares.items()}
  return {
    "name": name, "kind": kind, "status": "done", "start": start, "domains": domains, "wall_s": 60.0, "train_s": 50.0,
    "eval_s_after": 5.0, "steps": 3, "tokens": 1000, "compilations": 1, "checkpoint": f"{workdir}/{name}/checkpoints/3",
    "scores_after": shares, "scores_intervals_after": {d: [max(0, x - 0.1), min(1, x + 0.1)] for d, x in shares.items()},
    "n_eval": dict.fromkeys(shares, PROMPTS), "prompt_scores_after": prompts,
    "probe": {"tokens": [[1, 2]], "logprobs": [[0.0, -1.0]], "entropy": 1.0},
  }  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
  """A run of SFT, IF-RL, a side line that is the best of all, and MOPD, which loses mathematics."""
  c = config.get_config()
  domains = {"instruction": 0.25, "math": 0.5}
  c.order, c.side_line = ("sft", "if_rl", "rlhf_teacher", "mopd"), ("rlhf_teacher",)
  sft = entry(tmp_path, "sft", "sft", "", [], domains)
  if_rl = entry(tmp_path, "if_rl", "rl", sft["checkpoint"], ["instruction"], {"instruction": 0.75, "math": 0.5})
  side = entry(tmp_path, "rlhf_teacher", "rl", sft["checkpoint"], ["math"], {"instruction": 1.0, "math": 1.0})
  mopd = entry(tmp_path, "mopd", "rl", if_rl["checkpoint"], ["instruction"], {"instruction": 1.0, "math": 0.125})
  mopd["teachers"] = {"instruction": {"checkpoint": side["checkpoint"], "score": 1.0, "stage": "rlhf_teacher"}}
  stages = [sft, if_rl, side, mopd]
  made = {s["checkpoint"]: s for s in stages}
  for stage in stages:
    if stage["start"]:
      stage["scores_before"] = made[stage["start"]]["scores_after"]
    folder = tmp_path / stage["name"]
    folder.mkdir()
    lines = [{"step": i, "loss/sft": 2.0 - i, "rollout/verdict": 0.3 * i, "policy/entropy": None} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"step": 3, "domain": "instruction", "prompt": "Write.", "completion": f"{stage['name']} {INJECTED}",
            "verdict": 1.0, "reason": INJECTED, "masked": False}  # fmt: skip
    (folder / "answers.jsonl").write_text(json.dumps(said) + "\n")
  (tmp_path / "cascade.json").write_text(json.dumps({"stages": stages, "teachers": {}}))
  command = "python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=x"
  fields = json.loads(c.to_json_best_effort())
  begun = {"command": command, "date": "now", "machine": "a machine"}
  (tmp_path / "config.json").write_text(json.dumps({"config": fields, "versions": {}, "begun": begun}))
  return tmp_path


def text_of(html):
  return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_the_five_questions_are_answered_on_top(workdir):
  page = text_of(pages.write(workdir, live=True).read_text())
  assert page.index("What did it cost?") < page.index("Contents")
  assert "287 thousand parameters" in page and "33,000 conversations" in page
  assert "if rl : 25% → 75% on its own domains (+50 points" in page
  assert "mopd : math 50% → 12%" in page
  assert "4 min 0 s on a machine" in page


def test_a_change_is_the_difference_of_the_percents_that_stand_beside_it(workdir):
  record = json.loads((workdir / "cascade.json").read_text())
  record["stages"][0]["scores_after"]["math"], record["stages"][-1]["scores_after"]["math"] = 0.254, 0.256
  record["stages"][-1]["scores_before"] = record["stages"][0]["scores_after"]
  (workdir / "cascade.json").write_text(json.dumps(record))
  html = pages.write(workdir, live=True).read_text()
  assert re.search(r"math 25 \[[\d, ]+\] 26 \[[\d, ]+\] \+1 ", text_of(html)), text_of(html)
  assert re.search(r">26<small>\+1</small>", html)


def test_a_side_line_is_never_the_end(workdir):
  run = Run.open(workdir)
  assert [s["name"] for s in run.main] == ["sft", "if_rl", "mopd"] and [s["name"] for s in run.side] == ["rlhf_teacher"]
  assert "From sft to mopd, the mean of all domains went from 38% to 56%" in text_of(summary.worked(run))
  # A stage that a gate went back from is one too.
  record = json.loads((workdir / "cascade.json").read_text())
  record["stages"][-1] |= {"decision": "back"}
  (workdir / "cascade.json").write_text(json.dumps(record))
  assert Run.open(workdir).main[-1]["name"] == "if_rl"


def test_the_page_is_self_contained_and_shows_no_html_of_a_model(workdir):
  html = pages.write(workdir, live=True).read_text()
  assert INJECTED not in html and markup.text(INJECTED) in html
  assert not re.search(r"(src|href)='?(https?:|//)", html) and "<img" not in html
  pictures = re.findall("<svg[^>]*>", html)
  assert pictures and all("role=img" in p and re.search("aria-label='.+'", p) for p in pictures)
  for name in re.findall("href='([^'#]+)'", html):
    assert (workdir / "report" / name).resolve().is_file(), name


def test_commands_are_copied_from_the_page_as_they_are_typed(workdir):
  html = pages.write(workdir, live=True).read_text()
  found = re.findall(r"<(?:code|pre) class=command>(.*?)</(?:code|pre)>", html)
  typed = [re.sub("<[^>]*>", "", of) for of in found]  # The browser copies this text: the layout adds no space.
  assert typed[0] == "python -m experiments.cascade --config=configs/tiny/cascade.py --workdir=x"
  assert [line.split(" --")[0] for line in typed[1:]] == [
    "python -m experiments.chat",
    "python -m experiments.generate",
  ]


def test_the_machine_names_its_devices_where_they_are_not_its_cores(monkeypatch):
  device = lambda platform, kind: types.SimpleNamespace(platform=platform, device_kind=kind)
  for devices, said in (
    ([device("cpu", "cpu")], "cores, Linux"), ([device("cpu", "cpu")] * 4, "cores, 4 x cpu, Linux"),
    ([device("tpu", "TPU v5p")], "cores, 1 x TPU v5p, Linux"),
  ):  # fmt: skip
    monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
    assert said in begun()["machine"]


def test_every_kind_of_stage_is_explained_in_words_that_are_not_its_name(workdir):
  run = Run.open(workdir)
  stage = run.stages[0] | {"kind": "reward_model", "name": "reward_model", "domains": []}
  assert summary.what(run, stage).startswith("the judge of preferences, trained on pairs of answers")


def test_one_teacher_is_one_and_several_are_several(workdir):
  run = Run.open(workdir)
  (stage,) = [s for s in run.stages if s["name"] == "mopd"]
  one = stage | {"teachers": {"math": {"stage": "sft"}, "instruction": {"stage": "sft"}}}
  two = stage | {"teachers": {"math": {"stage": "sft"}, "instruction": {"stage": "if_rl"}}}
  assert "distillation (mopd) with sft as its teacher," in summary.what(run, one)
  assert "distillation (mopd) with if rl, sft as its teachers," in summary.what(run, two)


def test_the_same_prompt_is_shown_before_and_after_a_stage(workdir):
  page = text_of(pages.write(workdir, live=True).read_text())
  assert re.search("before, sft: ✓ right .{,80}sft &lt;script.{,80} after, if rl: ✓ right .{,80}if_rl", page)


def test_a_run_of_many_stages_unfolds_the_answers_of_the_last_one(workdir, monkeypatch):
  folds = lambda: re.findall(r"<details( open)?><summary><b>([^<]*)", pages.write(workdir, live=True).read_text())
  assert len(folds()) == 3 and all(unfolded for unfolded, _ in folds())
  monkeypatch.setattr(answers, "OPEN", 3)
  assert folds()[-1] == (" open", "mopd") and not any(unfolded for unfolded, _ in folds()[:-1])


def test_the_page_begins_with_what_the_run_is_meant_to_show(workdir):
  page = text_of(pages.write(workdir, live=True).read_text())
  assert page.index("The stages of the Nemotron-Cascade 2 recipe at a scale of minutes.") < page.index("In short")
  path = workdir / "config.json"
  made = json.loads(path.read_text())
  del made["config"]["about"]
  path.write_text(json.dumps(made))
  assert "at a scale of minutes" not in pages.write(workdir, live=True).read_text()


def test_a_page_of_a_running_cascade_reloads_and_the_last_one_does_not(workdir):
  assert "http-equiv=refresh" in pages.write(workdir, live=True).read_text()
  assert not (workdir / "report" / "scores.png").exists()
  assert "http-equiv=refresh" not in pages.write(workdir).read_text()
  assert (workdir / "report" / "scores.png").stat().st_size > 5000


def test_the_page_is_there_as_soon_as_the_run_begins(workdir):
  page = workdir / "report" / "index.html"
  with pages.live(workdir):
    until = time.monotonic() + 10  # Less than the time between two states of the page.
    while not page.exists() and time.monotonic() < until:
      time.sleep(0.01)
    assert "http-equiv=refresh" in page.read_text()


def test_a_smoke_run_says_that_its_scores_mean_nothing(workdir):
  assert "A test of plumbing" not in pages.write(workdir, live=True).read_text()
  path = workdir / "config.json"
  path.write_text(path.read_text().replace("cascade.py --workdir", "cascade.py:smoke --workdir"))
  page = text_of(pages.write(workdir, live=True).read_text())
  assert "A test of plumbing" in page and "This run can't tell" in page and "raised the score" not in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
  assert "A cascade that begins" in pages.write(tmp_path, live=True).read_text()


def test_texts_have_the_contrast_that_the_guidelines_ask_for():
  for score in range(101):
    back, ink = re.fullmatch(r"background:rgb\((.*)\);color:#(...)", scores.colours(score / 100)).groups()
    assert scores.contrast([int(x) for x in back.split(",")], [int(c * 2, 16) for c in ink]) >= 4.5
  for colour in re.findall(r"[{;]color:#([0-9a-f]{6})", markup.STYLE):
    rgb = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
    assert scores.contrast(rgb, (244, 246, 248)) >= 4.5, colour
