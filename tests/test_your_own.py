"""The files of docs/your_own.md are complete: its commands accept them, and what they define does what the page says.

tests/test_tutorials.py trains on own conversations, and on own prompts with an own reward.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_docs import PAGES, ROOT, assert_accepted, commands

from experiments import ablation, rl, sft
from nemocascade import advantage, own_code
from nemocascade.data.chat_parse import Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.runtime import config_file, domains
from nemocascade.types import Rollout
from nemocascade.verifiers.verdict import Completion

PAGE = ROOT / "docs" / "your_own.md"
FILES = dict(re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with the page's files, and the clone's commands and configs; it is the working directory."""
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  for name in ("configs", "experiments"):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def completion(text: str, world: object = None) -> Completion:
  return Completion((Turn(None, text, (), None, True),), world)


def test_the_page_has_files_of_every_kind():
  assert {"chats.jsonl", "prompts.jsonl", "my_rewards.py", "my_shop.py", "my_advantages.py", "my_model.py"} <= set(
    FILES
  )
  assert PAGE in PAGES and len(commands(PAGE)) >= 6


def test_every_command_accepts_the_files(folder, monkeypatch, capsys):
  for line in commands(PAGE):
    assert_accepted(line, monkeypatch, capsys)


@pytest.mark.parametrize("check, file", [(sft.check, "my_sft.py"), (rl.check, "my_rl.py"), (sft.check, "my_model.py")])
def test_the_configs_pass_all_checks(folder, check, file):
  for argument in ("", ":smoke"):
    check(config_file.load(file + argument))


def test_the_reward_is_what_the_page_says(folder):
  c = config_file.load("my_rl.py:smoke")
  with c.unlocked():
    c.domains = dict(capitals=dict(rows="prompts.jsonl", verify="my_rewards.py:score"))
  domain = domains.build(c)["capitals"]
  row = next(row for row in (domain.rows.train(0, i) for i in range(9)) if row["capital"] == "Paris")
  answers = [completion(text) for text in ("It is Paris.", "Rome", "")]
  rewards = [verdict.reward for verdict in domain.verify([row] * 3, answers)]
  np.testing.assert_allclose(rewards, [0.97, -0.01, 0.0], atol=1e-9)


def test_the_shop_answers_calls_and_is_rewarded(folder):
  domain = domains.build(config_file.load("my_rl.py:smoke"))["shop"]
  assert domain.turns == 3
  row = domain.rows.train(0, 0)
  world = domain.start(row)
  call = ToolCall("stock", {"item": row["item"]})
  assert domain.act(world, Turn(None, "", (call,), None, True)) == [str(row["left"][row["item"]])]
  assert domain.act(world, Turn(None, "done", (), None, True)) is None
  right = completion(f"There are {row['left'][row['item']]} left", world)
  unasked = completion("There are 99 left", domain.start(row))
  assert [verdict.reward for verdict in domain.verify([row, row], [right, unasked])] == [1.0, 0.0]


def test_the_advantage_is_that_of_dr_grpo(folder):
  c = config_file.load("my_ablation.py:smoke")
  ablation.check(c)
  centred = own_code.load(c.arms.centred.advantage, field="advantage")
  valid_QG = np.array([[True, True, True], [True, False, True]])
  T = jnp.zeros((2, 3, 4))
  rollout = Rollout(
    tokens_QGT=T, segment_ids_QGT=T, loss_mask_QGT=T, behaviour_logprobs_QGT=T,
    rewards_QG=jnp.array([[1.0, 0.0, 0.5], [1.0, 7.0, 0.0]]), valid_QG=jnp.array(valid_QG),
  )  # fmt: skip
  np.testing.assert_allclose(centred(rollout), advantage.dr_grpo(rollout), atol=1e-6)
  np.testing.assert_allclose(centred(rollout, scale=2.0), 2 * np.asarray(centred(rollout)), atol=1e-6)


def test_the_model_has_the_shape_of_its_config(folder):
  c = config_file.load("my_model.py:smoke")
  assert c.model.hybrid_override_pattern == "MEM*E-" and c.model.hidden_size == 96
