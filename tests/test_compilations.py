"""All programs are compiled in the first step of a stage; nothing compiles later, on one device or on eight."""

import contextlib
import dataclasses
import zlib

import jax
import numpy as np
import pytest

from configs import recipe
from configs.recipe import generated
from configs.tiny import if_rl, reward_model, sft
from experiments import reward_model as reward_stage
from experiments import rl as rl_stage
from experiments import sft as sft_stage
from nemocascade.domains.domain import Domain, one_by_one
from nemocascade.domains.rows import make_prompt
from nemocascade.generated.generator import GeneratedRows, Generator, assistant
from nemocascade.report.metrics import CompileCounter
from nemocascade.rollout import episode
from nemocascade.rollout.engine import Engine
from nemocascade.runtime import conversations, parts
from nemocascade.runtime.heldout import draw_heldout
from nemocascade.runtime.start import save_model_files
from nemocascade.runtime.teachers import Teacher, gather
from nemocascade.store.checkpoint import Store
from nemocascade.types import TrainState
from nemocascade.verifiers.verdict import Verdict

pytestmark = pytest.mark.usefixtures("compiled_fast")
P, T = 200, 264
GRIDS = [(1, 1), (2, 4)]
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
MICRO = dict(
  hidden_size=16, hybrid_override_pattern="M*E", head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8,
  n_routed_experts=8, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, initializer_range=0.3,
)  # fmt: skip


class Adding(Generator):
  """Generator, environment and judge of a domain whose rewards of 0 or 1 are pseudo-random.

  When `later` is set, every first turn is answered like a tool call, and all completions of domain `far` get
  reward 1, so that batches must be refilled.
  """

  max_turns, later = 2, False

  def __init__(self, name):
    self.name = name

  def make_row(self, rng):
    return make_prompt(self.name, f"add {rng.integers(1000)} and {rng.integers(1000)}", tools=[TOOL])

  def demonstrate(self, row, rng, *, thinking):
    return [assistant("12", thoughts=["one"] * int(rng.integers(1, 5)) if thinking else None)]

  def start(self, row):
    return None

  def act(self, world, turn):
    return ["the sum is 12"] if self.later else None

  def judge(self, row, completion):
    if self.later and self.name == "far":
      return Verdict(1.0, "")
    return Verdict(float(zlib.crc32(completion.text.encode("utf-8", "replace")) % 2), "")

  @classmethod
  def domain(cls, name):
    parts_ = cls(name)
    return Domain(name, GeneratedRows(parts_, name), one_by_one(parts_.judge), parts_)


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def stage(request, tmp_path_factory):
  """(config with this mesh, its parts, a folder)."""
  root = tmp_path_factory.mktemp("compilations")
  c = if_rl.get_config("smoke")
  with c.unlocked():
    c.model.update(MICRO)
    c.mesh = dict(zip(("data", "expert"), request.param, strict=True))
    c.domains, c.tokenizer.conversations = generated("preference"), 20
    c.evaluation.update(prompts=20, batch=64, prompt_tokens=P, total_tokens=T, long_domains=())
  p = parts.build(c, root)
  return c, dataclasses.replace(p, domains={name: Adding.domain(name) for name in ("near", "far")}), root


def steps_of(base, c, kind):
  """Config of a stage of three steps that saves a checkpoint after each."""
  fields = {"sft": sft, "rl": if_rl, "reward_model": reward_model}[kind].get_config("smoke")
  out = base.copy_and_resolve_references()
  with out.unlocked():
    out.update(fields)
    out.model, out.mesh, out.evaluation, out.domains = base.model, base.mesh, base.evaluation, generated("near", "far")
    out.steps, out.save_every = 3, 1
    out.update_from_flattened_dict(c)
  return out


@contextlib.contextmanager
def nothing_after_the_first_step(monkeypatch):
  """Asserts that nothing compiles after the first step.

  The save at the end of a step marks its end. Tool answers and refilled batches first occur after that.
  """
  save, saved = Store.start_save, []
  monkeypatch.setattr(Adding, "later", False)

  def count(store, *args):
    save(store, *args)
    store.wait()
    saved.append(len(compiled.programs))
    Adding.later = True

  monkeypatch.setattr(Store, "start_save", count)
  with CompileCounter() as compiled:
    yield
  assert len(saved) == 3 and saved[0] > 0
  assert compiled.programs[saved[0] :] == []


