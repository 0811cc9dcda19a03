"""A saved state is restored bitwise; a damaged checkpoint is renamed or named in an error, and never used."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import threading
import time

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.store import checkpoint, checksums
from nemocascade.store.checkpoint import Store, load_params
from nemocascade.types import TrainState


def state(seed=0, tx=None):
  params = {"a": jax.random.normal(jax.random.key(seed), (8, 4)), "b": {"c": jnp.arange(5.0)}}
  tx = tx or optax.adam(1e-3)
  return TrainState(step=jnp.int32(seed), params=params, opt_state=tx.init(params))


def template():
  return jax.eval_shape(state)


def saved(path, *steps):
  store = Store(path)
  for step in steps:
    store.save(step, state(step), {"at": step})
  return store


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


def files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != checksums.CHECKSUMS)


def test_a_state_and_its_record_come_back_bitwise(tmp_path):
  Store(tmp_path).save(7, state(3), {"frontier": {"math": 12}})
  store = Store(tmp_path)
  restored, record = store.restore(template())
  chex.assert_trees_all_equal(restored, state(3))
  assert store.latest() == 7 and record == {"frontier": {"math": 12}}


def test_a_state_that_is_donated_while_it_is_saved_is_saved_as_it_was(tmp_path, monkeypatch):
  """The save writes nothing before the next steps have run. On the CPU its views of the arrays prevent the donation."""
  create, donated = checkpoint._Summed.create, threading.Event()

  async def late(self):
    await asyncio.to_thread(donated.wait, 30)
    return await create(self)

  monkeypatch.setattr(checkpoint._Summed, "create", late)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
  before = jax.tree.map(jnp.array, state(3))
  with Store(tmp_path) as store:
    store.start_save(3, now := state(3), given := {"at": [3]})
    given["at"].append(4)
    for _ in range(3):
      step(other := state(4))
      now = step(now)
    jax.block_until_ready(now)
    donated.set()
  assert other.params["a"].is_deleted()  # Donation works here.
  found, record = Store(tmp_path).restore(template())
  chex.assert_trees_all_equal(found, before)
  assert record == {"at": [3]}


def test_an_error_of_a_save_in_the_background_is_raised_at_the_next_check(tmp_path, monkeypatch):
  store = saved(tmp_path, 1)

  def full(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

  with monkeypatch.context() as patch:
    patch.setattr(checksums, "write", full)
    store.start_save(2, state(2), {})  # Raises nothing.
    with pytest.raises(OSError, match="No space left on device: .* MB are needed and .* MB are free") as error:
      for _ in range(1000):
        store.check()
        time.sleep(0.01)
  assert error.value.filename == str(tmp_path / "2")
  store.check()  # Once.
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
  store.save(2, state(2), {})
  assert store.latest() == 2


@pytest.mark.parametrize("error", [None, KeyError])
def test_a_save_is_on_disk_when_its_with_block_ends(tmp_path, error):
  with pytest.raises(KeyError) if error else contextlib.nullcontext(), Store(tmp_path) as store:
    store.start_save(1, state(1), {"at": 1})
    if error:
      raise error
  assert Store(tmp_path).restore(template())[1] == {"at": 1}


def test_only_the_newest_are_kept(tmp_path):
  saved(tmp_path, 1, 2, 3)
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_an_earlier_step_can_be_restored_and_gone_on_from(tmp_path):
  store = saved(tmp_path, 1, 2)
  restored, record = store.restore(template(), step=1)
  assert int(restored.step) == 1 and record == {"at": 1}
  store.save(2, state(9), {"at": "again"})
  restored, record = store.restore(template())
  assert int(restored.step) == 9 and record == {"at": "again"}


def test_a_state_comes_back_onto_the_mesh_of_its_template(tmp_path):
  """Saved on one device, restored on eight."""
  store = saved(tmp_path, 1)
  rows = NamedSharding(make_mesh(), PartitionSpec("data"))
  whole = NamedSharding(make_mesh(), PartitionSpec())
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows if leaf.shape == (8, 4) else whole)
  restored, _ = store.restore(jax.tree.map(place, template()))
  assert restored.params["a"].sharding == rows
  chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state(1)))


def test_parameters_alone_are_loaded(tmp_path):
  store = saved(tmp_path, 1)
  shutil.rmtree(store.path_of(1) / "rest")  # Loading parameters does not need the optimizer's state.
  chex.assert_trees_all_equal(load_params(store.path_of(1), template().params), state(1).params)


def test_an_empty_store_has_no_latest_and_says_so(tmp_path):
  assert Store(tmp_path).latest() is None
  with pytest.raises(UserError, match="has saved none yet"):
    Store(tmp_path).restore(template())


def test_an_unfinished_save_is_ignored(tmp_path):
  """Simulates a kill: a folder with Orbax's temporary name and only some of the files."""
  saved(tmp_path, 1, 2)
  unfinished = tmp_path / "2.orbax-checkpoint-tmp"
  (tmp_path / "2").rename(unfinished)
  shutil.rmtree(unfinished / "rest")
  store = Store(tmp_path)
  assert store.latest() == 1
  assert int(store.restore(template())[0].step) == 1
  store.save(2, state(2), {})
  assert store.latest() == 2


