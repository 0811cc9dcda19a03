"""A stage's programs give the same results on any mesh, and in two processes, as on one device."""

import functools
import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from two_processes import assert_both_say

from configs.tiny import rl as rl_config
from experiments import sft
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.runtime import objective
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import start
from nemocascade.runtime.teachers import TOLERANCES, check_probe, take_probe
from nemocascade.runtime.text import Text
from nemocascade.step.optimizer import make_optimizer
from nemocascade.types import Batch, Prompts

pytestmark = pytest.mark.usefixtures("compiled_fast")
GRIDS = [(2, 4), (8, 1), (1, 8)]
B, T, V = 16, 24, 64


def config(data, expert, split=False) -> ConfigDict:
  """split: pieces have 4 rows, fewer than the devices, and lie over them by tokens."""
  c = ConfigDict({"domains": {}, "tasks": {}, "seed": 0, "mesh": dict(data=data, expert=expert)})
  c.model = dict(
    vocab_size=V, hidden_size=16, hybrid_override_pattern="M*E", num_attention_heads=4, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, chunk_size=8, n_routed_experts=8,
    moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, initializer_range=0.3,
    sequence_parallel=split,
  )  # fmt: skip
  c.update(rl_config.fields())
  c.packing = dict(rows=B, row_tokens=T, pieces=4 if split else 2, shared_prompts=False)
  c.rollout.update(prompts=8, completions=2, total_tokens=T)
  c.rows, c.row_tokens, c.pieces, c.z_loss = B, T, 4 if split else 1, 0.0
  # A large eps makes Adam's first step nearly equal to the gradient where the gradient is small.
  c.optimizer.update(peak_lr=1.0, warmup_steps=0, eps=1.0, clip_norm=1e3)
  return c


class NoText:
  """Stands for a tokenizer, which a stage saves beside its checkpoints."""

  vocab_size = V

  def save(self, directory):
    del directory


def parts_of(c: ConfigDict) -> Parts:
  """The parts of a run without domains."""
  # One device of this process, also where there are several processes, each of which then computes alone.
  of = jax.local_devices()[:1] if c.mesh.data == c.mesh.expert == 1 else None
  return Parts(Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(**c.mesh, of=of)), Text(NoText()), {})


@functools.cache
def on(data, expert, split=False) -> tuple[ConfigDict, Parts]:
  """(config, parts) on this mesh."""
  c = config(data, expert, split)
  return c, parts_of(c)


@functools.cache
def arrays() -> dict[str, np.ndarray]:
  """Arrays of B rows, each of two documents and padding."""
  r = np.random.default_rng(0)
  segment_ids_BT = np.repeat([[1, 2, 0]], [10, 10, 4], axis=1) * np.ones((B, 1), np.int32)
  mask_BT = (r.random((B, T)) < 0.6) & (segment_ids_BT > 0)
  mask_BT[:, [0, 10]] = False
  return {
    "tokens": r.integers(0, V, (B, T), np.int32),
    "segment_ids": segment_ids_BT.astype(np.int32),
    "mask": mask_BT,
    "weights": mask_BT.astype(np.float32),
    "behaviour": np.where(mask_BT, -np.log(V), 0).astype(np.float32),
    "advantages": np.where(mask_BT, r.normal(size=(B, T)), 0).astype(np.float32),
  }


def sft_step(c: ConfigDict, p: Parts, directory):
  """(metrics, next state, store) of the first step of an SFT stage."""
  tx, _, step_fn = sft.program(c, p.programs)
  state, _, store = start(c, directory, p, tx, "")
  x = arrays()
  state, metrics = step_fn(state, p.programs.put(Batch(x["tokens"], x["segment_ids"], x["mask"])))
  return metrics, state, store


def rl_step(c: ConfigDict, p: Parts, directory):
  tx = make_optimizer(total_steps=1, **c.optimizer)
  _, step_fn, _ = objective.step_program(c, p.programs)
  state, _, _ = start(c, directory, p, tx, "")
  state, metrics = step_fn(state, *p.programs.put((arrays(), np.float32(arrays()["mask"].sum()))))
  return metrics, state