def test_sft(stage, monkeypatch):
  base, p, root = stage
  c = steps_of(base, {"sources": recipe.conversations(near=40, far=40), "rows": 8, "row_tokens": 256}, "sft")
  monkeypatch.setattr(conversations, "make", lambda name, tasks: Adding(name))
  with nothing_after_the_first_step(monkeypatch):
    sft_stage.run(c, root / "sft", p)


def test_a_reward_model(stage, monkeypatch):
  base, p, root = stage
  c = steps_of(base, {"pairs": 8, "heldout_pairs": 16}, "reward_model")
  with nothing_after_the_first_step(monkeypatch):
    reward_stage.run(c, root / "reward", p)


ROLLOUT = {
  "mixture": {"near": 0.5, "far": 0.5}, "rollout.prompt_tokens": P, "rollout.total_tokens": T,
  "packing.row_tokens": T, "rollout.prompts": 8, "rollout.completions": 8, "packing.rows": 64, "packing.pieces": 8,
}  # fmt: skip


@pytest.fixture
def extended(monkeypatch):
  """Number of rows that got tool results, for each call of `Engine.extend`."""
  seen, extend = [], Engine.extend

  def see(self, params, d, given):
    if given:
      seen.append(len(given))
    return extend(self, params, d, given)

  monkeypatch.setattr(Engine, "extend", see)
  return seen


def checkpoint(c, p, root, seed):
  path = root / f"start_{seed}"
  save_model_files(c, path, p.text.tokenizer)
  Store(path / "checkpoints").save(1, TrainState(np.int32(0), p.programs.fresh_params(jax.random.key(seed)), {}), {})
  return str(path / "checkpoints" / "1")


def test_grpo_with_tools_and_batches_that_are_refilled(stage, monkeypatch, extended):
  """On the mesh with shared prompts, on one device with two updates per batch."""
  base, p, root = stage
  shared = p.programs.mesh.size > 1
  more = {"packing.shared_prompts": True, "packing.row_tokens": T - P + 10} if shared else {"updates": 2}
  c = steps_of(base, ROLLOUT | {"refill_rounds": 3} | more, "rl")
  start, rounds = checkpoint(base, p, root, 0), []
  collect = episode.collect
  monkeypatch.setattr(episode, "collect", lambda *args, **how: rounds.append(how) or collect(*args, **how))
  with nothing_after_the_first_step(monkeypatch):
    rl_stage.run(c, root / "grpo", p, start)
  assert len(rounds) > 3 and extended
  assert all(("completion_tokens" in how) and (how["completion_tokens"] is not None) == shared for how in rounds)


def test_mopd_with_two_teachers_of_which_one_is_in_memory(stage, monkeypatch, extended):
  base, p, root = stage
  starts = [checkpoint(base, p, root, seed) for seed in (1, 2)]
  c = steps_of(
    base, ROLLOUT | {"advantage": "mopd", "correction": "icepop", "aggregation": "sequence_mean", "dynamic_filtering": False}, "rl"
  )  # fmt: skip
  with c.unlocked():
    c.teachers = dict(near=starts[0], far=starts[1])
  of = [Teacher("near", starts[0], 0.0, ""), Teacher("far", starts[1], 0.0, "")]
  rows = draw_heldout(base, p.domains, p.text.tokenizer).rows
  teachers = gather(p.programs, p.text.tokenizer, of, 1, rows)
  with nothing_after_the_first_step(monkeypatch):
    rl_stage.run(c, root / "mopd", p, starts[0], teachers)
  assert extended and teachers.loads > 4


def test_evaluation(stage, monkeypatch, extended):
  """After a first evaluation, no greedy one, none with tool answers and none with moved parameters compiles."""
  c, p, _ = stage
  monkeypatch.setattr(Adding, "later", False)
  fresh = [p.programs.fresh_params(jax.random.key(seed)) for seed in (3, 4)]
  placed = jax.device_put(fresh[0], jax.tree.map(lambda leaf: leaf.sharding, p.programs.template))
  rows = draw_heldout(c, p.domains, p.text.tokenizer)
  with CompileCounter() as first:
    rows.evaluate(p, fresh[0], temperature=1.0)
  Adding.later = True
  with CompileCounter() as again:
    rows.evaluate(p, placed, temperature=0.0)
    rows.evaluate(p, fresh[1], temperature=0.7)
    rows.evaluate(p, jax.device_get(fresh[1]), temperature=0.7)
  assert len(first.programs) <= 3 and again.programs == [] and extended