def test_a_kill_between_the_arrays_and_the_checksums_leaves_no_checkpoint(tmp_path, monkeypatch):
  """A save without checksums counts as absent, and its step can be saved again."""
  store = saved(tmp_path, 1)

  def kill(folder):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(checksums, "write", kill)
    store.save(2, state(2), {})
  assert len(list(tmp_path.iterdir())) == 2
  store = Store(tmp_path)
  assert store.latest() == 1
  store.save(2, state(2), {})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # The remains of the kill are gone.
  assert int(Store(tmp_path).restore(template())[0].step) == 2


def empty(step):
  for path in step.iterdir():
    path.unlink() if path.is_file() else shutil.rmtree(path)


def add(step):
  (step / "params" / "extra").write_text("x")


def without_sums(step):
  (step / checksums.CHECKSUMS).unlink()


def with_sizes_alone(step):
  """Keeps only the file sizes, as older checkpoints above one GiB did."""
  sums = json.loads((step / checksums.CHECKSUMS).read_text())
  (step / checksums.CHECKSUMS).write_text(json.dumps({name: [of[0]] for name, of in sums.items()}))


def sums_of_nothing(step):
  (step / checksums.CHECKSUMS).write_text("{}")


def sums_of_another_shape(step):
  (step / checksums.CHECKSUMS).write_text('[{"params": null}]')


def one_sum_less(step):
  sums = json.loads((step / checksums.CHECKSUMS).read_text())
  del sums[next(name for name in sums if name.startswith("params/"))]
  (step / checksums.CHECKSUMS).write_text(json.dumps(sums))


def a_file(step):
  shutil.rmtree(step)
  step.write_text("")


def broken_link(step):
  file = files(step / "params")[0]
  file.unlink()
  file.symlink_to(step / "nowhere")


def link_to_itself(step):
  file = files(step / "params")[0]
  file.unlink()
  file.symlink_to(file)


def folder_in_its_place(step):
  file = files(step / "params")[0]
  file.unlink()
  file.mkdir()


HARMS = [
  empty, add, without_sums, with_sizes_alone, sums_of_nothing, sums_of_another_shape, one_sum_less, a_file,
  broken_link, link_to_itself, folder_in_its_place,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_checkpoint_of_another_make_is_named_and_the_one_before_is_used(tmp_path, capsys, harm):
  saved(tmp_path, 1, 2)
  harm(tmp_path / "2")
  assert Store(tmp_path).latest() == 2
  restored, record = Store(tmp_path).restore(template())
  assert (int(restored.step), record) == (1, {"at": 1})
  assert f"checkpoint {tmp_path / '2'} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_parameters_of_another_make_are_refused(tmp_path, harm):
  saved(tmp_path, 1)
  harm(tmp_path / "1")
  with pytest.raises(UserError, match=f"checkpoint {tmp_path / '1'}: "):
    load_params(tmp_path / "1", template().params)


def test_every_piece_of_a_large_file_is_compared(tmp_path, monkeypatch):
  monkeypatch.setattr(checksums, "PIECE_BYTES", 1000)
  (tmp_path / "sub").mkdir()
  data = bytes(range(256)) * 40
  for name, size in (("whole", 5000), ("rest", 5001), ("none", 0)):
    (tmp_path / "sub" / name).write_bytes(data[:size])
  checksums.write(tmp_path)
  checksums.verify(tmp_path)
  for name, place in [("whole", i) for i in range(0, 5000, 999)] + [("rest", 5000)]:
    changed = bytearray((tmp_path / "sub" / name).read_bytes())
    changed[place] ^= 1
    (tmp_path / "sub" / name).write_bytes(changed)
    with pytest.raises(checksums.Damage, match=f"sub/{name} has changed"):
      checksums.verify(tmp_path, part="sub")
    changed[place] ^= 1
    (tmp_path / "sub" / name).write_bytes(changed)
  checksums.verify(tmp_path)


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), truncate, flip], ids=["lost", "cut", "flipped"])
def test_no_damaged_file_goes_unnoticed(tmp_path, harm):
  """Damages each file in turn: the previous checkpoint must be restored."""
  saved(tmp_path / "good", 1, 2)
  for i in range(len(files(tmp_path / "good" / "2"))):
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    victim = files(tmp_path / "bad" / "2")[i]
    if victim.stat().st_size:
      harm(victim)
      restored, record = Store(tmp_path / "bad").restore(template())
      assert (int(restored.step), record) == (1, {"at": 1}), victim
    shutil.rmtree(tmp_path / "bad")


