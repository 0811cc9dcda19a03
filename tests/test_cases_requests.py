"""Each field is declared once; a bad request gets one line of error and writes nothing."""

import ast
import dataclasses
import importlib
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.recipe import conversations, generated
from configs.tiny import cascade as cascade_config
from configs.tiny import if_rl, rlhf  # fmt: skip
from configs.tiny import reward_model as reward_model_config
from configs.tiny import sft as sft_config
from experiments import cascade, reward_model, rl, sft
from nemocascade import field_check, fields
from nemocascade.config import SET_BY_PROGRAMS, ModelConfig
from nemocascade.errors import UserError
from nemocascade.field_table import BALANCE, MODEL, RL, STAGE, WHOLE
from nemocascade.runtime import config_file, launch, objective
from nemocascade.step.balance import RouterBalance
from nemocascade.step.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("compiled_fast")

ROOT = Path(__file__).parent.parent
ARGUMENTS = {"tiny": ("", "smoke"), "nano_30b": ("", "smoke", "v6e:16x16")}
FILES = [
  (path, argument)
  for scale, arguments in ARGUMENTS.items()
  for path in sorted((ROOT / "configs" / scale).glob("*.py"))
  if "def get_config" in path.read_text() and path.stem not in ("base", "model")
  for argument in arguments
]


@pytest.mark.parametrize("path, argument", FILES, ids=[f"{p.parent.name}/{p.stem}:{a}" for p, a in FILES])
def test_every_field_of_every_config_is_in_the_table_and_within_it(path, argument):
  c = config_file.load(f"{path.relative_to(ROOT)}:{argument}")
  field_check.check(c)
  assert {name for name, *_ in field_check.described(c)} >= {"model.hidden_size", "sandbox.workers"}
  with c.unlocked():
    c.model.hiden_size = 64
  with pytest.raises(UserError, match="model.hiden_size: no such field: did you mean 'hidden_size'"):
    field_check.check(c)


@pytest.mark.parametrize("name", SET_BY_PROGRAMS)
def test_what_programs_set_for_themselves_is_no_field_of_a_config(name):
  c = config_file.load("configs/tiny/if_rl.py:smoke")
  with c.unlocked():
    c.model[name] = True
  with pytest.raises(UserError, match=f"model.{name}: no such field"):
    field_check.check(c)


def test_a_function_takes_the_fields_of_its_section_and_no_others():
  names = lambda part, table: {name.removeprefix(f"{part}.") for name in table if name.startswith(f"{part}.")}
  assert names("model", MODEL) == {field.name for field in dataclasses.fields(ModelConfig)} - {*SET_BY_PROGRAMS}
  assert names("optimizer", STAGE) | {"total_steps"} == set(inspect.signature(make_optimizer).parameters)
  assert names("router_balance", BALANCE) == {field.name for field in dataclasses.fields(RouterBalance)}


def test_optional_fields_of_a_model_are_those_with_a_default():
  without = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
  assert without == {name.removeprefix("model.") for name, field in MODEL.items() if not field.optional}


def test_choices_are_the_keys_of_the_dicts_that_hold_the_functions():
  named = {
    f"{kind}:{name}": field
    for kind, table in WHOLE.items()
    for name, field in table.items()
    if isinstance(field.choices, str)
  }
  for field in named.values():
    module, name = field.choices.split(":")
    assert field.words() == tuple(getattr(importlib.import_module(module), name)) != ()
  assert {name.removeprefix("rl:") for name in named} >= set(objective.SLOTS)
  for slot, functions in objective.SLOTS.items():
    assert RL[slot].words() == tuple(functions)


def test_every_setting_of_a_function_has_a_range():
  for functions in objective.SLOTS.values():
    for function in functions.values():
      for setting in objective.settings_of(function):
        assert f"options.*.{setting}" in RL, setting


def test_a_name_is_a_field_once():
  for node in ast.walk(ast.parse((ROOT / "nemocascade" / "field_table.py").read_text())):
    if isinstance(node, ast.Dict):
      keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
      assert len(keys) == len(set(keys))


