"""Orbax checkpoints of a training state with a JSON record; parameters alone for everyone else."""

import json
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from nemocascade.errors import UserError
from nemocascade.types import Params, TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at length.

CHECKSUMS = "checksums.json"  # Beside the arrays: Orbax itself does not notice a changed byte.
# Above this many bytes only sizes are compared: reading a large checkpoint twice costs minutes.
CHECKED_BYTES = 1 << 30
# What Orbax raises on a folder with lost or changed files. Others (memory, permission) pass.
DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)


class Store:
  """The checkpoints of one stage, under DIRECTORY/<step>; the newest `keep` stay."""

  def __init__(self, directory: str | Path, *, keep: int = 2):
    self.directory = Path(directory).resolve()
    self.directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Written whole (temporary name, then renamed) when this returns.

    The record: anything JSON that the stage needs to go on (data position, prompt frontier, ...).
    """
    if step in self._manager.all_steps():  # Left by a run that was restored from before it.
      self._manager.delete(step)
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
    if jax.process_index() == 0:
      write_checksums(self.path_of(step))

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def latest(self) -> int | None:
    """The newest finished step; an unfinished save does not count."""
    return self._manager.latest_step()

  def path_of(self, step: int) -> Path:
    return self.directory / str(step)

  def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """(state, record) of a step, the newest by default, like the template in shapes and dtypes.

    Without a step, damaged checkpoints newer than the first good one are renamed to damaged-<step>
    and said on stderr. Nothing is ever removed here.

    Raises:
      UserError: there is none, none can be read, or it is of another model or optimizer.
    """
    steps = [step] if step is not None else sorted(self._manager.all_steps(), reverse=True)
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
    other = [i for i in self._manager.all_steps() if i not in damaged]
    remedy = f"restore one of the steps {sorted(other)}" if other else "remove it to start the stage anew"
    raise UserError(f"no checkpoint to restore: {self.path_of(first)} can't be read ({why}); {remedy}")

  def _restore(self, template: TrainState, step: int) -> tuple[TrainState, dict]:
    path = self.path_of(step)
    if not path.is_dir():
      raise FileNotFoundError("no such checkpoint")
    _verify(path)
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
    """Out of the way under a name that is no step, so that the step can be saved again."""
    target = self.directory / f"damaged-{step}"
    for i in range(2, 100):
      if not target.exists():
        break
      target = self.directory / f"damaged-{step}-{i}"
    self.path_of(step).rename(target)
    self._manager.reload()


def load_params(path: str | Path, template: Params) -> Params:
  """The parameters of a checkpoint directory; its optimizer state is never read.

  Raises:
    UserError: there is none, it is damaged, or its shapes are not the template's (all are named).
  """
  path = Path(path).resolve()
  check_params(path, template)
  try:
    _verify(path, part="params")
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
  except DAMAGE as error:
    raise UserError(f"checkpoint {path}: can't be read ({_line(error)}); give another one") from error


def _same_shapes(path: Path, part: str, template) -> None:
  """Raises UserError, naming every array that is absent or of another shape."""
  with ocp.StandardCheckpointer() as checkpointer:
    stored = checkpointer.metadata(path / part).item_metadata.tree
  shapes = lambda tree: {
    jax.tree_util.keystr(place, simple=True, separator="/"): tuple(leaf.shape)
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  there, here = shapes(stored), shapes(template)
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


def write_checksums(path: Path) -> None:
  """{file: [bytes, crc32 or null]} of a checkpoint, renamed into place after Orbax has committed.

  A kill before this leaves a whole checkpoint that is only less well guarded.
  """
  files = sorted(p for p in path.rglob("*") if p.is_file())
  small = sum(p.stat().st_size for p in files) <= CHECKED_BYTES
  sums = {str(p.relative_to(path)): [p.stat().st_size, _crc32(p) if small else None] for p in files}
  partial = path / (CHECKSUMS + ".tmp")
  partial.write_text(json.dumps(sums))
  partial.rename(path / CHECKSUMS)


def _verify(path: Path, part: str = "") -> None:
  """Raises ValueError on the first file (of `part`, a folder) that is not as it was written."""
  if not (path / CHECKSUMS).exists():
    return
  for name, (size, crc32) in json.loads((path / CHECKSUMS).read_text()).items():
    if not name.startswith(part):
      continue
    file = path / name
    if not file.exists():
      raise ValueError(f"{name} is missing")
    if file.stat().st_size != size:
      raise ValueError(f"{name} has {file.stat().st_size} bytes and was written with {size}")
    if crc32 is not None and _crc32(file) != crc32:
      raise ValueError(f"{name} has changed since it was written")


def _crc32(path: Path) -> int:
  value = 0
  with path.open("rb") as file:
    while block := file.read(1 << 22):
      value = zlib.crc32(block, value)
  return value


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
