"""Orbax checkpoints of a training state and a JSON record; the parameters can be loaded alone."""

import asyncio
import contextlib
import copy
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.path import atomicity

from nemocascade.errors import UserError, first_of
from nemocascade.rollout.exchange import Exchange, alone
from nemocascade.state_files import absolute, named, on_bucket
from nemocascade.store import checksums
from nemocascade.store.kept import NewestAndKept
from nemocascade.types import Params, TrainState

# Orbax logs every save. It raises its errors besides logging them.
logging.getLogger("absl").setLevel(logging.CRITICAL)

MODEL = "model"  # The folder of the model's config and tokenizer, in a stage and in each checkpoint.
# Exceptions that mean lost or changed files; our checksums and Orbax raise them. Orbax alone does not notice a
# changed byte. Other errors (memory, permission) are passed on.
DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)


class _Summed(atomicity.AtomicRenameTemporaryPath):
  """A checkpoint under a temporary name that gets its checksums before it is renamed to its final name.

  Orbax calls `finalize` in the first process, after all processes have written.
  """

  async def finalize(self) -> None:
    final = self._final_path  # type: ignore[has-type]
    # An item inside a checkpoint needs no checksums of its own: the checkpoint's cover it.
    if atomicity.TMP_DIR_SUFFIX in final.parent.name:
      return await super().finalize()
    # Orbax still writes files in super().finalize(), so the folder gets another temporary name first.
    # TMP_DIR_SUFFIX lets Orbax remove it after a kill.
    self._final_path = final.with_name(f"{final.name}{atomicity.TMP_DIR_SUFFIX}-whole")
    await super().finalize()
    whole, self._final_path = self._final_path, final
    await asyncio.to_thread(_complete, Path(whole), Path(final))
    Path(whole).rename(final)


class _SummedObjects(atomicity.CommitFileTemporaryPath):
  """A checkpoint in a bucket, where folders are not renamed: it counts from its commit file on, written last."""

  async def finalize(self) -> None:
    final = self._final_path
    if not final.parent.name.isdecimal():  # An item inside a checkpoint is in the folder of its step.
      await asyncio.to_thread(_complete, final, final)
    await super().finalize()


def _complete(folder: Path, final: Path) -> None:
  """Adds the stage's model config and tokenizer to a checkpoint, so that it can be moved alone, and checksums.

  Args:
    final: the checkpoint's final path, STAGE/checkpoints/STEP; the files are in STAGE/model.
  """
  files = final.parent.parent / MODEL
  if files.is_dir():
    (folder / MODEL).mkdir()
    for file in files.iterdir():
      (folder / MODEL / file.name).write_bytes(file.read_bytes())
  checksums.write(folder)


NEWEST = 2  # Checkpoints of a stage that are kept, besides those of kept.json.