def test_the_reference_page_is_that_of_the_table():
  page = (ROOT / "docs" / "fields.md").read_text()
  assert page == field_check.markdown() + "\n", "python -m nemocascade.field_check > docs/fields.md"


VALUES = [  # (config, field, invalid value, start of the error message).
  (if_rl, "optimizer.peak_lr", math.nan, "optimizer.peak_lr=nan: is not a number; must be a finite number above 0"),
  (if_rl, "rollout.temperature", math.inf, "rollout.temperature=inf"),
  (if_rl, "rollout.temperature", 1e-30, "rollout.temperature=1e-30: must be a number of at least 0.01 and at most 100"),
  (if_rl, "steps", True, "steps=True: must be a whole number of at least 1"),
  (if_rl, "steps", 2.0, "steps=2.0"),
  (if_rl, "steps", "3", "steps='3'"),
  (if_rl, "optimizer.b1", 2.0, "optimizer.b1=2.0: must be a number of at least 0 and below 1"),
  (if_rl, "dynamic_filtering", 1, "dynamic_filtering=1: must be True or False"),
  (if_rl, "mixture", {}, "mixture={}"),
  (if_rl, "domains", "math", "domains='math': must be a section with fields"),
  (if_rl, "domains", {"math": "math"}, "domains.math='math': must be a section with fields: environment, heldout"),
  (if_rl, "domains", {"math": {"row": "x"}}, "domains.math.row: no such field: did you mean 'rows'"),
  (if_rl, "rollout", 3, "rollout=3: must be a section with fields"),
  (if_rl, "options.icepop.low", math.nan, "options.icepop.low=nan"),
  (if_rl, "options.icepop.margin", "wide", "options.icepop.margin='wide'"),
  (if_rl, "packing.piece", 3, "packing.piece: no such field: did you mean 'pieces'"),
  (cascade_config, "stages.mopd.save_every", 0, "stages.mopd.save_every=0"),
  (cascade_config, "stages.mopd", 3, "stages.mopd=3"),
  (cascade_config, "stages.mopd.kind", "sftt", "unknown stages.mopd.kind 'sftt': did you mean 'sft'"),
  (cascade_config, "stages.sft.mixture", {"math": 1.0}, "stages.sft.mixture: no such field"),
]


@pytest.mark.parametrize("config, name, value, said", VALUES, ids=[f"{name}={value}" for _, name, value, _ in VALUES])
def test_a_value_that_no_command_line_gives_is_refused_too(config, name, value, said):
  c = config.get_config("smoke")
  *path, last = name.split(".")
  section = c
  for part in path:
    section = section[part]
  with section.ignore_type():
    section[last] = ConfigDict(value) if isinstance(value, dict) else value
  with pytest.raises(UserError) as error:
    field_check.check(c)
  assert str(error.value).startswith(said)


def test_what_a_change_spells_is_what_the_config_then_holds():
  c = config_file.load("configs/tiny/cascade.py:smoke")
  changes = {
    "seed": ("7", 7), "stages.mopd.optimizer.peak_lr": ("1e-4", 1e-4), "stages.mopd.steps": ("9", 9),
    "stages.mopd.packing.shared_prompts": ("false", False), "stages.mopd.options.tis.high": ("3", 3.0),
    "stages.mopd.teachers.stem": ("sft", "sft"), "model.chunk_size": ("8", 8), "model.moe_latent_size": ("None", None),
    "evaluation.greedy": ("('sft',)", ("sft",)), "tasks.math.terms": ("(3, 5)", (3, 5)), "tokenizer.path": ("", ""),
    "stages.if_rl.mixture": ("{'math': 1}", {"math": 1}),
  }  # fmt: skip
  config_file.change(c, [(name, said) for name, (said, _) in changes.items()])
  field_check.check(c)
  for name, (_, value) in changes.items():
    held = c
    for part in name.split("."):
      held = held[part]
    held = held.to_dict() if isinstance(held, ConfigDict) else held
    assert held == value and type(held) is type(value), name


