"""The processes of a run must agree in code, packages, config, data, work directory and devices before it begins."""

import functools
import glob
import importlib.metadata
import itertools
import os
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from nemocascade.data.row_files import digest
from nemocascade.errors import UserError
from nemocascade.runtime import newest
from nemocascade.runtime.hosts import exchange, index
from nemocascade.runtime.workdir import difference, own_versions
from nemocascade.state_files import on_bucket
from nemocascade.store import hf

ROOT = Path(__file__).parents[2]
# Packages that are compared besides those that setup.py requires.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "gcsfs")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Variables whose names begin with JAX_ are compared too, but for those that begin so: they may be of one host.
OF_HOST = tuple(
  f"JAX_{word}"
  for word in (
    "COMPILATION_CACHE", "PERSISTENT_CACHE", "COORDINATOR", "PROCESS", "NUM_", "LOCAL_", "PLATFORM", "CUDA_VISIBLE",
    "LOG", "LOGGING", "DEBUG_LOG", "DUMP", "TRACEBACK",
  )
)  # fmt: skip
FILE_FLAGS = (*newest.FLAGS, "input")  # Flags that name files which every process reads.
MOST_FILES, MOST_READ = 10_000, 1_000  # Files of a folder that are counted, and of which parts are read.
MOST_BYTES = 1 << 24  # Bytes that are read of them.
SEEN_S = 5.0  # Time in which the others must see what process 0 has written.


def check(config: Mapping[str, Any] | None, flags: Mapping[str, Any]) -> None:
  """Compares the processes; all must call it.

  Args:
    config: the resolved config as JSON; None for a command without one.
    flags: flag -> value, as parsed.

  Raises:
    UserError: processes differ. The message, the same in all, names the first difference and the processes.
  """
  of_flags = [flags[name] for name in FILE_FLAGS if flags.get(name)]
  _compare(
    {
      "code": code(),
      "packages": packages(),
      "environment": environment(),
      "flags": {name: str(value) for name, value in flags.items()},
      "config": config or {},
      "files of functions": own_versions(config or {}),
      "files of data": data([config or {}, of_flags]),
    }
  )


def check_devices() -> None:
  """Compares the devices of the processes, after JAX has started. Raises UserError as `check`."""
  devices = jax.local_devices()
  _compare({"devices": {"number": len(devices), "kind": devices[0].device_kind}})


def check_shared(workdir: Path) -> None:
  """Raises UserError if a process does not see what process 0 writes to the work directory. Nothing stays there."""
  if on_bucket(workdir):
    return
  up, there = next((up, path) for up, path in enumerate((workdir, *workdir.parents)) if path.exists())
  trial = tempfile.TemporaryDirectory(prefix=".shared.", dir=there) if index() == 0 else None
  said = [str(workdir), up, trial and Path(trial.name).name]
  named, up, name = exchange(said, "trial of the work directory")[0]
  own = (workdir, *workdir.parents)[up : up + 1]
  until = time.monotonic() + SEEN_S
  while not (seen := any((path / name).is_dir() for path in own)) and time.monotonic() < until:
    time.sleep(0.1)
  blind = [i for i, sees in enumerate(exchange(seen, "sight of the work directory")) if not sees]
  if trial is not None:
    trial.cleanup()
  if blind:
    raise UserError(
      f"--workdir={named}: {_processes(blind)} can't see what process 0 writes there; give a folder that all hosts"
      " share, or gs://BUCKET/FOLDER"
    )


def _compare(here: dict[str, Any]) -> None:
  """Raises UserError if a part of `here` is another in another process."""
  everywhere = exchange(here, "what the processes start with")
  for part in here:  # The code first: other differences can come from it.
    for there in everywhere:
      if found := difference(everywhere[0][part], there[part], part):
        name, first, other = found
        alike = [i for i, one in enumerate(everywhere) if difference(there[part], one[part], part) is None]
        raise UserError(
          f"processes differ in {name}: {_shown(first)} in process 0, {_shown(other)} in {_processes(alike)}"
        )


def data(fields: Any) -> dict[str, str]:
  """Value of the config that names files or folders here -> their number, bytes and checksum.

  The checksum is of evenly spaced parts where the files are large.
  """
  if isinstance(fields, dict | list):
    values = fields.values() if isinstance(fields, dict) else fields
    return {word: size for value in values for word, size in data(value).items()}
  said = _said_of(fields) if isinstance(fields, str) else ""
  return {fields: said} if said else {}


@functools.cache
def _said_of(word: str) -> str:
  """What `data` says of the files of a word; "" if it names none."""
  found = sorted(glob.glob(word.removeprefix(hf.PREFIX), recursive=True))
  files = [file for path in found for file in _files(Path(path))]
  if not files:
    return ""
  sizes, step = [file.stat().st_size for file in files], -(-len(files) // MOST_READ)
  return f"{len(files)} files of {sum(sizes)} bytes, {digest(files[::step], sizes[::step], MOST_BYTES)[:8]}"


def _files(path: Path) -> list[Path]:
  """The file, or the first files of the folder and of those in it."""
  if path.is_file():
    return [path]
  return list(itertools.islice(_below(path), MOST_FILES))


def _below(folder: Path) -> Iterator[Path]:
  for place, folders, names in os.walk(folder):
    folders.sort()
    yield from (file for name in sorted(names) if (file := Path(place) / name).is_file())


def code() -> dict[str, str]:
  """Python file -> checksum, for this package and the folders beside it that its commands use."""
  files = [p for folder in ("nemocascade", "experiments", "configs") for p in sorted((ROOT / folder).rglob("*.py"))]
  return {str(p.relative_to(ROOT)): f"{zlib.crc32(p.read_bytes()):08x}" for p in files}


def packages() -> dict[str, str]:
  """Package -> version, for Python and the packages that several processes must share."""
  try:
    required = importlib.metadata.requires("nemocascade") or []
  except importlib.metadata.PackageNotFoundError:  # Used from its folder without an installation.
    required = []
  names = [found[0] for line in required if "extra ==" not in line and (found := re.match(r"[\w.-]+", line))]
  return {"python": platform.python_version()} | {name: _version(name) for name in (*PACKAGES, *names)}


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "absent"


def environment() -> dict[str, str]:
  """Variable -> value, for those that change how programs are compiled."""
  own = {name: value for name, value in os.environ.items() if name.startswith("JAX_") and not name.startswith(OF_HOST)}
  return {name: os.environ.get(name, "") for name in ENVIRONMENT} | own


def _shown(value: Any) -> str:
  return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _processes(indices: list[int]) -> str:
  return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"