def test_a_damaged_newest_checkpoint_is_set_aside_and_its_step_is_saved_again(tmp_path, capsys):
  store = saved(tmp_path, 1, 2)
  shutil.rmtree(store.path_of(2) / "params")
  store = Store(tmp_path)
  assert int(store.restore(template())[0].step) == 1
  assert "damaged" in capsys.readouterr().err
  assert store.latest() == 1 and (tmp_path / "damaged-2" / "rest").is_dir()
  store.save(2, state(5), {})
  assert int(Store(tmp_path).restore(template())[0].step) == 5


def test_no_readable_checkpoint_is_said_and_nothing_is_moved(tmp_path):
  store = saved(tmp_path, 1)
  truncate(files(store.path_of(1) / "params")[0])
  with pytest.raises(UserError, match="no checkpoint to restore.*remove it to start the stage anew"):
    Store(tmp_path).restore(template())
  assert store.path_of(1).is_dir()


def test_a_damaged_step_that_was_asked_for_is_an_error_naming_the_others(tmp_path):
  store = saved(tmp_path, 1, 2)
  truncate(files(store.path_of(2) / "rest")[0])
  with pytest.raises(UserError, match=r"restore one of the steps \[1\]"):
    store.restore(template(), step=2)


def test_another_models_parameters_are_refused_by_name(tmp_path):
  store = saved(tmp_path, 1)
  other = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32), "d": jax.ShapeDtypeStruct((5,), jnp.float32)}
  with pytest.raises(UserError, match=r"a is \(8, 4\) there and \(3, 5\) here, and 2 more arrays differ"):
    load_params(store.path_of(1), other)


def test_a_template_of_another_optimizer_is_refused_and_the_checkpoints_stay(tmp_path):
  saved(tmp_path, 1, 2)
  other = jax.eval_shape(lambda: state(tx=optax.sgd(1e-3, momentum=0.9)))
  with pytest.raises(UserError, match="another optimizer.*count is .* there and absent here, and 6 more"):
    Store(tmp_path).restore(other)
  assert Store(tmp_path).latest() == 2


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), truncate, flip], ids=["lost", "cut", "flipped"])
def test_damaged_parameters_are_never_loaded(tmp_path, harm):
  store = saved(tmp_path, 1)
  harm(files(store.path_of(1) / "params")[-1])
  with pytest.raises(UserError, match=f"checkpoint {store.path_of(1)}: can't be read"):
    load_params(store.path_of(1), template().params)


def test_a_missing_checkpoint_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere"):
    load_params(tmp_path / "nowhere", template().params)


def test_a_save_of_a_tiny_state_is_quick(tmp_path):
  """Stages may save every ten steps. A save took 0.12 s alone; the bound allows for a busy machine."""
  store = saved(tmp_path, 1)
  took = []
  for step in (2, 3, 4):
    began = time.perf_counter()
    store.save(step, state(step), {})
    took.append(time.perf_counter() - began)
  assert min(took) < 1.0, took


def test_a_file_that_may_not_be_read_is_named_and_its_checkpoint_is_not_set_aside(tmp_path, monkeypatch):
  saved(tmp_path, 1, 2)
  opened = checksums._crc32

  def closed(file, start):
    if file.parent.parent.name == "2":
      raise PermissionError(errno.EACCES, "Permission denied", str(file))
    return opened(file, start)

  monkeypatch.setattr(checksums, "_crc32", closed)
  with pytest.raises(UserError, match=f"{tmp_path / '2'}: .*: Permission denied; let this user read it"):
    Store(tmp_path).restore(template())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_where_memory_or_handles_are_short_no_checkpoint_is_blamed(tmp_path, monkeypatch):
  saved(tmp_path, 1, 2)

  def short(file, start):
    raise OSError(errno.EMFILE, "Too many open files", str(file))

  monkeypatch.setattr(checksums, "_crc32", short)
  with pytest.raises(OSError, match="Too many open files"):
    Store(tmp_path).restore(template())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
