"""RL in two processes of two devices is RL in one process of four devices."""

import dataclasses
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import test_episode as scripted
from test_compilations import MICRO, P, T
from two_processes import assert_all_say

from configs.recipe import generated
from configs.tiny import if_rl
from experiments import rl
from nemocascade.data.tokenizer import IM_END
from nemocascade.domains.domain import Domain, one_by_one
from nemocascade.domains.rows import make_prompt
from nemocascade.generated.generator import GeneratedRows, Generator, assistant
from nemocascade.mesh import make_mesh, whole
from nemocascade.model.reward import init_reward_params
from nemocascade.report.metrics import read_lines
from nemocascade.rollout import episode
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.episode import collect
from nemocascade.rollout.samples import Samples
from nemocascade.runtime import hosts, parts
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.judge import load_judge
from nemocascade.runtime.start import save_model_files
from nemocascade.runtime.teachers import Teacher, gather
from nemocascade.store.checkpoint import Store
from nemocascade.types import TrainState
from nemocascade.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("compiled_fast")
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}


class Guess(Generator):
  """A domain whose tools answer some turns, by their text, with results of different lengths. So are its rewards."""

  max_turns = 3

  def __init__(self, name):
    self.name = name

  def make_row(self, rng):
    return make_prompt(self.name, f"add {rng.integers(1000)} and {rng.integers(1000)}", tools=[TOOL])

  def demonstrate(self, row, rng, *, thinking):
    return [assistant("12", thoughts=["one"] if thinking else None)]

  def start(self, row):
    return []

  def act(self, world, turn):
    world.append(number_of((turn.reasoning or "") + turn.content))
    return None if world[-1] % 3 == 0 else ["the sum is 12"] * (world[-1] % 3)

  def judge(self, row, completion):
    return Verdict(
      float(number_of(completion.text) % 2), f"after {len(completion.world)} turns", number_of(completion.text) % 7 == 0
    )

  @classmethod
  def domain(cls, name):
    parts_ = cls(name)
    return Domain(name, GeneratedRows(parts_, name), one_by_one(parts_.judge), parts_, beside=True)


def number_of(text: str) -> int:
  return zlib.crc32(text.encode("utf-8", "replace"))


def build(root, mesh):
  """(config, parts) of a run on this mesh."""
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.model.update(MICRO)
    c.domains, c.tokenizer.conversations = generated("preference"), 20
    c.evaluation.update(prompts=12, batch=16, prompt_tokens=P, total_tokens=T, long_domains=())
    c.steps, c.save_every = 4, 4
    c.rollout.update(prompts=8, completions=4, prompt_tokens=P, total_tokens=T)
    c.packing.update(rows=32, row_tokens=T, pieces=4)
    c.mixture = dict(near=0.5, far=0.5)
    # A large eps makes Adam's first steps nearly equal to gradients, which rounding does not turn around.
    c.optimizer.update(peak_lr=1.0, warmup_steps=0, eps=1.0)
  p = parts.build(c, root, mesh=mesh)
  hosts.exchange(None, "whether all have seen that there is no tokenizer yet")
  p = dataclasses.replace(p, domains={name: Guess.domain(name) for name in ("near", "far")}, text=p.text.write())
  return c, p


def checkpoint(c, p, root, seed):
  path, places = root / f"start_{seed}", jax.tree.map(lambda leaf: leaf.sharding, p.programs.template)
  save_model_files(c, path, p.text.tokenizer)
  params = jax.jit(p.programs.fresh_params, out_shardings=places)(jax.random.key(seed))
  store = Store(path / "checkpoints")
  store.save(1, TrainState(np.int32(0), params, {}), {})
  store.wait()
  return str(path / "checkpoints" / "1")


def results(root: Path, mesh) -> dict[str, np.ndarray]:
  """What a stage with tools, a stage with two teachers, an evaluation and a judge gave, all of it on the host."""
  c, p = build(root, mesh)
  starts, found = [checkpoint(c, p, root, seed) for seed in (1, 2)], {}
  here = lambda tree: jax.device_get(jax.jit(lambda t: t, out_shardings=whole(mesh))(tree))  # noqa: E731

  def see(*args, **how):
    samples = collect(*args, **how)
    found.setdefault(f"{stage}/tokens", here(samples.tokens_QGT))
    return samples

  episode.collect = see
  heldout = draw_heldout(c, p.domains, p.text.tokenizer)
  for stage, fields in (
    ("tools", {"refill_rounds": 3}),
    ("mopd", {"advantage": "mopd", "dynamic_filtering": False, "teachers": dict(near=starts[0], far=starts[1])}),
  ):
    own = c.copy_and_resolve_references()
    with own.unlocked():
      own.update(fields)
    of = [Teacher(domain, name, 0.0, "") for domain, name in own.teachers.items()]
    teachers = gather(p.programs, p.text.tokenizer, of, 1, heldout.rows) if of else None
    outcome = rl.run(own, root / stage, p, starts[0], teachers)
    for path, leaf in jax.tree_util.tree_leaves_with_path(here(outcome.params)):
      found[f"{stage}/params/{jax.tree_util.keystr(path)}"] = leaf
  episode.collect = collect
  scores = heldout.evaluate(p, outcome.params, temperature=1.0, completions=2)
  found["scores"] = np.array([dataclasses.astuple(score)[:8] for score in scores.values()])
  found["judged"] = judged(c, p, root)
  found["shared"] = here(shared(mesh).tokens_QGT)
  return found