def test_a_command_line_is_split_as_it_is_written():
  split = config_file.split
  assert split(["--config=a.py:x", "--workdir=w", "--config.b.c=1=2"]) == ("a.py:x", [("b.c", "1=2")], ["--workdir=w"])
  assert split(["--config", "a.py", "-config.b", "1", "--configs=3"]) == ("a.py", [("b", "1")], ["--configs=3"])


def test_requests_is_the_library_here():
  import requests

  assert callable(requests.Session) and Path(requests.__file__).parent != Path(__file__).parent


def test_bad_requests_are_one_line_each():
  """Runs every eighth request; `python tests/requests.py` runs them all."""
  done = subprocess.run(
    [sys.executable, "tests/requests.py", "--short"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  said = done.stdout.splitlines()[-1]
  assert int(said.split()[0]) > 80 and ", 0 missed" in said


def test_help_lists_the_fields_of_the_config():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.rl", "--config=configs/tiny/if_rl.py", "--config.steps=7", "--help"],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert "  steps = 7\n      Steps of the stage. A whole number of at least 1." in done.stdout
  assert "  rollout.top_p = 1.0\n" in done.stdout and "One of none, grpo, " in done.stdout


@pytest.mark.parametrize("read, code, said", [(True, 0, ""), (False, 141, "")])
def test_a_command_whose_output_nobody_reads_ends_without_a_word(read, code, said):
  source, sink = os.pipe()
  if not read:
    os.close(source)
  program = "from nemocascade.runtime import launch; launch.launch(lambda: print('x'), config=False, workdir=False)"
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, stdout=sink, stderr=subprocess.PIPE, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (code, said)


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
  def broken():
    raise BrokenPipeError("a sandbox has ended")

  monkeypatch.setattr(sys, "argv", ["command"])
  with pytest.raises(SystemExit) as ended:
    launch.launch(broken, config=False, workdir=False)
  assert ended.value.code == 1 and "error: a sandbox has ended" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "reward_model"])
def test_help_leaves_out_what_a_stage_does_not_read(command, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [command, f"--config={ROOT}/configs/tiny/{command}.py", "--help"])
  with pytest.raises(SystemExit):
    launch.launch(lambda *_: None, several=True)
  said = capsys.readouterr().out
  assert "  row_tokens = " in said and "  tokenizer.path = " in said
  assert not any(line.startswith(("  domains.", "  evaluation.", "  sandbox.")) for line in said.splitlines())
  assert said.splitlines()[-1].startswith("Not listed: domains, evaluation, sandbox.")


@pytest.mark.parametrize("several", [True, False])
def test_help_lists_the_flags_of_several_processes_only_where_they_are_taken(several, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["command", "--help"])
  with pytest.raises(SystemExit):
    launch.launch(lambda *_: None, several=several)
  said = capsys.readouterr().out
  assert all((f"  --{name} " in said) == several for name in ("distributed", "connect_s", "wait_s", "check_hosts"))
  assert "  --grace_s " in said


def test_a_command_of_one_process_refuses_to_meet_others(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["command", "--distributed=127.0.0.1:9999,2,0"])
  with pytest.raises(SystemExit) as ended:
    launch.launch(lambda *_: None)
  assert ended.value.code == 2
  assert "must be left out: this command runs in one process" in capsys.readouterr().err