def rl_step_after_prompts(c: ConfigDict, p: Parts, directory):
  """The same for RL rows of one document, two rows after each of eight shared prompts."""
  c = c.copy_and_resolve_references()
  c.packing.shared_prompts = True
  tx = make_optimizer(total_steps=1, **c.optimizer)
  _, step_fn, _ = objective.step_program(c, p.programs)
  state, _, _ = start(c, directory, p, tx, "")
  r = np.random.default_rng(1)
  prompts = Prompts(r.integers(0, V, (8, 6), np.int32), r.integers(1, 7, 8, np.int32))
  x = arrays() | {"segment_ids": (arrays()["segment_ids"] > 0).astype(np.int32)}
  rows, count, prompts = p.programs.put((x, np.float32(x["mask"].sum()), prompts))
  state, metrics = step_fn(state, rows, count, None, prompts)
  return metrics, state


def distilled_step(c: ConfigDict, p: Parts, directory):
  """The step of `rl_step` with the distance from two teachers, of which each device has a part of the heads."""
  c = c.copy_and_resolve_references()
  c.distillation_weight = 1.0
  tx = make_optimizer(total_steps=1, **c.optimizer)
  _, step_fn, _ = objective.step_program(c, p.programs)
  state, _, _ = start(c, directory, p, tx, "")
  r, like = np.random.default_rng(2), p.programs.heads_template(2)
  heads_ZDV = jax.device_put(r.normal(size=like.shape).astype(like.dtype), like.sharding)
  D = like.shape[1]
  assert math.prod(heads_ZDV.sharding.shard_shape(like.shape)) * p.programs.mesh.size == heads_ZDV.size
  x = arrays() | {
    "teacher_states": r.normal(size=(B, T, D)).astype(np.float32),
    "teacher": r.integers(0, 2, (B, T), np.int32),
  }
  state, metrics = step_fn(state, *p.programs.put((x, np.float32(x["mask"].sum()))), heads_ZDV)
  assert metrics["policy/teacher_kl"] > 0.1
  return metrics, state


@functools.cache
def on_one_device(step, directory):
  metrics, state, *_ = step(*on(1, 1), directory / "one")
  return jax.device_get((metrics, state.params))


def assert_same(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("mesh")


@pytest.mark.parametrize("data, expert", GRIDS)
def test_an_sft_step_is_that_of_one_device_and_its_checkpoint_fits_any_mesh(root, data, expert):
  directory = root / f"sft_{data}_{expert}"
  metrics, state, store = sft_step(*on(data, expert), directory)
  assert_same(jax.device_get((metrics, state.params)), on_one_device(sft_step, root))
  if (data, expert) == (2, 4):
    store.save(1, state, {"there": 1})
    for c, p in (on(8, 1), on(1, 1)):
      tx, abstract, _ = sft.program(c, p.programs)
      again, record, _ = start(c, directory, p, tx, "")
      assert record["there"] == 1
      jax.tree.map(lambda x, want: np.testing.assert_equal(x.sharding, want.sharding), again, abstract)
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))


@pytest.mark.parametrize("step", [rl_step, rl_step_after_prompts])
@pytest.mark.parametrize("data, expert", GRIDS)
def test_an_rl_step_is_that_of_one_device(root, data, expert, step):
  metrics, state = step(*on(data, expert), root / f"{step.__name__}_{data}_{expert}")
  assert_same(jax.device_get((metrics, state.params)), on_one_device(step, root))


@pytest.mark.parametrize("step", [sft_step, distilled_step])
def test_a_step_on_rows_over_several_devices_is_that_of_one_device(root, step):
  metrics, state, *_ = step(*on(2, 4, True), root / f"{step.__name__}_split")
  assert_same(jax.device_get((metrics, state.params)), on_one_device(step, root))


def test_an_rl_step_in_bf16_is_nearly_that_of_one_device(root):
  """Compares the whole parameter change, because sharded sums round differently."""

  def change(data, expert):
    c = config(data, expert)
    c.model.update(dtype="bfloat16", num_experts_per_tok=8)  # All experts are chosen, so rounding changes no choice.
    p = parts_of(c)
    before = jax.device_get(p.programs.fresh_params(jax.random.key(0)))
    _, state = rl_step(c, p, root / f"bf16_{data}_{expert}")
    moved = jax.tree.map(lambda new, old: np.ravel(new - old), jax.device_get(state.params), before)
    return np.concatenate(jax.tree.leaves(moved))

  one, several = change(1, 1), change(2, 4)
  assert one @ several / np.linalg.norm(one) / np.linalg.norm(several) > 0.995