class Store:
  """The checkpoints of one stage, in DIRECTORY/<step>: the newest `keep`, and those that kept.json names (kept.py).

  A `with` block of a store ends when its saves are on disk, however the block ends.
  """

  def __init__(self, directory: str | Path, *, keep: int = NEWEST, stamp: Mapping[str, Any] | None = None):
    """
    Args:
      stamp: JSON that is added to the record of every checkpoint that is saved, such as its lineage.
    """
    self.directory = absolute(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=NewestAndKept(self.directory, keep), enable_async_checkpointing=True,
      cleanup_tmp_directories=True,
      temporary_path_class=_SummedObjects if on_bucket(self.directory) else _Summed,
    )  # fmt: skip
    self._manager = ocp.CheckpointManager(self.directory, options=options)
    self._saving: tuple[int, int] | None = None  # (step, bytes) of the save that runs in the background.
    self._stamp = dict(stamp or {})

  def start_save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Starts to save a checkpoint; returns when the state is copied to the host, and may be donated.

    A thread writes it with its checksums under a temporary name, and renames it. Before this save, the previous one
    is waited for.

    Args:
      record: JSON that the stage needs to resume (position in the data, prompt frontier, ...).

    Raises:
      OSError: this checkpoint or the previous one cannot be written, such as on a full disk; older ones are kept.
    """
    self.wait()
    # An earlier run saved this step, but the stage was restored from an older one.
    if step in self._manager.all_steps():
      self._manager.delete(step)
    self._saving = step, _bytes(state)
    with self._errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          rest=ocp.args.StandardSave(_rest(state)),
          record=ocp.args.JsonSave(copy.deepcopy(record) | self._stamp),  # The next steps may change it.
        ),
        force=True,
      )

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """`start_save` and `wait`: the checkpoint is on disk when this returns."""
    self.start_save(step, state, record)
    self.wait()

  def check(self) -> None:
    """Raises the error of a save that has failed in the background, as `wait` does. It does not wait."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until the started save is on disk.

    Raises:
      OSError: it cannot be written, such as on a full disk; older checkpoints are kept.
    """
    if self._saving is None:
      return
    with self._errors():
      self._manager.wait_until_finished()
    self._saving = None

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    """Gives errors of the save its path and size, and removes what it left."""
    assert self._saving is not None
    step, needed = self._saving
    try:
      with named(self.path_of(step), needed=needed):
        yield
    except OSError:
      self._saving = None
      # Orbax's threads may still be writing. The next opening of the store removes what they leave.
      if not on_bucket(self.directory):
        for partial in self.directory.glob(f"{step}{atomicity.TMP_DIR_SUFFIX}*"):
          shutil.rmtree(partial, ignore_errors=True)
      raise

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, kind, *_) -> None:
    # At the interpreter's end no thread can be started, and the save needs one: it would be lost.
    with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
      self.wait()

  def latest(self) -> int | None:
    """The newest finished step; an unfinished save does not count."""
    return max(self.steps(), default=None)

  def steps(self) -> list[int]:
    """All finished steps in ascending order, damaged ones included."""
    return steps_in(self.directory)

  def path_of(self, step: int) -> Path:
    return self.directory / str(step)

  def restore(
    self, template: TrainState, step: int | None = None, *, exchange: Exchange = alone
  ) -> tuple[TrainState, dict]:  # fmt: skip
    """Restores (state, record) of a step with the template's shapes, dtypes and shardings.

    Without a step it restores the newest readable checkpoint. Damaged newer ones are then renamed to
    damaged-<step> and reported on stderr. Nothing is deleted.

    Args:
      exchange: by which several processes agree on the step.

    Raises:
      UserError: there is no checkpoint, none can be read, or it is of another model or optimizer.
      OSError: some processes can read a checkpoint, and others cannot.
    """
    steps = [step] if step is not None else exchange(self.steps()[::-1], "steps of the checkpoints")[0]
    damaged: dict[int, str] = {}
    for i in steps:
      if why := self._damage(template, i, exchange):
        damaged[i] = why
        continue
      found = self._restore(template, i)
      for bad, why in damaged.items():
        self._set_aside(bad, exchange)
        if jax.process_index() > 0:
          continue
        print(f"checkpoint {self.path_of(bad)} is damaged ({why}): using step {i}", file=sys.stderr)
      return found
    if not damaged:
      raise UserError(f"no checkpoint to restore in {self.directory}: the stage has saved none yet")
    first, why = next(iter(damaged.items()))
    other = [i for i in self.steps() if i not in damaged]
    remedy = f"restore one of the steps {sorted(other)}" if other else "remove it to start the stage anew"
    raise UserError(f"no checkpoint to restore: {self.path_of(first)} can't be read ({why}); {remedy}")

  def _damage(self, template: TrainState, step: int, exchange: Exchange) -> str:
    """Why the checkpoint cannot be read, the same in all processes; "" if it can."""
    path, why = self.path_of(step), ""
    try:
      if not path.is_dir():
        raise FileNotFoundError("not a folder" if path.exists() else "no such checkpoint")
      checksums.verify(path)
      for part, wanted in (("params", template.params), ("rest", _rest(template))):
        _same_shapes(path, part, wanted)
    except DAMAGE as error:
      why = _line(error)
    whys = exchange(why, "state of a checkpoint")
    if any(whys) and not all(whys):  # A file system that shows the processes different files, for example.
      bad = next(i for i, said in enumerate(whys) if said)
      raise OSError(f"checkpoint {path}: process {bad} can't read it ({whys[bad]}), and others can")
    return whys[0]

  def _restore(self, template: TrainState, step: int) -> tuple[TrainState, dict]:
    rest = _rest(template)
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(_placed(template.params)),
        rest=ocp.args.StandardRestore(_placed(rest)),
        record=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(step=found["rest"]["step"], params=found["params"], opt_state=found["rest"]["opt_state"])
    return state, found["record"]

  def _set_aside(self, step: int, exchange: Exchange) -> None:
    """Renames a damaged checkpoint so that its step can be saved again."""
    if jax.process_index() == 0:
      target = self.directory / f"damaged-{step}"
      for i in range(2, 100):
        if not target.exists():
          break
        target = self.directory / f"damaged-{step}-{i}"
      self.path_of(step).rename(target)
    exchange(None, "damaged checkpoints")
    self._manager.reload()


def steps_in(directory: Path) -> list[int]:
  """The finished steps of a folder of checkpoints in ascending order, damaged ones included."""
  if on_bucket(directory):  # The glob of a folder without objects is empty; its listing is an error.
    whole = directory.glob(f"*/{atomicity.COMMIT_SUCCESS_FILE}")
    return sorted(int(p.parent.name) for p in whole if p.parent.name.isdecimal())
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def load_params(path: str | Path, template: Params) -> Params:
  """Loads the parameters of a checkpoint directory with the template's dtypes and shardings.

  The optimizer state is not read.

  Raises:
    UserError: there is no checkpoint, it is damaged, or shapes differ from the template's (all are named).
  """
  path = absolute(path)
  check_params(path, template)
  try:
    checksums.verify(path, part="params")
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(path / "params", _placed(template))
  except DAMAGE as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def check_params(path: str | Path, template: Params) -> None:
  """Raises UserError if the checkpoint has no parameters or other shapes; no array is read."""
  path = absolute(path)
  if not (path / "params").is_dir():
    raise UserError(f"checkpoint {path}: not found, or without parameters; give STAGE/checkpoints/STEP")
  try:
    _same_shapes(path, "params", template)
  except (*DAMAGE, OSError) as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def check(path: Path, part: str = "") -> None:
  """Raises UserError if a file of the checkpoint, or of the folder `part` in it, is missing or has changed."""
  try:
    checksums.verify(path, part)
  except checksums.Damage as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def _same_shapes(path: Path, part: str, template) -> None:
  """Raises UserError that names the first array that is absent or has another shape."""
  with ocp.StandardCheckpointer() as checkpointer:
    stored = checkpointer.metadata(path / part).item_metadata
  if stored is None:
    raise ValueError(f"{part} says nothing of its arrays")
  shapes = lambda tree: {
    jax.tree_util.keystr(place, simple=True, separator="/"): tuple(leaf.shape)
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  there, here = shapes(stored.tree), shapes(template)
  different = [
    f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if different:
    what = "model" if part == "params" else "optimizer"
    raise UserError(f"checkpoint {path} is of another {what}: {first_of(different)}")


def _rest(state: TrainState) -> dict[str, Any]:
  """What is saved besides the parameters and the record."""
  return {"step": state.step, "opt_state": state.opt_state}


def _placed(template):
  """The template as ShapeDtypeStructs, each with its own sharding or else this process's first device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def place(leaf):
    sharding = getattr(leaf, "sharding", None) or device
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, template)


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
