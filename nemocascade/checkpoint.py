"""Orbax checkpoints of a training state with a JSON record; parameters alone for everyone else."""

import asyncio
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from nemocascade import checksums
from nemocascade.errors import UserError
from nemocascade.state_files import named
from nemocascade.types import Params, TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every save, and raises what it logs as errors.

# What our checksums and Orbax, which does not notice a changed byte, raise on a folder with lost or changed files. Others (memory, permission) pass.
DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)


class _Summed(atomicity.AtomicRenameTemporaryPath):
  """A checkpoint under a temporary name; the rename that commits it comes after its checksums.

  Orbax calls `finalize` in the first process, when all have written.
  """

  async def finalize(self) -> None:
    final = self._final_path
    if atomicity.TMP_DIR_SUFFIX in final.parent.name:  # A part of a checkpoint, which has the sums of all.
      return await super().finalize()
    # Orbax still writes files here. Its suffix marks the folder as one to be cleaned up after a kill.
    self._final_path = final.with_name(f"{final.name}{atomicity.TMP_DIR_SUFFIX}-whole")
    await super().finalize()
    whole, self._final_path = self._final_path, final
    await asyncio.to_thread(checksums.write, Path(whole))
    Path(whole).rename(final)


class Store:
  """The checkpoints of one stage, under DIRECTORY/<step>; the newest `keep` stay."""

  def __init__(self, directory: str | Path, *, keep: int = 2):
    self.directory = Path(directory).resolve()
    self.directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True,
      temporary_path_class=_Summed,
    )  # fmt: skip
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Written whole, checksums included (temporary name, then renamed) when this returns.

    The record: anything JSON that the stage needs to go on (data position, prompt frontier, ...).

    Raises:
      OSError: it can't be written, such as on a full disk; the others stay.
    """
    if step in self._manager.all_steps():  # Left by a run that was restored from before it.
      self._manager.delete(step)
    try:
      with named(self.path_of(step), needed=_bytes(state)):
        self._manager.save(
          step,
          args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            record=ocp.args.JsonSave(record),
          ),
          force=True,
        )
        self._manager.wait_until_finished()
    except OSError:
      # Orbax's threads may still be writing: what they leave goes when the store is next opened.
      for partial in self.directory.glob(f"{step}{atomicity.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)
      raise

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def latest(self) -> int | None:
    """The newest finished step; an unfinished save does not count."""
    return max(self.steps(), default=None)

  def steps(self) -> list[int]:
    """All finished steps, damaged ones too."""
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

  def path_of(self, step: int) -> Path:
    return self.directory / str(step)

  def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """(state, record) of a step, the newest by default, like the template in shapes and dtypes.

    Without a step, damaged checkpoints newer than the first good one are renamed to damaged-<step>
    and said on stderr. Nothing is ever removed here.

    Raises:
      UserError: there is none, none can be read, or it is of another model or optimizer.
    """
    steps = [step] if step is not None else self.steps()[::-1]
    damaged: dict[int, str] = {}
    for i in steps:
      try:
        found = self._restore(template, i)
      except DAMAGE as error:
        damaged[i] = _line(error)
        continue
      for bad, why in damaged.items():
        self._set_aside(bad)
        print(f"checkpoint {self.path_of(bad)} is damaged ({why}): using step {i}", file=sys.stderr)
      return found
    if not damaged:
      raise UserError(f"no checkpoint to restore in {self.directory}: the stage has saved none yet")
    first, why = next(iter(damaged.items()))
    other = [i for i in self.steps() if i not in damaged]
    remedy = f"restore one of the steps {sorted(other)}" if other else "remove it to start the stage anew"
    raise UserError(f"no checkpoint to restore: {self.path_of(first)} can't be read ({why}); {remedy}")

  def _restore(self, template: TrainState, step: int) -> tuple[TrainState, dict]:
    path = self.path_of(step)
    if not path.is_dir():
      raise FileNotFoundError("not a folder" if path.exists() else "no such checkpoint")
    checksums.verify(path)
    rest = {"step": template.step, "opt_state": template.opt_state}
    for part, wanted in (("params", template.params), ("rest", rest)):
      _same_shapes(path, part, wanted)
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(_placed(template.params)),
        rest=ocp.args.StandardRestore(_placed(rest)),
        record=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(
      step=found["rest"]["step"], params=found["params"], opt_state=found["rest"]["opt_state"]
    )
    return state, found["record"]

  def _set_aside(self, step: int) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again."""
    if jax.process_index() == 0:
      target = self.directory / f"damaged-{step}"
      for i in range(2, 100):
        if not target.exists():
          break
        target = self.directory / f"damaged-{step}-{i}"
      self.path_of(step).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("set aside")
    self._manager.reload()


def load_params(path: str | Path, template: Params) -> Params:
  """The parameters of a checkpoint directory; its optimizer state is never read.

  Raises:
    UserError: there is none, it is damaged, or its shapes are not the template's (all are named).
  """
  path = Path(path).resolve()
  check_params(path, template)
  try:
    checksums.verify(path, part="params")
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(path / "params", _placed(template))
  except DAMAGE as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def check_params(path: str | Path, template: Params) -> None:
  """Raises UserError where `load_params` would find none, or other shapes; no array is read."""
  path = Path(path).resolve()
  if not (path / "params").is_dir():
    raise UserError(f"checkpoint {path}: not found, or without parameters; give STAGE/checkpoints/STEP")
  try:
    _same_shapes(path, "params", template)
  except (*DAMAGE, OSError) as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def check(path: Path, part: str = "") -> None:
  """Raises UserError unless all files of a checkpoint, or of a folder in it, are as they were written."""
  try:
    checksums.verify(path, part)
  except checksums.Damage as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def _same_shapes(path: Path, part: str, template) -> None:
  """Raises UserError, naming every array that is absent or of another shape."""
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
    raise UserError(f"checkpoint {path} is of another {what}: {'; '.join(different)}")


def _placed(template):
  """Shapes with a sharding each: the template's own, or this process's first device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def place(leaf):
    sharding = getattr(leaf, "sharding", None) or device
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, template)


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