def shared(mesh) -> Samples:
  """Episodes with tools in six rows, which four devices do not divide: all devices hold all rows."""
  mesh = make_mesh(data=4, of=mesh.devices.flatten())
  rows, answers = [scripted.COUNTER, scripted.TALK], [scripted.CALLS, scripted.SAYS]
  script_QT = np.full((2, scripted.T), IM_END, np.int32)
  for script_T, row, said in zip(script_QT, rows, answers, strict=True):
    tokens, _ = scripted.conversation(row, said, True)
    script_T[: len(tokens)] = tokens
  engine = Engine(scripted.prefill, scripted.step, prompt_tokens=scripted.P, total_tokens=scripted.T, mesh=mesh)
  samples = collect(
    engine, script_QT, jax.random.key(0), rows, scripted.domains(), tokenizer=scripted.TOKENIZER, G=3, temperature=0.0,
    exchange=hosts.exchange,
  )  # fmt: skip
  mine = [c for group in samples.completions for c in group if c is not None]
  assert len(mine) == (6 if jax.process_index() == 0 else 0) and samples.finished_QG.all()
  return samples


def judged(c, p, root) -> np.ndarray:
  """Rewards of answers by a reward model that all processes ask together: the first about most answers, the last
  about none."""
  template = p.programs.reward_template
  make = jax.jit(
    lambda key: init_reward_params(p.programs.config, key), out_shardings=jax.tree.map(lambda a: a.sharding, template)
  )
  params = make(jax.random.key(5)) | {"reward_head": make(jax.random.key(6))["backbone"]["embedding"][7]}
  save_model_files(c, root / "judge", p.text.tokenizer)
  store = Store(root / "judge" / "checkpoints")
  store.save(1, TrainState(np.int32(0), params, {}), {})
  store.wait()
  judge = load_judge(str(root / "judge" / "checkpoints" / "1"), p.programs, p.text.tokenizer, c.evaluation)
  answers = [f"add {i}" for i in range(40)]
  own = answers if jax.process_count() == 1 else answers[:30] if jax.process_index() == 0 else answers[30:]
  prompt = [{"role": "user", "content": "add"}]
  said = judge.scores([prompt] * len(own), own).tolist()
  return np.array([score for part in hosts.exchange(said, "scores") for score in part])


PROCESS = """
import pathlib
import numpy
import test_processes as t
from nemocascade.mesh import make_mesh
root = pathlib.Path(*arguments)
found = t.results(root, make_mesh(2, 2))
numpy.savez(root / f"found_{index}.npz", **found)
print("done")
"""


def test_two_processes_sample_and_learn_what_one_does(tmp_path):
  assert_all_say("done", PROCESS, str(tmp_path / "two"), devices=2)
  one = results(tmp_path / "one", make_mesh(2, 2, of=jax.devices()[:4]))
  assert len({tuple(row) for row in one["tools/tokens"].reshape(-1, T)}) > 16
  for index in range(2):
    with np.load(tmp_path / "two" / f"found_{index}.npz") as two:
      assert set(two) == set(one)
      for name, expected in one.items():
        if "params" in name:
          np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        elif name == "judged":
          np.testing.assert_allclose(two[name], expected, rtol=1e-4, atol=1e-5)
        else:
          np.testing.assert_array_equal(two[name], expected, err_msg=name)
  for stage in ("tools", "mopd"):
    first, other = (read_lines(tmp_path / name / stage / "metrics.jsonl")[0] for name in ("one", "two"))
    assert other["exchange/bytes"] > 0
    first, other = (
      {name: x for name, x in line.items() if not name.startswith(("exchange/", "time/", "speed/"))}
      for line in (first, other)
    )
    assert set(other) == set(first)
    for name, value in first.items():
      assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    lines = [read_lines(tmp_path / name / stage / "samples.jsonl") for name in ("one", "two")]
    assert json.dumps(lines[0][:4]) == json.dumps(lines[1][:4])
