"""RL on a user's own prompts, reward and environment: one config file and one command."""

import json

import pytest
import tiny_checkpoint
from in_process import run_command
from refusals import assert_refused

pytestmark = pytest.mark.usefixtures("compiled_fast")

CONFIG = """
from configs.tiny import if_rl
from ml_collections import ConfigDict

def get_config(arg=""):
  c = if_rl.get_config("smoke")
  c.domains = ConfigDict(dict(mine=dict(
    rows="prompts.jsonl", heldout="heldout.jsonl", verify="my_rewards.py:score", environment="my_env.py:Counter",
  )))
  c.mixture = dict(mine=1.0)
  c.evaluation.long_domains = ()
  c.dynamic_filtering, c.overlong = False, "keep"
  return c
"""
REWARD = """
def score(row, completion):
  assert completion.world == {"start": row["start"], "calls": 0} or completion.world["calls"] > 0
  return sum(letter in "aeiou" for letter in completion.text) / max(len(completion.text), 1)
"""
ENVIRONMENT = """
class Counter:
  max_turns = 2
  def start(self, row):
    return {"start": row["start"], "calls": 0}
  def act(self, world, turn):
    world["calls"] += len(turn.tool_calls)
    return [str(world["calls"])] * len(turn.tool_calls) or None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mine")
  files = {"my_config.py": CONFIG, "my_rewards.py": REWARD, "my_env.py": ENVIRONMENT}
  rows = {"prompts.jsonl": range(20), "heldout.jsonl": range(100, 108)}
  files |= {
    name: "".join(json.dumps({"prompt": f"the cat and {i}", "start": i}) + "\n" for i in numbers)
    for name, numbers in rows.items()
  }
  for name, text in files.items():
    (folder / name).write_text(text)
  tiny_checkpoint.make(folder / "start")
  return folder


def command(folder, workdir, *flags):
  start = "--config.init_from=start/checkpoints/1"
  return run_command("rl", "--config=my_config.py", f"--workdir={workdir}", start, *flags, cwd=folder)


def test_one_command_trains_on_files_with_an_own_reward_and_environment(folder):
  done = command(folder, "run", "--config.steps=2")
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in (folder / "run/rl/metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(line["reward/mean"] > 0 and line["rollout/masked"] == 0 for line in lines)
  record = json.loads((folder / "run/rl/samples.jsonl").read_text().splitlines()[0])
  assert record["domain"] == "mine" and record["prompt"].startswith("the cat and ")
  again = command(folder, "run", "--config.steps=2")  # Continues from the checkpoint, which names the files' state.
  assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--config.domains.mine.rows=none-*.jsonl", ["domains.mine.rows='none-*.jsonl'", "no such file"]),
    ("--config.domains.mine.heldout=prompts.jsonl", ["domains.mine.heldout", "20 of its 20 prompts", "line 1"]),
    ("--config.domains.mine.verify=my_rewards.py:scores", ["domains.mine.verify", "did you mean 'score'"]),
    ("--config.domains.mine.verify=prompts.jsonl:score", ["domains.mine.verify", "FILE.py:NAME"]),
    ("--config.domains.mine.environment=my_env.py:Count", ["domains.mine.environment", "did you mean 'Counter'"]),
    ("--config.domains.mine.max_turns=0", ["domains.mine.max_turns=0", "at least 1"]),
    ("--config.domains.mine.min_pass_rate=0.1", ["prompts.jsonl, line 1", "pass_rate is missing"]),
  ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(folder, flag, words):
  done = command(folder, "refused", flag)
  assert_refused(done, words[0])
  assert all(word in done.stderr for word in words), done.stderr
  assert not (folder / "refused").exists()