def test_a_probe_holds_on_another_mesh_in_bf16_and_finds_other_weights():
  def made(data, expert):
    c = config(data, expert)
    c.model.update(dtype="bfloat16", hybrid_override_pattern="M*EM*E")
    programs = parts_of(c).programs
    put = lambda seed: jax.device_put(
      programs.fresh_params(jax.random.key(seed)), jax.tree.map(lambda p: p.sharding, programs.template)
    )
    return programs.score, put

  tokens_BT = np.random.default_rng(2).integers(0, V, (4, 16))
  (score, put), (score_there, put_there) = made(1, 1), made(2, 4)
  probe, how = take_probe(score, put(1), tokens_BT), dict(vocab_size=V, name="of 'math'", dtype="bfloat16")
  there = take_probe(score_there, put_there(1), tokens_BT)
  # The fp32 tolerance would refuse this probe; otherwise the test would show nothing.
  assert np.abs(np.subtract(there.logprobs, probe.logprobs)).mean() > TOLERANCES["float32"]
  check_probe(score_there, put_there(1), probe, **how)
  for changed in (put_there(2), jax.tree.map(lambda x: 1.1 * x, put_there(1))):
    with pytest.raises(UserError, match="at most 0.2 in bfloat16"):
      check_probe(score_there, changed, probe, **how)


def test_parameters_and_moments_are_cut_over_all_devices(root):
  c, p = on(2, 4)
  _, state, _ = sft.program(c, p.programs)
  for tree in (state.params, state.opt_state):
    whole = sum(x.size for x in jax.tree.leaves(tree))
    here = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
    assert here < 0.2 * whole  # An eighth of the parameters, plus those too small to be sharded.


@functools.cache
def said_and_sampled(data, expert, split=False):
  programs = on(data, expert, split)[1].programs
  places = jax.tree.map(lambda p: p.sharding, programs.template)
  params = jax.device_put(programs.fresh_params(jax.random.key(1)), places)
  rows = programs.put(tuple(arrays()[name] for name in ("tokens", "segment_ids", "mask")))
  said = np.asarray(programs.logprobs(params, *rows, np.float32(0.7)))
  engine = programs.engine(6, 16)
  d = engine.start(params, [[3, 4, 5], [6] * 6, [7], [8, 9]], 2)
  d = engine.decode(params, d, jax.random.key(2))
  return said, np.asarray(d.tokens_BT), np.asarray(d.behaviour_logprobs_BT)


@pytest.mark.parametrize("data, expert, split", [(2, 4, False), (1, 8, False), (2, 4, True)])
def test_teachers_say_and_policies_sample_what_they_do_on_one_device(data, expert, split):
  said, tokens_BT, logprobs_BT = said_and_sampled(data, expert, split)
  expected, tokens_there, logprobs_there = said_and_sampled(1, 1)
  np.testing.assert_allclose(said, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(tokens_BT, tokens_there)
  np.testing.assert_allclose(logprobs_BT, logprobs_there, rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_divide_over_the_devices_are_refused_with_the_numbers():
  c, programs = config(8, 1), on(8, 1)[1].programs
  c.rows = 12
  with pytest.raises(UserError, match="12 rows over the 8 devices"):
    sft.program(c, programs)
  c.packing.rows = 4
  with pytest.raises(UserError, match="2 rows over the 8 devices"):
    objective.step_program(c, programs)
  c.rollout.prompts, c.packing.shared_prompts = 4, True
  with pytest.raises(UserError, match="rollout.prompts is 4 rows over the 8 devices"):
    objective.step_program(c, programs)


PROCESS = """
from pathlib import Path
import test_mesh_stages as t
from nemocascade.mesh import whole
(c, p), root = t.on(2, 4), Path(*arguments)
metrics, state, store = t.sft_step(c, p, root / "two")
gathered = jax.jit(lambda p: p, out_shardings=whole(p.programs.mesh))(state.params)
t.assert_same(jax.device_get((metrics, gathered)), t.on_one_device(t.sft_step, root / index))

store.save(1, state, {"tokens": 1})
c.steps += 1  # The schedule's numbers then are not those of the checkpoint.
again, _, store = t.start(c, root / "two", p, t.sft.program(c, p.programs)[0], "")
assert int(again.step) == 1
store.save(2, again, {"tokens": 2})

import test_placement as rl
batch, alone = rl.arranged((2, 4), 8, False)[0], rl.arranged((1, 1), 8, False)[0]
gathered = jax.jit(lambda rows: rows, out_shardings=whole(p.programs.mesh))(batch.rows)
assert rl.documents_of(gathered) == rl.documents_of(alone.rows) and batch.tokens == alone.tokens
print("the same")
"""


def test_two_processes_of_four_devices_are_one_device(tmp_path):
  assert_both_say("the same", PROCESS, str(tmp_path))