def test_a_domain_without_a_prompt_that_fits_is_refused_before_anything_is_written(tmp_path):
  c = cascade_config.get_config("smoke")
  c.stages.if_rl.rollout.prompt_tokens = 2
  with pytest.raises(UserError, match=r"stages.if_rl: rollout.prompt_tokens=2: the prompts of domain 'instruction'"):
    cascade.run(c, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def small(config) -> ConfigDict:
  """Config of a stage of one step on the preference domain only."""
  c = config.get_config("smoke")
  c.domains, c.evaluation.long_domains = generated("preference"), ()
  c.steps = c.save_every = 1
  return c


def test_rlhf_runs_alone_with_the_judge_that_its_config_names(tmp_path):
  c = small(sft_config)
  c.sources, c.rows = conversations(preference=60), 4
  sft.main(c, tmp_path / "sft")
  start = str(tmp_path / "sft" / "sft" / "checkpoints" / "1")
  c = small(reward_model_config)
  c.pairs = c.heldout_pairs = 8
  bad = c.copy_and_resolve_references()
  bad.optimizer.frozen = ("no such parameter",)
  with pytest.raises(UserError, match="optimizer.frozen: no parameter matches"):
    reward_model.main(bad, tmp_path / "judge")
  assert not (tmp_path / "judge").exists()
  reward_model.main(c, tmp_path / "judge")  # The corrected config, in the same work directory.
  judge = str(tmp_path / "judge" / "reward_model" / "checkpoints" / "1")

  c = small(rlhf)
  c.init_from = start
  with pytest.raises(UserError, match="judge='' under reward='pairwise': give --config.judge=CKPT"):
    rl.main(c, tmp_path / "rlhf")
  for field, value, said in (
    ("judge", start, "of another model"), ("init_from", judge, "of another model"), ("judge", str(tmp_path), "judge='"),
  ):  # fmt: skip
    other = c.copy_and_resolve_references()
    other.judge = judge
    other[field] = value
    with pytest.raises(UserError, match=said):
      rl.main(other, tmp_path / "rlhf")
  assert not (tmp_path / "rlhf").exists()
  c.judge = judge
  rl.main(c, tmp_path / "rlhf")
  assert (tmp_path / "rlhf" / "rl" / "checkpoints" / "1" / "params").is_dir()


@pytest.mark.parametrize("value", [1e39, -1e39, 1e300, 10**400, 10**5000, 1e-39, 5e-324], ids=lambda value: "")
def test_a_number_that_float32_does_not_hold_is_refused(value):
  for field in (fields.number("a number"), fields.number("at least", low=0, infinite=True)):
    with pytest.raises(UserError, match=r"3.40282e\+38|1.17549e-38") as error:
      field.check("x", value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [0, 0.0, -1.5, 3.4e38, 1.2e-38])
def test_a_number_that_float32_holds_is_allowed(value):
  fields.number("a number").check("x", value)


@pytest.mark.parametrize("field", ["tasks.math.terms", "tasks.long_context.teaching_documents"])
def test_the_ends_of_a_range_are_in_order(field):
  WHOLE["sft"][field].check(field, (2, 2))
  with pytest.raises(UserError, match=rf"{field}=\(9, 2\): must be .* in rising order"):
    WHOLE["sft"][field].check(field, (9, 2))


@pytest.mark.parametrize("name", ["'a.b'", "5", "('a',)"])
def test_a_section_that_the_command_line_gives_has_names_of_texts_without_dots(name):
  c = config_file.load("configs/tiny/sft.py:smoke")
  with pytest.raises(UserError, match="sources.*: names must be texts without dots|is a name, must be a printable"):
    config_file.change(c, [("sources", f"{{{name}: {{'path': 'generated:math'}}}}")])
    field_check.check(c)


@pytest.mark.parametrize("name", ["\ud800", "a\n", "\0"])
def test_a_name_of_the_configs_choice_is_printable(name):
  c = config_file.load("configs/tiny/sft.py:smoke")
  with c.unlocked():
    c.sources[name] = ConfigDict({"path": "generated:math"})
  with pytest.raises(UserError, match="is a name, must be a printable text"):
    field_check.check(c)


@pytest.mark.parametrize("name", ["", "a/b", "/tmp/x"])
def test_a_stage_is_no_path_out_of_the_work_directory(name):
  c = config_file.load("configs/tiny/cascade.py:smoke")
  with c.unlocked():
    c.stages[name] = c.stages.sft
  with pytest.raises(UserError, match="names a folder, must be"):
    field_check.check(c)
